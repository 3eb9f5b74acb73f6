"""The harness's own tasks, whose data come from the Hub: loaded, checked against their pins, scored by our scorer.

They are the only part of evaluation that uses a network, and only where `evaluate.harness` names some. All are loaded
before anything is measured. What can be wrong with one is told apart:

- the files that define it (YAML, Python and few-shot examples) are not those pinned by `definition`, or its items and
  prompts not those pinned by `items`: refused, whatever the settings. A pin of items holds for one `evaluate.items`;
- the Hub cannot be reached, or does not have its data: refused in one line, or skipped and said so in the results, as
  `evaluate.without_network` says;
- it runs what the model writes (HumanEval, MBPP, CRUXEval): skipped and said so. Nothing here is a sandbox; whoever has
  one gives the exported folder to lm-eval in it;
- its own code asks for packages that are not here (Minerva's for an antlr4 that Hydra does not work with): skipped and
  said so.

`metric: gold` scores no choice and no generated text but how likely the right answer is, in bits per byte, of any task
that has one: it moves at a scale where accuracy stays at chance (arXiv 2504.11393). A group's score is that of all its
items; items that share a passage count as one unit.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants, get_session
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks import __file__ as _tasks

from headrace.artifacts.files import hash_bytes, hash_file
from headrace.config.schema import HarnessTask
from headrace.errors import UserError
from headrace.evaluation.harness import HARNESS, ScorerLM, gold_answer, quiet
from headrace.evaluation.statistics import Estimate, clustered_mean, proportion, ratio_of_sums

GOLD = "gold"
UNSAFE = "it runs code that the model writes, and there is no sandbox here"
ROOT = Path(_tasks).parent
"""Where the harness keeps its definitions."""
_SEED = 1234  # of few-shot examples: the harness's own default
_SECONDS = 5.0


@dataclass(frozen=True)
class LoadedTask:
    """A task or group and its leaf tasks, ready to be asked."""

    config: HarnessTask
    leaves: Mapping[str, Any]


def load(
    chosen: Sequence[HarnessTask], without_network: str, root: Path = ROOT
) -> tuple[list[LoadedTask], dict[str, str]]:
    """Load the tasks that `root`'s folders define; returns them and, by name, why the others are skipped.

    Raises `UserError` in one line where a task is unknown or not as pinned, and where one cannot be had and
    `without_network` is `refuse`.
    """
    names = [config.task for config in chosen]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"evaluate.harness: {twice[0]} stands there twice; name each task once")
    for config in chosen:
        _require_definition(config, root)
    manager = _manager(chosen, root)
    loaded, skipped, reached = [], {}, reachable()
    for config in chosen:
        if any((entry.cfg or {}).get("unsafe_code") for entry in _leaves(manager, config.task)):
            skipped[config.task] = UNSAFE
            continue
        try:
            if not reached:
                raise ConnectionError(f"{constants.ENDPOINT} cannot be reached")
            with quiet():
                tasks = manager.load([config.task])["tasks"]
        except ImportError as error:
            skipped[config.task] = f"its definition does not run here: {' '.join(str(error).split())[:200]}"
            continue
        except Exception as error:  # whatever else a task's own code and the data's readers raise
            reason = f"its data cannot be had: {' '.join(str(error).split())[:200]}"
            if without_network == "refuse":
                raise UserError(
                    f"evaluate.harness: {config.task}: {reason}; leave it out or set evaluate.without_network=skip"
                ) from None
            skipped[config.task] = reason
            continue
        loaded.append(LoadedTask(config, {name: _prepared(task, config) for name, task in tasks.items()}))
    return loaded, skipped


def definitions(config: HarnessTask, root: Path = ROOT) -> list[Mapping[str, Any]]:
    """The definitions of a task's leaves as they are in their files: nothing that they name is imported or run."""
    return [entry.cfg or {} for entry in _leaves(_manager([config], root), config.task)]


def reachable() -> bool:
    """Whether the Hub answers; with HF_HUB_OFFLINE it is not asked."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # offline mode, no route, no name, no proxy: all the same here
        return False
    return True


def run(
    loaded: Sequence[LoadedTask], count: int, model: ScorerLM, resamples: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask each task at most `count` items (a group: each of its tasks); as `harness.run`, a summary and entries."""
    summaries, entries = {}, []
    for task in loaded:
        own = _gold_entries(task, count, model) if _only_gold(task) else _scored_entries(task, count, model)
        digest = hash_bytes("".join(entry["hash"] for entry in own).encode(), "sha256").removeprefix("sha256:")
        if task.config.items not in (None, digest):
            raise UserError(
                f"evaluate.harness: {task.config.task}: its items and prompts (sha256 {digest}) are not those pinned; "
                "the data on the Hub changed, or evaluate.items or shots did: pin the new ones or take the old back"
            )
        summaries[task.config.task] = {**_summary(task, own, resamples, seed), "items_sha256": digest}
        entries += [{key: value for key, value in entry.items() if key != "choices"} for entry in own]
    return summaries, entries


def definition(folders: Sequence[str], root: Path = ROOT) -> str:
    """sha256 over the files of a task's folders: all that its definition may read."""
    files = {path for folder in folders for path in (root / folder).rglob("*") if path.is_file()}
    kept = sorted(path for path in files if path.suffix not in (".md", ".pyc"))
    lines = [f"{path.relative_to(root).as_posix()} {hash_file(path, 'sha256')}\n" for path in kept]
    return hash_bytes("".join(lines).encode(), "sha256").removeprefix("sha256:")


def _manager(chosen: Sequence[HarnessTask], root: Path) -> TaskManager:
    folders = dict.fromkeys(root / folder for config in chosen for folder in config.folders)
    with quiet():
        return TaskManager(include_path=list(folders), include_defaults=False)


def _require_definition(config: HarnessTask, root: Path) -> None:
    if absent := [folder for folder in config.folders if not (root / folder).is_dir()]:
        raise UserError(f"evaluate.harness: {config.task}: {HARNESS} has no folder {absent[0]}; see {root}")
    found = definition(config.folders, root)
    if found != config.definition:
        raise UserError(
            f"evaluate.harness: {config.task}: {HARNESS} defines it otherwise (sha256 {found}) than pinned; install "
            "the version that constraints.txt names, or pin this one"
        )


def _leaves(manager: TaskManager, member: Any) -> Iterator[Any]:
    """The index entries of the tasks that a name, or a member of a group, stands for."""
    if isinstance(member, dict) and member.get("group") not in manager.task_index and isinstance(member["task"], list):
        for inner in member["task"]:  # a group that is defined where it stands
            yield from _leaves(manager, inner)
        return
    name = member if isinstance(member, str) else member.get("group", member.get("task"))
    entry = manager.task_index.get(name)
    if entry is None:
        raise UserError(f"evaluate.harness: {HARNESS} has no task {name!r} in the folders named with it")
    members = (
        sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg["task"] if entry.kind.name == "GROUP" else []
    )
    for inner in members:
        yield from _leaves(manager, inner)
    if not members:
        yield entry


def _prepared(task: Any, config: HarnessTask) -> Any:
    """Shots and their seed set; tasks of a kind that is not offered refused."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise UserError(
            f"evaluate.harness: {config.task}: whole documents are measured by bits per byte, not as a task"
        )
    if config.shots is not None and task.config.num_fewshot != 0:  # 0 in a definition: its prompt holds the shots
        task.set_config(key="num_fewshot", value=config.shots)
    task.set_fewshot_seed(seed=_SEED)
    return task


def _only_gold(task: LoadedTask) -> bool:
    kinds = {leaf.OUTPUT_TYPE for leaf in task.leaves.values()}
    return task.config.metric == GOLD and kinds == {"generate_until"}


def _gold_entries(task: LoadedTask, count: int, model: ScorerLM) -> list[dict[str, Any]]:
    """Likelihood of the right answers of tasks that would generate text; the first where several are right."""
    entries = []
    for name, leaf in task.leaves.items():
        with quiet():
            leaf.build_all_requests(limit=count, rank=0, world_size=1)
        answers = [_first(leaf.doc_to_target(instance.doc)) for instance in leaf.instances]
        pairs = [
            (instance.args[0], f"{leaf.config.target_delimiter}{answer}")
            for instance, answer in zip(leaf.instances, answers, strict=True)
        ]
        asked = [
            Instance("loglikelihood", instance.doc, pair, 0)
            for instance, pair in zip(leaf.instances, pairs, strict=True)
        ]
        for instance, pair, found in zip(leaf.instances, pairs, model.loglikelihood(asked), strict=True):
            content = hash_bytes("\0".join(pair).encode(), "sha256")
            identity = _identity(task, f"{name}/{instance.doc_id}", content, instance.doc)
            entries.append({**identity, "nats": -found.log_likelihood, "bytes": model.scored_bytes(*pair)})
    return entries


def _scored_entries(task: LoadedTask, count: int, model: ScorerLM) -> list[dict[str, Any]]:
    """What the harness makes of each item, and how likely the right choice is where there are choices."""
    with quiet():
        outcome = evaluate(
            lm=model,
            task_dict={"tasks": dict(task.leaves), "groups": {}, "group_map": {}},
            limit=count,
            bootstrap_iters=0,
            log_samples=True,
        )
    entries = []
    for name, leaf in task.leaves.items():
        better = leaf.higher_is_better()
        seen: dict[int, dict[str, Any]] = {}
        for sample in outcome["samples"][name]:
            hashes = "".join(sample[key] for key in ("doc_hash", "prompt_hash", "target_hash"))
            content = hash_bytes(hashes.encode(), "sha256")
            item = f"{name}/{sample['doc_id']}"
            fresh = {**_identity(task, item, content, sample["doc"]), "scores": {}, **_gold(leaf, sample, model)}
            entry = seen.setdefault(sample["doc_id"], fresh)
            for metric in sample["metrics"]:
                if better.get(metric) and isinstance(sample[metric], (bool, int, float, np.number)):
                    entry["scores"].setdefault(metric, float(sample[metric]))
                    entry["scores"][f"{metric},{sample['filter']}"] = float(sample[metric])
        entries += [seen[place] for place in sorted(seen)]
    return [_without_plain_names(entry) for entry in entries]


def _without_plain_names(entry: dict[str, Any]) -> dict[str, Any]:
    """`acc` rather than `acc,none` where a task filters in one way only; `exact_match,<filter>` where in several."""
    filters = {name.partition(",")[2] for name in entry["scores"] if "," in name}
    kept = {name: value for name, value in entry["scores"].items() if ("," in name) == (len(filters) > 1)}
    return {**entry, "scores": kept}


def _gold(leaf: Any, sample: Mapping[str, Any], model: ScorerLM) -> dict[str, Any]:
    if leaf.OUTPUT_TYPE == "loglikelihood":
        return gold_answer(model, sample, 0)
    if leaf.OUTPUT_TYPE != "multiple_choice":
        return {}
    gold = leaf.doc_to_text(sample["doc"]) if leaf.multiple_input else sample["target"]
    choices = leaf.doc_to_choice(sample["doc"])
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if not isinstance(gold, int):  # several right ones, or none
        return {"choices": len(choices)}
    return {**gold_answer(model, sample, gold), "choices": len(choices)}


def _identity(task: LoadedTask, item: str, content: str, document: Mapping[str, Any]) -> dict[str, str]:
    passage = task.config.passage
    if passage is not None and passage not in document:
        raise UserError(
            f"evaluate.harness: {task.config.task}: its items have no field {passage!r} but {', '.join(document)}"
        )
    unit = item if passage is None else hash_bytes(str(document[passage]).encode(), "xxh3")
    return {"task": task.config.task, "item": item, "hash": content, "unit": unit}


def _first(answer: Any) -> str:
    return str(answer[0] if isinstance(answer, (list, tuple)) else answer)


def _summary(task: LoadedTask, entries: list[dict[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    config = task.config
    metrics = {name for entry in entries for name in entry.get("scores", ())}
    if config.metric != GOLD and config.metric not in metrics:
        raise UserError(
            f"evaluate.harness: {config.task} has no metric {config.metric!r}; it has {', '.join(sorted(metrics))}"
        )
    others = {name: _mean(entries, name).to_json() for name in sorted(metrics)}
    gold = [entry for entry in entries if "nats" in entry]
    if gold:
        others[GOLD] = _bits(gold, resamples, seed).to_json()
    choices = [entry["choices"] for entry in entries if "choices" in entry]
    is_gold = config.metric == GOLD
    return {
        "metric": "bits per byte of the right answer" if is_gold else config.metric,
        "higher_is_better": not is_gold,
        "score": others.pop(config.metric),
        "others": others,
        "chance": None if is_gold or not choices else float(np.mean([1 / number for number in choices])),
        "measures": f"{config.task} of the lm-evaluation-harness",
        "dataset_id": _dataset_id(task),
        "items": len(entries),
        "shots": max(int(leaf.config.num_fewshot or 0) for leaf in task.leaves.values()),
        "definition": config.definition,
        "harness": HARNESS,
    }


def _dataset_id(task: LoadedTask) -> str | None:
    """The one data set on the Hub that all items come from."""
    paths = {str(leaf.config.dataset_path) for leaf in task.leaves.values()}
    return next(iter(paths)) if len(paths) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", min(paths)) else None


def _mean(entries: list[dict[str, Any]], metric: str) -> Estimate:
    own = [entry for entry in entries if metric in entry.get("scores", ())]
    values, units = [entry["scores"][metric] for entry in own], [entry["unit"] for entry in own]
    if set(values) <= {0.0, 1.0}:
        return proportion([int(value) for value in values], units)
    return clustered_mean(np.array(values), units)


def _bits(entries: list[dict[str, Any]], resamples: int, seed: int) -> Estimate:
    sums: dict[str, tuple[float, float]] = {}
    for entry in entries:
        bits, size = sums.get(entry["unit"], (0.0, 0.0))
        sums[entry["unit"]] = bits + entry["nats"] / np.log(2), size + entry["bytes"]
    columns = np.array(list(sums.values()))
    return ratio_of_sums(columns[:, 0], columns[:, 1], resamples, seed)
