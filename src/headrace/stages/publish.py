"""publish: the converted model as a repository with card and scores, in a local folder and, where asked, on the Hub.

`publish.repo_id`, `kernels` and `dataset` name where model, kernels and token shards go, `cache` where the artifacts of
all stages before this one go, for other machines to fetch (`launch.fetch`) instead of making them, and `checkpoints`
the bucket of the checkpoints that training has kept. All of it is built and inspected first. `publish.push` is the one
go-ahead: without it the exact trees that would go out are kept here, or left where they lie, and listed.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import read_json, write_json
from headrace.config.schema import Config
from headrace.conversion.export import INDEX
from headrace.conversion.fp8_layout import cuts_blocks, fp8_weights
from headrace.conversion.hub_config import CONFIG
from headrace.conversion.names import hub_tensors
from headrace.errors import UserError
from headrace.planning.describe import run_flops
from headrace.planning.parameters import count
from headrace.publication.cache import store
from headrace.publication.checkpoints import kept_checkpoints, push_checkpoints
from headrace.publication.facts import CardFacts, DataSource, Measurement
from headrace.publication.hub import DATASET, KERNEL, push
from headrace.publication.kernels import KernelRepository, build_kernel_repositories, sources
from headrace.publication.local_paths import base_name, without_folders
from headrace.publication.repository import build_repository
from headrace.publication.token_dataset import DatasetFacts, build_dataset
from headrace.stages import provenance
from headrace.stages.cache import files_of
from headrace.stages.convert import trained_state
from headrace.stages.evaluate import rows_read
from headrace.stages.imported import origin
from headrace.stages.places import Place
from headrace.stages.pretrain import checkpoints
from headrace.stages.run import Door, Outcome, Run, command_for, main
from headrace.stages.table import fingerprint

PUBLICATION = "publication.json"


@dataclass(frozen=True)
class _Built:
    """What may go out, inspected; what the settings do not name is empty."""

    model: Path
    files: list[str]
    kernels: list[KernelRepository]
    dataset: Path | None
    dataset_files: list[str]
    cache: dict[str, dict[str, Path]]  # by stage: path below `<stage>/<fingerprint>` there, and the file here
    checkpoints: list[Path]


def body(run: Run) -> Outcome:
    """Build and inspect all that the settings name; send it with `publish.push`, list it without."""
    settings = run.config.publish
    if settings.push and not settings.allow_dirty:
        _refuse_unknown_code(run)
    built = _build(run)
    told: dict[str, Any] = {
        **_unsent(settings.repo_id, built.files),
        "kernels": [_kernel_facts(one) for one in built.kernels],
        "dataset": _unsent(settings.dataset, built.dataset_files) if settings.dataset else None,
        "cache": {},
        "checkpoints": {},
    }
    if settings.push:
        sent, where = _push(run, built)
        told |= sent
    else:
        _list(run, built)
        where = "local folder"
        if built.kernels:
            where += f"; {len(built.kernels)} kernel repositories of {settings.kernels}"
        if any((settings.repo_id, settings.kernels, settings.dataset, settings.cache, settings.checkpoints)):
            where += "; nothing is sent without publish.push=true"
    write_json(run.output / PUBLICATION, told)
    size = sum(path.stat().st_size for path in built.model.rglob("*") if path.is_file())
    summary = {"repo_id": told["repo_id"] if told["commit"] else None, "files": len(built.files), "bytes": size}
    return Outcome(f"{len(built.files)} files, {size / 1e6:,.1f} MB, {where}", summary)


def _refuse_unknown_code(run: Run) -> None:
    """What others load names the code that made it, stage by stage; a local folder may be made of anything."""
    codes: dict[str, tuple[dict[str, Any] | None, str]] = {"the code at work": (provenance.code_version(), "")}
    for folder, code in provenance.codes(place.folder for place in run.parents.values()).items():
        codes[f"the code that made {folder}"] = code, ", move that folder away and make it again"
    for what, (code, again) in codes.items():
        if code is None:
            wrong = "is unknown, since nothing there tells; make it again"
        elif code["dirty"]:
            wrong = f"has uncommitted changes; commit them{again}"
        elif code["commit"] is None:
            wrong = f"is of an unknown commit; use a git checkout of Headrace that git can read{again}"
        else:
            continue
        raise UserError(f"publish.push=true: {what} {wrong}, or set publish.allow_dirty=true")


def _build(run: Run) -> _Built:
    settings, model = run.config.publish, repository_of(run.output)
    results = run.input("evaluate") / "results.json"
    files = build_repository(model, run.input("convert"), card_facts(run), results=results)
    dataset = run.output / "dataset" if settings.dataset else None
    cached = run.parents.items() if settings.cache else ()
    return _Built(
        model,
        files,
        build_kernel_repositories(run.output / "kernels", settings.kernels, sources()) if settings.kernels else [],
        dataset,
        build_dataset(dataset, run.input("tokenize"), _dataset_facts(run)) if dataset else [],
        {name: files_of(place, manifests.verify(place.artifact)) for name, place in cached},
        _kept(run, settings.checkpoints) if settings.checkpoints else [],
    )


def _kept(run: Run, bucket: str) -> list[Path]:
    folder = checkpoints(run.parents["pretrain"].folder)
    if found := kept_checkpoints(folder):
        return found
    raise UserError(f"publish.checkpoints={bucket}: {folder} holds none; publish where the run was trained")


def _list(run: Run, built: _Built) -> None:
    """Every file that would go out, with its size in bytes, one to a line, on the terminal."""
    trees = [built.model, *(one.folder for one in built.kernels), *([built.dataset] if built.dataset else [])]
    trained = run.parents["pretrain"].folder
    shown = [(path.relative_to(run.output), path) for tree in trees for path in sorted(tree.rglob("*"))]
    for name, files in built.cache.items():
        entry = Path("cache", _entry(run.parents[name]))
        shown += [(entry / inside, path) for inside, path in sorted(files.items())]
    shown += [(path.relative_to(trained), path) for one in built.checkpoints for path in sorted(one.rglob("*"))]
    for named, path in shown:
        if path.is_file():
            print(f"  {path.stat().st_size:>15,}  {named}", file=sys.stderr)
    sys.stderr.flush()


def _push(run: Run, built: _Built) -> tuple[dict[str, Any], str]:
    """Send all that is named; returns what publication.json says of it, and where it went, for people."""
    settings, sent, where = run.config.publish, dict[str, Any](), "local folder"
    private = settings.private
    if settings.repo_id:
        message = f"{settings.title} {run.place.fingerprint}"
        pushed = push(built.model, settings.repo_id, private=private, message=message)
        sent |= asdict(pushed)
        where = f"{pushed.url} at {pushed.tag}"
        if not pushed.changed:
            where += ", which holds this fingerprint already: nothing to do"
    if built.kernels:
        sent["kernels"] = [_kernel_facts(one) | _push_kernel(one, private) for one in built.kernels]
        where += f"; {len(built.kernels)} kernel repositories of {settings.kernels}"
    if built.dataset and settings.dataset:
        message = f"{settings.title}: tokens, {_dataset_fingerprint(run)}"
        data = push(built.dataset, settings.dataset, private=private, message=message, kind=DATASET)
        manifests.discard(built.dataset)  # it may be as large as the tokens
        sent["dataset"] = asdict(data)
        where += f"; tokens in {settings.dataset} at {data.tag}"
    if settings.cache:
        stored = {name: store(settings.cache, _entry(run.parents[name]), files) for name, files in built.cache.items()}
        sent["cache"] = stored
        where += f"; {list(stored.values()).count('pushed')} of {len(stored)} artifacts new in {settings.cache}"
    if settings.checkpoints:
        entry, kept = run.parents["pretrain"].fingerprint, built.checkpoints
        stored = push_checkpoints(settings.checkpoints, entry, kept, private=private)
        sent["checkpoints"] = stored
        where += f"; {list(stored.values()).count('pushed')} of {len(kept)} checkpoints new in {settings.checkpoints}"
    return sent, where


def _entry(place: Place) -> str:
    """A stage's folder in the cache."""
    return f"{place.stage}/{place.fingerprint}"


def _unsent(repo_id: str | None, files: list[str]) -> dict[str, Any]:
    """What publication.json says of a repository that nothing was sent to."""
    return {"repo_id": repo_id, "commit": None, "tag": None, "files": files}


def _dataset_facts(run: Run) -> DatasetFacts:
    """What the card of the token shards says."""
    settings = run.config.publish
    made = read_json(run.parents["tokenize"].folder / "provenance.json")
    return DatasetFacts(
        title=settings.title,
        license=settings.license,
        repo_id=settings.dataset,
        model=settings.repo_id,
        fingerprint=_dataset_fingerprint(run),
        view=settings.dataset_view,
        sources=list(data_sources(read_json(run.input("corpus") / "corpus.json"))),
        versions=made["versions"],
        code_version=_code_version(made["code"]),
        command=_shared_command(run),
    )


def _dataset_fingerprint(run: Run) -> str:
    """Of the shards, their view and their card: what else the run evaluates and publishes changes none of them."""
    settings = run.config.publish
    said = {key: getattr(settings, key) for key in ("dataset_view", "title", "license", "repo_id")}
    return fingerprint({"tokenize": run.parents["tokenize"].fingerprint, **said})


def _shared_command(run: Run) -> str:
    """The run's command for others: without this machine's folders, and pushing nothing."""
    return command_for([without_folders(word) for word in run.overrides if not word.startswith("publish.push=")])


def _kernel_facts(one: KernelRepository) -> dict[str, Any]:
    """What publication.json says of a kernel repository that was not pushed."""
    facts = {"repo_id": one.repo_id, "branch": one.branch, "fingerprint": one.fingerprint, "loadable": one.loadable}
    return {**facts, "commit": None, "tag": None, "files": one.files}


def _push_kernel(one: KernelRepository, private: bool) -> dict[str, Any]:
    message = f"{one.folder.name} {one.fingerprint}"
    return asdict(push(one.folder, one.repo_id, private=private, message=message, kind=KERNEL, branch=one.branch))


def card_facts(run: Run) -> CardFacts:
    """What the model card says, from the artifacts of the run."""
    config, parameters = run.config, count(run.config.model)
    corpus, training = (
        read_json(run.input("corpus") / "corpus.json"),
        read_json(run.input("pretrain") / "training.json"),
    )
    results = read_json(run.input("evaluate") / "results.json")
    trained = read_json(run.parents["pretrain"].folder / "provenance.json")
    seen, tensors = trained_state(run), hub_tensors(config.model)
    return CardFacts(
        title=config.publish.title,
        license=config.publish.license,
        repo_id=config.publish.repo_id,
        fingerprint=run.place.fingerprint,
        config=read_json(run.input("convert") / CONFIG),
        parameters=parameters.total + parameters.mtp,
        parameters_activated=parameters.activated,
        parameters_mtp=parameters.mtp,
        tokens=seen["tokens"],
        sequence_lengths=list(rows_read(run)),
        flops=run_flops(config, seen["step"]),
        seconds=seen["seconds"],
        hardware=f"{trained['machine']['processor']}, {training['threads']} threads, {training['device']}",
        precision=training["precision"],
        dtype=config.convert.dtype,
        weight_bytes=read_json(run.input("convert") / INDEX)["metadata"]["total_size"],
        cuts_blocks=config.convert.dtype == "fp8"
        and cuts_blocks(tensors, fp8_weights(tensors, config.convert.unaligned)),
        optimizer=config.recipe.optimizer.name,
        sources=list(data_sources(corpus)),
        measurements=list(measurements(results)),
        versions=trained["versions"],
        code_version=_code_version(trained["code"]),
        command=_shared_command(run),
        languages=["en", "code"] if config.corpus.source == "environment" else [],
        origin=origin(config.train.from_, run.place.folder.parents[1]),
        limits=list(_limits(config)),
    )


def _limits(config: Config) -> Iterator[str]:
    """What else to know of the weights."""
    if config.convert.weights == "ema":
        decay = config.recipe.ema_decay
        yield f"The weights are the moving average of those in training, with a decay of {decay} a step."


def _code_version(code: dict[str, Any]) -> str:
    return f"{code['commit'] or 'no commit'}{' with uncommitted changes' if code['dirty'] else ''}"


def data_sources(corpus: dict[str, Any]) -> Iterator[DataSource]:
    """Training sources with their licences, largest first."""
    packages = (corpus.get("environment") or {}).get("packages", {})
    sources = corpus["splits"]["train"]["sources"]
    for name, entry in sorted(sources.items(), key=lambda item: -item[1]["bytes"]):
        yield DataSource(base_name(name), source_licence(name, packages), entry["documents"], entry["bytes"])


def source_licence(name: str, packages: dict[str, Any]) -> str:
    """The licence that a source declares; the standard library's is Python's own."""
    if name == "stdlib":
        return "PSF-2.0"
    package = packages.get(name.removeprefix("packages/"))
    return str(package["licence"]) if package else "not declared"


def measurements(results: dict[str, Any]) -> Iterator[Measurement]:
    """Bits per byte by kind and the tasks' scores, as the card's table shows them.

    A task that names its data set on the Hub (`dataset_id`) gets a file in `.eval_results/` too.
    """
    for kind, entry in results["bits_per_byte"]["kinds"].items():
        models = entry["models"]
        baselines = {name: other["value"] for name, other in models.items() if name != "model"}
        own = models["model"]
        yield Measurement(
            f"Bits per byte, {kind}", f"held-out text, {kind}", None, "bits_per_byte",
            own["value"], own["low"], own["high"], entry["documents"], baselines,
        )  # fmt: skip
    for name, task in results["tasks"].items():
        chance = {"chance": task["chance"]} if task["chance"] is not None else {}
        score = task["score"]
        yield Measurement(
            name, task["measures"], task.get("dataset_id"), task["metric"],
            score["value"], score["low"], score["high"], task["items"], chance,
        )  # fmt: skip


def repository_of(artifact: Path) -> Path:
    """The tree that goes to the Hub."""
    return artifact / "repository"


DOOR = Door("publish", body, algorithm="sha256")

if __name__ == "__main__":
    sys.exit(main(DOOR))
