"""Tasks through the lm-evaluation-harness, in this process and without a network.

The harness builds prompts, asks for log-likelihoods and collects metrics; our scorer answers; our statistics put
intervals on the results, since the harness gives none for likelihoods. Each task is a JSON-lines file and a plain
dictionary (no functions, no code), written into a working folder so that it can be read, or run with the harness's own
command line. The harness's bundled tasks, which download, are loaded by `hub_tasks` alone.

- `humaneval_likelihood`: how likely the model finds the canonical solutions of HumanEval, in bits per byte. No code is
  generated or run: this is not pass@1 and says nothing about solving the problems.
- `reasoning_gym`: the share of puzzles where the right answer is the likeliest of four of the same form. Guessing
  scores 1/4. How likely the right answer is, in bits per byte, is kept beside it: it moves long before the choice does.

lm-eval and datasets are imported when tasks are run: they take seconds, which nothing else should wait for.
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import yaml
from lm_eval import __version__ as harness_version
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import StoppingCriteriaList

from headrace.artifacts.files import hash_bytes
from headrace.evaluation import items
from headrace.evaluation.scorer import TransformersScorer, batches
from headrace.evaluation.statistics import Estimate, ratio_of_sums, standard_error, wilson
from headrace.evaluation.text import TextEncoder

_LIKELIHOOD = {"output_type": "loglikelihood", "doc_to_target": "solution", "metric_list": [{"metric": "acc"}]}
_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc"}],
}
_KIND = {"humaneval_likelihood": _LIKELIHOOD, "reasoning_gym": _CHOICE}
_SHARED = {"dataset_path": "json", "test_split": "test", "doc_to_text": "prompt", "num_fewshot": 0}

HARNESS = f"lm-eval {harness_version}"

_MAX_GENERATED = 256  # tokens, where a task does not say; the harness's own default
Request = tuple[tuple[str, str], list[int], list[int]]


class Answer(NamedTuple):
    """What the harness wants per request: log-likelihood in nats, and whether greedy decoding would give the text."""

    log_likelihood: float
    greedy: bool


class ScorerLM(TemplateLM):  # type: ignore[misc]
    """Our scorer as a harness model.

    Requests longer than `max_length` + 1 tokens lose context on the left, as in the harness's own Hugging Face model;
    a continuation longer than `max_length` is scored in pieces, each with one token of context at least.
    """

    def __init__(self, scorer: TransformersScorer, encoder: TextEncoder, max_length: int) -> None:
        super().__init__()
        self._scorer, self._encoder, self._max_length = scorer, encoder, max_length

    @property
    def eot_token_id(self) -> int:
        """The id before a text without context."""
        return self._encoder.eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of plain text; special tokens are never added."""
        ids: list[int] = self._encoder.encode([string])[0].tolist()
        return ids

    def scored_bytes(self, context: str, continuation: str) -> int:
        """Bytes of text behind the tokens that the harness scores, which include the context's trailing white space."""
        return int(self._encoder.piece_bytes[self._encode_pair(context, continuation)[1]].sum())

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[Answer]:
        """Log-likelihood of continuations; without the harness's progress bars."""
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[Answer]:
        owners, rows, targets = [], [], []
        for number, (_text, context, continuation) in enumerate(requests):
            for row, scored in _pieces(context, continuation, self._max_length):
                owners.append(number)
                rows.append(row)
                targets.append(scored)
        lengths = np.array([len(row) - 1 for row in rows], dtype=np.int64)
        totals, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
        for group in batches(lengths, self._scorer.vocab_size):
            padded = torch.full((len(group), int(lengths[group].max()) + 1), self._encoder.eos, dtype=torch.int64)
            for place, number in enumerate(group):
                padded[place, : len(rows[number])] = torch.tensor(rows[number])
            scores, likeliest = self._scorer.score(padded)
            for place, number in enumerate(group):
                span = slice(int(lengths[number]) - targets[number], int(lengths[number]))
                totals[owners[number]] += float(scores[place, span].double().sum())
                greedy[owners[number]] &= bool(likeliest[place, span].all())
        return [Answer(float(total), bool(same)) for total, same in zip(totals, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not offered: whole documents are scored by `bits_per_byte`, and `hub_tasks` refuses such tasks."""
        raise AssertionError("rolling log-likelihoods are refused before anything runs")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each context, up to the first of its stop sequences or `max_gen_toks` tokens.

        One context at a time, so that no answer depends on its neighbours. A context that leaves no room for the answer
        loses tokens on the left, as in the harness's own Hugging Face model; where the answer alone would fill the
        model, which that one refuses, each gets half.
        """
        return [self._generate(*request.args) for request in requests]

    @torch.inference_mode()
    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        wanted = int(settings.get("max_gen_toks", _MAX_GENERATED))
        stops = [settings["until"]] if isinstance(settings.get("until"), str) else list(settings.get("until") or ())
        wanted = wanted if wanted < self._max_length else self._max_length // 2
        room = self._max_length - wanted
        ids = torch.tensor([self.tok_encode(context)[-room:] or [self.eot_token_id]], device=self._scorer.model.device)
        start = ids.shape[1]

        def text(tokens: torch.Tensor) -> str:
            return self._encoder.decode_bytes(tokens[start:].cpu().numpy()).decode("utf-8", errors="replace")

        def stopped(tokens: torch.Tensor, _: object) -> torch.Tensor:
            return torch.tensor([any(stop in text(row) for stop in stops) for row in tokens], device=tokens.device)

        made = self._scorer.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=wanted,
            do_sample=False,
            eos_token_id=self.eot_token_id,
            pad_token_id=self.eot_token_id,
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
        answer = text(made[0])
        for stop in stops:
            answer = answer.split(stop)[0]
        return answer


def run(
    tasks: Sequence[str],
    count: int,
    scorer: TransformersScorer,
    encoder: TextEncoder,
    max_length: int,
    folder: Path,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run tasks with at most `count` items each; `folder` takes their files.

    Returns each task's summary (metric, value with interval, n, chance level, hashes) and one entry per item.
    """
    model = ScorerLM(scorer, encoder, max_length)
    definitions, hashes = [], {}
    for name in tasks:
        path = folder / f"{name}.jsonl"
        hashes[name] = items.write(path, items.take(name, count))
        definitions.append(_definition(name, path, folder / "cache"))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definitions[-1]), encoding="utf-8")
    with quiet():
        loaded = TaskManager(include_defaults=False).load(definitions)
        outcome = evaluate(lm=model, task_dict=loaded, bootstrap_iters=0, log_samples=True)
    summaries, entries = {}, []
    for name in tasks:
        samples = sorted(outcome["samples"][name], key=lambda sample: sample["doc_id"])
        summarise = _likelihood if _KIND[name] is _LIKELIHOOD else _choice
        summary, own = summarise(model, samples, resamples, seed)
        summaries[name] = {**summary, "items": len(samples), "shots": 0, "items_sha256": hashes[name]}
        asked = json.dumps({**_SHARED, **_KIND[name]}, sort_keys=True).encode()
        summaries[name]["definition"] = hash_bytes(asked, "sha256").removeprefix("sha256:")
        summaries[name]["harness"] = HARNESS
        entries += [{"task": name, **entry} for entry in own]
    return summaries, entries


def _definition(name: str, path: Path, cache: Path) -> dict[str, Any]:
    data = {"data_files": {"test": str(path)}, "cache_dir": str(cache)}
    return {"task": name, "dataset_kwargs": data, "metadata": {"version": 1}, **_SHARED, **_KIND[name]}


def _likelihood(
    model: ScorerLM, samples: list[dict[str, Any]], resamples: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    nats = np.array([-sample["filtered_resps"][0][0] for sample in samples])
    size = np.array([model.scored_bytes(*sample["arguments"][0]) for sample in samples], dtype=np.float64)
    estimate = ratio_of_sums(nats / np.log(2), size, resamples, seed)
    summary = {
        "metric": "bits per byte of the canonical solution",
        "higher_is_better": False,
        "score": estimate.to_json(),
        "chance": None,
        "measures": "likelihood of HumanEval's canonical solutions given the prompts; not pass@1, nothing is run",
        "nats_per_item": {"value": float(nats.mean()), "standard_error": standard_error(nats)},
    }
    entries = [
        {**_identity(sample["doc"]), "nats": float(own), "bytes": int(length)}
        for sample, own, length in zip(samples, nats, size, strict=True)
    ]
    return summary, entries


def _choice(
    model: ScorerLM, samples: list[dict[str, Any]], _resamples: int, _seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    right = [int(sample["acc"]) for sample in samples]
    groups = [sample["doc"]["generator"] for sample in samples]
    by_generator = {
        name: _share([hit for hit, own in zip(right, groups, strict=True) if own == name]) for name in groups
    }
    summary = {
        "metric": "accuracy",
        "higher_is_better": True,
        "score": _share(right).to_json(),
        "chance": 1 / (1 + items.WRONG_ANSWERS),
        "measures": "choice of the right answer among four of the same form, generated puzzles",
        "by_generator": {name: share.to_json() for name, share in by_generator.items()},
    }
    entries = [
        {**_identity(sample["doc"]), "scores": {"accuracy": hit}, **gold_answer(model, sample, sample["doc"]["label"])}
        for sample, hit in zip(samples, right, strict=True)
    ]
    return summary, entries


def gold_answer(model: ScorerLM, sample: Mapping[str, Any], gold: int) -> dict[str, Any]:
    """How likely the right one of a sample's choices is: `nats` and the `bytes` that they are of."""
    nats, size = -float(sample["filtered_resps"][gold][0]), model.scored_bytes(*sample["arguments"][gold])
    return {"nats": nats, "bytes": size}


def _identity(item: Mapping[str, Any]) -> dict[str, str]:
    """Which item it is, by name and content; each is a unit of its own."""
    return {"item": item["id"], "hash": item["hash"], "unit": item["id"]}


def _share(hits: list[int]) -> Estimate:
    return wilson(sum(hits), len(hits))


def _pieces(context: list[int], continuation: list[int], limit: int) -> Iterator[tuple[list[int], int]]:
    """Rows of at most `limit` + 1 tokens that end with a piece of the continuation: (row, tokens of the piece)."""
    whole = context + continuation
    for start in range(0, len(continuation), limit):
        end = len(context) + min(start + limit, len(continuation))
        piece = end - len(context) - start
        yield whole[max(0, end - limit - 1) : end], piece


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back progress bars and notices of the harness and of `datasets`; errors are logged or raised as ever."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
