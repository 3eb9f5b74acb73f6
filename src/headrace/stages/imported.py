"""import: weights of foreign origin become a checkpoint that training goes on from. Not a stage: no stage asks for it.

    headrace import deepseek-ai/DeepSeek-V3-Base        a repository, or a folder in the Hub's layout
    snakemake --config set="... train.from=<fingerprint>@0"

It lies in `results/import/<fingerprint>/`, known by its source: `checkpoints/step-00000000`, weights alone, and
`imported.json`, the network and the hash of the tokenizer whose tokens the embedding means. Whatever is refused is
refused before anything is written. An import that was killed goes on behind the files it has finished.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.artifacts.files import hash_file, read_json, write_json
from headrace.checkpoint.reader import at_step, steps
from headrace.checkpoint.writer import clear_leftovers
from headrace.config.compose import group_to_dict
from headrace.config.schema import Config, ModelConfig
from headrace.errors import UserError
from headrace.reporting.runs import IMPORTED as FACTS
from headrace.stages import provenance
from headrace.stages.places import Place
from headrace.stages.run import held
from headrace.stages.table import fingerprint

KIND = "import"
CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer.json"
_VERSION = 1
_OF_NO_MATTER = {"initializer_range", "max_position_embeddings"}  # to weights that are there, and to training


def import_source(named: str, config: Config) -> Path:
    """Import a folder or repository, or verify the import of it that is there; returns its folder under `results`.

    Files of the checkpoint have at most `convert.max_shard_bytes` of weights, or one tensor that alone is larger.
    Raises `UserError` for whatever a model's folder must not hold, and for one without a tokenizer.
    """
    from headrace.conversion.import_hub import import_, open_for_import
    from headrace.conversion.source import locate
    from headrace.publication.incoming import inspect_incoming

    source = locate(named)
    inspect_incoming(source.folder)
    folder = open_for_import(source.folder)
    model = group_to_dict(folder.config)
    facts = {"model": model, "tokenizer": _tokenizer(source.folder), "source": _shown(source.identity)}
    of: dict[str, Any] = {"stage": KIND, "version": _VERSION, "config": {"sources": source.identity}, "parents": {}}
    place = Place(KIND, of, Path(config.paths.results) / KIND / fingerprint(of))
    place.folder.mkdir(parents=True, exist_ok=True)
    with held(place):
        checkpoints = place.folder / CHECKPOINTS
        if 0 in steps(checkpoints):
            at_step(checkpoints, 0)  # verifies every byte
            clear_leftovers(checkpoints)  # of an attempt that was killed when all was done
        else:
            state = {"fingerprint": place.fingerprint, "slice": of}
            provenance.write(place.folder, provenance.describe({}))
            import_(folder, checkpoints, state, config.convert.max_shard_bytes)
        write_json(place.folder / "stage.json", of)
        write_json(place.folder / FACTS, facts)
    return place.folder


def check_import(imported: Path, model: ModelConfig, tokenizer: Path, named: str) -> None:
    """Refuse an import of another network than `model`, or of another tokenizer than the artifact `tokenizer`."""
    facts, ours = read_json(imported / FACTS), group_to_dict(model)
    for key, value in facts["model"].items():
        if key not in _OF_NO_MATTER and value != ours[key]:
            raise UserError(f"{named}: its model.{key} is {value}, this run's {ours[key]}; set it as it is there")
    if facts["tokenizer"] != _tokenizer(tokenizer):
        raise UserError(
            f"{named}: it came with another tokenizer, so its embedding means other tokens; tokenize with its own, "
            "tokenizer=file tokenizer.path=<its tokenizer.json>"
        )


def origin(named: str | None, results: Path) -> str | None:
    """What `train.from` went on from, as a card names it: owner/name@commit, or a folder's or run's own name."""
    if named is None:
        return None
    path = results / KIND / named.partition("@")[0] / FACTS
    return str(read_json(path)["source"]) if path.exists() else named


def _shown(identity: Mapping[str, Any]) -> str:
    if "repository" in identity:
        return f"{identity['repository']}@{identity['commit']}"
    return Path(identity["folder"]).name  # not the path: it says where things lie on somebody's machine


def _tokenizer(folder: Path) -> str:
    path = folder / TOKENIZER
    if not path.is_file():
        raise UserError(f"{path}: no such file, so what its embedding means is unknown; put the model's own there")
    return hash_file(path, "sha256")
