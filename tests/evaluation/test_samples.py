import torch

from evaluation_world import LENGTH, World
from headrace.evaluation import samples
from headrace.evaluation.heldout import read
from headrace.evaluation.scorer import TransformersScorer


def test_greedy_samples_take_the_likeliest_token_each_time(world: World) -> None:
    encoder, scorer = world.encoder(), TransformersScorer.load(world.hub)
    rows = read(world.heldout, encoder, LENGTH, 20)
    texts = samples.generate(scorer.model, encoder, rows, 5, 6, 3)
    assert [text["settings"] for text in texts] == ["greedy", "temperature 0.8"] * 2 + ["greedy"]
    assert len({text["prompt"] for text in texts}) == 3  # two settings for each prompt
    for text in texts[::2]:
        row = next(
            row for row in samples._prompt_rows(rows) if rows.documents[rows.owner[row]].path == text["document"]
        )
        ids = rows.tokens[row, : 1 + samples.PROMPT_TOKENS].tolist()
        assert encoder.decode_bytes(rows.tokens[row, : len(ids)]).decode(errors="replace") == text["prompt"]
        new = []
        with torch.no_grad():
            for _ in range(6):
                new.append(int(scorer.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
                if new[-1] == encoder.eos:
                    break
        assert b"".join(encoder.pieces[token] for token in new).decode(errors="replace") == text["continuation"]
        assert text["tokens"] == len(new)


def test_sampled_text_repeats_with_its_seed_and_leaves_the_random_state_alone(world: World) -> None:
    encoder, scorer = world.encoder(), TransformersScorer.load(world.hub)
    rows = read(world.heldout, encoder, LENGTH, 20)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second, other = (samples.generate(scorer.model, encoder, rows, 2, 12, seed)[1] for seed in (1, 1, 9))
    assert first == second and first["continuation"] != other["continuation"]
    assert torch.equal(before, torch.random.get_rng_state())
