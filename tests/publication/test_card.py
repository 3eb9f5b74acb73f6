"""The card says what the facts say, loads as the Hub loads it, and cannot be broken by a name."""

import re

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries
from safetensors.torch import save_file

from conversion_models import EDGES, LIKE_V3, our_network, tiny_model, tokenizer_folder
from headrace.conversion.check import expected_values
from headrace.conversion.export import export
from headrace.publication import card
from headrace.publication.facts import DataSource
from headrace.stages.publish import measurements
from publication.publication_fixtures import card_facts


def rows(content, heading, before=False):
    """The cells of the first table below a heading, or of the one before it."""
    parts = content.split(f"\n## {heading}\n", 1)
    section = parts[0] if before else parts[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_metadata_and_scores_round_trip_through_the_hubs_own_reader():
    loaded = ModelCard(card.render(card_facts())).data
    assert (loaded.license, loaded.license_name) == ("other", "see-training-data")
    assert (loaded.library_name, loaded.pipeline_tag) == ("transformers", "text-generation")
    assert {"headrace", "deepseek_v3", "moe"} <= set(loaded.tags)
    assert loaded.model_name == "Small model"
    assert loaded.eval_results == [
        EvalResult(
            task_type="text-generation",
            task_name="Bits per byte",
            dataset_type="held-out",
            dataset_name="held-out",
            metric_type="bits_per_byte",
            metric_name="bits_per_byte",
            metric_value=1.91,
            metric_args={"items": 321, "interval_95": [1.8, 2.02]},
        ),
        EvalResult(
            task_type="text-generation",
            task_name="Canonical",
            dataset_type="openai/openai_humaneval",
            dataset_name="HumanEval",
            metric_type="nats",
            metric_name="nats",
            metric_value=0.7,
            metric_args={"items": 164},
        ),
    ]


def test_eval_results_files_hold_the_same_scores_for_data_sets_of_the_hub():
    files = card.eval_result_files(card_facts())
    assert list(files) == ["openai-openai-humaneval.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files["openai-openai-humaneval.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/openai_humaneval", "canonical", 0.7)


def test_tables_hold_every_fact():
    content = card.render(card_facts())
    assert rows(content, "Evaluation") == [
        ["Measured", "Data", "Items", "Metric", "This model", "95 % interval", "bigram", "xz"],
        ["---", "---", "--:", "---", "--:", "--:", "--:", "--:"],
        ["Bits per byte", "held-out", "321", r"bits\_per\_byte", "1.91", "1.8 to 2.02", "2.3", "–"],
        ["Canonical", "HumanEval", "164", "nats", "0.7", "–", "–", "0.9"],
    ]
    assert rows(content, "Training data")[2:] == [
        ["numpy", "BSD-3-Clause", "410", "5,123,456"],
        ["CPython", "PSF-2.0", "900", "9,000,000"],
    ]
    assert ["`n_routed_experts`", "`8`"] in rows(content, "Architecture")
    for text in ("7,700,000", "3,000,000", "500,000", "6,000,000", "1.25e+14 FLOP in 4.1 min on 2 CPU cores", "2.13.0"):
        assert text in content
    assert 'from_pretrained("me/small", revision="0123456789ab")' in content
    assert "```bash\nsnakemake publish --config experiment=demo\n```" in content


def test_the_weights_that_training_went_on_from_are_named():
    text = card.render(card_facts(origin="deepseek-ai/DeepSeek-V3-Base@0123abc"))
    assert "going on from the weights of\n`deepseek-ai/DeepSeek-V3-Base@0123abc`" in text
    assert ModelCard(text).data.base_model == "deepseek-ai/DeepSeek-V3-Base"
    local = card.render(card_facts(origin="my-folder"))
    assert "`my-folder`" in local
    assert ModelCard(local).data.base_model is None
    assert "from scratch" in card.render(card_facts())


def test_a_local_folder_is_loaded_without_a_revision():
    content = card.render(card_facts(repo_id=None, measurements=[]))
    assert 'from_pretrained("path/to/this/folder")' in content and "Not evaluated." in content
    assert ModelCard(content).data.eval_results is None


def test_the_format_and_its_size_are_said():
    content = card.render(card_facts())
    assert ["Precision", "trained in bf16, published in bf16"] in rows(content, "Use", before=True)
    assert ["Size", "15,400,000 bytes of weights"] in rows(content, "Use", before=True)
    assert "accelerate" not in content and "fp8" not in ModelCard(content).data.tags
    content = card.render(card_facts(dtype="fp8"))
    (precision,) = (row[1] for row in rows(content, "Use", before=True) if row[0] == "Precision")
    assert "published in FP8: E4M3 in blocks of 128 x 128" in precision
    assert "needs `accelerate`" in content and "fp8" in ModelCard(content).data.tags
    assert "AutoModelForCausalLM.from_pretrained" in content


@pytest.mark.parametrize("changes", [LIKE_V3, EDGES])
def test_the_card_of_a_model_with_cut_blocks_loads_it_rightly(changes, tmp_path, capsys):
    """The code in the card is run as it stands."""
    config = tiny_model(**changes)
    network = our_network(config)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer_folder(tmp_path / "tok"), tmp_path / "hub", "fp8", 300_000)
    content = card.render(card_facts(dtype="fp8", cuts_blocks=True, repo_id=None))
    (code,) = re.findall(r"```python\n(.*?)```", content, re.DOTALL)
    names = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "hub")), names)
    network.load_state_dict(expected_values(tmp_path / "hub", tmp_path / "model.safetensors"))
    tokens = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert (names["model"].eval()(tokens).logits - network(tokens)).abs().max() < 2e-5
    assert "def main" in capsys.readouterr().out
    content = card.render(card_facts(dtype="fp8", cuts_blocks=True))
    assert 'snapshot_download("me/small", revision="0123456789ab")' in content


def test_free_text_breaks_neither_table_nor_front_matter_nor_fence():
    evil = "x | y\n---\nlicense: mit\n<script>alert(1)</script> [a](http://b) `c`"
    facts = card_facts(
        title=evil,
        sources=[DataSource(evil, evil, 1, 2)],
        command="echo '```'\necho done",
        versions={"torch": evil},
        config={**card_facts().config, "note": evil},
    )
    content = card.render(facts)
    loaded = ModelCard(content)
    assert loaded.data.license == "other" and loaded.data.model_name == evil
    prose = re.sub(r"`[^`\n]*`", "", loaded.text)  # inside code spans, text is text
    assert "<script" not in prose and "](http://b)" not in prose and "<script" in loaded.text
    (row,) = rows(content, "Training data")[2:]
    assert len(row) == 4
    assert all(len(row) == 2 for row in rows(content, "Architecture"))
    assert "````bash\necho '```'\necho done\n````" in content


def test_one_results_file_makes_table_model_index_and_eval_results():
    """The three agree, since they are made from the same lines; only a task with a data set on the Hub gets a file."""
    score = {"value": 0.41, "low": 0.38, "high": 0.44}
    task = {"metric": "acc", "score": score, "chance": 0.25, "items": 900, "measures": "four choices"}
    models = {"model": {"value": 1.2, "low": 1.1, "high": 1.3}, "bigram": {"value": 2.3}}
    results = {
        "bits_per_byte": {"kinds": {"code": {"models": models, "documents": 12}}},
        "tasks": {"hub": {**task, "dataset_id": "owner/questions"}, "own": task},
    }
    facts = card_facts(measurements=list(measurements(results)))
    content = card.render(facts)
    table = {row[0]: row[4] for row in rows(content, "Evaluation")[2:]}
    index = {one.task_name: one.metric_value for one in ModelCard(content).data.eval_results}
    assert table == {name: f"{value:.4g}" for name, value in index.items()}
    assert index == {"Bits per byte, code": 1.2, "hub": 0.41, "own": 0.41}
    ((name, text),) = card.eval_result_files(facts).items()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (name, entry.dataset_id, entry.value) == ("owner-questions.yaml", "owner/questions", index["hub"])
