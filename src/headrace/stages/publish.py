"""publish: the converted model as a repository with card and scores, in a local folder and, where asked, on the Hub.

Without `publish.repo_id` this is a dry run: the exact tree that would go out is written and listed, nothing is sent.
Where `publish.dataset` names a data set repository, the token shards go there. Where `publish.cache` names one, so do
the artifacts of all stages before this one, for other machines to fetch (`launch.fetch`) instead of making them. Where
`publish.checkpoints` names a bucket, the checkpoints that training has kept are listed, and pushed with the model.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import read_json, write_json
from headrace.config.schema import Config, PublishConfig
from headrace.conversion.export import INDEX
from headrace.conversion.fp8_layout import cuts_blocks, fp8_weights
from headrace.conversion.hub_config import CONFIG
from headrace.conversion.names import hub_tensors
from headrace.errors import UserError
from headrace.planning.describe import run_flops
from headrace.planning.parameters import count
from headrace.publication.cache import Stored, store
from headrace.publication.checkpoints import kept_checkpoints, push_checkpoints
from headrace.publication.facts import CardFacts, DataSource, Measurement
from headrace.publication.hub import DATASET, KERNEL, push
from headrace.publication.kernels import KernelRepository, build_kernel_repositories, sources
from headrace.publication.repository import build_repository
from headrace.publication.token_dataset import DatasetFacts, build_dataset
from headrace.stages import provenance
from headrace.stages.cache import files_of
from headrace.stages.convert import trained_state
from headrace.stages.evaluate import rows_read
from headrace.stages.imported import origin
from headrace.stages.pretrain import checkpoints
from headrace.stages.run import Door, Outcome, Run, main

PUBLICATION = "publication.json"


def body(run: Run) -> Outcome:
    """Build and inspect the trees of model and kernels; push them where `publish.repo_id` names a repository."""
    settings = run.config.publish
    trained = read_json(run.parents["pretrain"].folder / "provenance.json")["code"]
    if (provenance.code_version()["dirty"] or trained["dirty"]) and not settings.allow_dirty:
        _refuse_dirty(settings)
    results = run.input("evaluate") / "results.json"
    repository = repository_of(run.output)
    files = build_repository(repository, run.input("convert"), card_facts(run), results=results)
    owner = settings.kernels
    kernels = build_kernel_repositories(run.output / "kernels", owner, sources()) if owner else []
    kept = _kept(run, settings.checkpoints) if settings.checkpoints else []
    listed = [_kernel_facts(one) for one in kernels]
    facts: dict[str, Any] = {"repo_id": settings.repo_id, "commit": None, "tag": None, "files": files}
    where = "local folder"
    if settings.repo_id:
        pushed = push(
            repository, settings.repo_id, private=settings.private, message=f"{settings.title} {run.place.fingerprint}"
        )
        facts = asdict(pushed)
        where = f"{pushed.url} at {pushed.tag}"
        if not pushed.changed:
            where += ", which holds this fingerprint already: nothing to do"
        listed = [known | _push_kernel(one, settings.private) for known, one in zip(listed, kernels, strict=True)]
    else:
        print_tree(run.output, [repository, *(one.folder for one in kernels)])
        print_tree(run.parents["pretrain"].folder, kept)
    if kernels:
        where += f"; {len(kernels)} kernel repositories of {owner}"
    data = _push_dataset(run, settings.dataset) if settings.dataset else None
    cached = _store(run, settings.cache) if settings.cache else {}
    if cached:
        where += f"; {list(cached.values()).count('pushed')} of {len(cached)} artifacts new in {settings.cache}"
    stored: dict[str, Stored] = {}
    if settings.checkpoints and settings.repo_id:
        entry = run.parents["pretrain"].fingerprint
        stored = push_checkpoints(settings.checkpoints, entry, kept, private=settings.private)
        where += f"; {list(stored.values()).count('pushed')} of {len(kept)} checkpoints new in {settings.checkpoints}"
    others = {"kernels": listed, "dataset": data, "cache": cached, "checkpoints": stored}
    write_json(run.output / PUBLICATION, {**facts, **others})
    size = sum(path.stat().st_size for path in repository.rglob("*") if path.is_file())
    summary = {"repo_id": settings.repo_id, "files": len(files), "bytes": size}
    return Outcome(f"{len(files)} files, {size / 1e6:,.1f} MB, {where}", summary)


def _refuse_dirty(settings: PublishConfig) -> None:
    """What others load names the code that made it; a local folder may be made of anything."""
    pushes = {"repo_id": settings.repo_id, "dataset": settings.dataset, "cache": settings.cache}
    if named := next((f"publish.{key}={value}" for key, value in pushes.items() if value), None):
        raise UserError(
            f"{named}: the code that made this has uncommitted changes; commit them and run it again, or set "
            "publish.allow_dirty=true"
        )


def _kept(run: Run, bucket: str) -> list[Path]:
    folder = checkpoints(run.parents["pretrain"].folder)
    if found := kept_checkpoints(folder):
        return found
    raise UserError(f"publish.checkpoints={bucket}: {folder} holds none; publish where the run was trained")


def print_tree(output: Path, folders: Sequence[Path]) -> None:
    """Every file that would go out, with its size in bytes, one to a line, on the terminal."""
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"  {path.stat().st_size:>15,}  {path.relative_to(output)}", file=sys.stderr)
    sys.stderr.flush()


def _push_dataset(run: Run, repo_id: str) -> dict[str, Any]:
    """Publish the token shards; the tree is made anew where an earlier attempt was cut off, and is then the same."""
    config, tree = run.config, run.folder / "dataset.partial"
    made = read_json(run.parents["tokenize"].folder / "provenance.json")
    facts = DatasetFacts(
        title=config.publish.title,
        license=config.publish.license,
        repo_id=repo_id,
        model=config.publish.repo_id,
        fingerprint=run.place.fingerprint,
        view=config.publish.dataset_view,
        sources=list(data_sources(read_json(run.input("corpus") / "corpus.json"))),
        versions=made["versions"],
        code_version=_code_version(made["code"]),
        command=run.command,
    )
    manifests.discard(tree)
    build_dataset(tree, run.input("tokenize"), facts)
    message = f"{facts.title}: tokens, {facts.fingerprint}"
    pushed = push(tree, repo_id, private=config.publish.private, message=message, kind=DATASET)
    manifests.discard(tree)
    return asdict(pushed)


def _store(run: Run, repo_id: str) -> dict[str, Stored]:
    """Put every stage before this one into the cache `repo_id`, in the order in which they were made."""
    found: dict[str, Stored] = {}
    for name, place in run.parents.items():
        files = files_of(place, manifests.verify(place.artifact))
        found[name] = store(repo_id, f"{place.stage}/{place.fingerprint}", files)
    return found


def _kernel_facts(one: KernelRepository) -> dict[str, Any]:
    """What publication.json says of a kernel repository; commit and tag are None where it was not pushed."""
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
        command=run.command,
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
        yield DataSource(name, source_licence(name, packages), entry["documents"], entry["bytes"])


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
