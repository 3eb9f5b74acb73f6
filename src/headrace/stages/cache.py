"""A finished artifact from the Hub in place of running its stage (`launch.fetch`), and the way there (`publish.cache`).

Nothing that comes from elsewhere is believed: names, sizes and hashes are compared with the manifest, the manifest with
the fingerprint that was asked for, its inputs with the parents that are here. Only then one rename makes it the stage's
artifact. Whatever is missing, damaged or out of reach costs one line, and the stage runs as ever.
"""

import errno
from collections.abc import Mapping
from pathlib import Path

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import read_json, sync_file, write_json
from headrace.artifacts.manifest import Manifest
from headrace.config.schema import Config
from headrace.errors import UserError
from headrace.stages.places import Place
from headrace.stages.table import stage_named

_ARTIFACT, _PROVENANCE = "artifact", "provenance.json"
_FACTS = {"code", "versions", "machine", "seeds", "seconds", "finished", "made"}  # what the report reads of each stage


def take(repo_id: str, place: Place, parents: Mapping[str, Place]) -> tuple[bool, str]:
    """Bring the stage's artifact from the cache `repo_id`, where it is there and whole.

    Returns whether `place.artifact` is there now, and what to say. A full disk is an error, as it is for the stage.
    """
    # Here: no other stage has a use for the Hub's client, and it takes a second to import.
    from headrace.publication.cache import fetch

    staging = place.folder / "fetched.partial"
    try:
        entry = fetch(repo_id, f"{place.stage}/{place.fingerprint}", staging)
        if entry is None:
            return False, f"not in {repo_id} as far as this token sees, so it runs"
        _accept(entry, repo_id, place, parents)
        line = f"fetched from {repo_id}, verified"
        taken = True
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A manifest's complaint ends with a remedy for what lies here; this is about to be removed.
        reason = str(error).strip().partition("\n")[0].partition(";")[0][:200] or type(error).__name__
        taken, line = False, f"launch.fetch={repo_id}: not taken ({reason}), so it runs"
    manifests.discard(staging)
    return taken, line


def fetched(config: Config, place: Place, found: Mapping[str, Place]) -> tuple[bool, str]:
    """`take` from `launch.fetch`, where that is set and may hold the stage; else there is nothing to say ("").

    `found` are the places of all stages.
    """
    repo_id = config.launch.fetch
    if repo_id is None or place.stage not in stage_named("publish").parents:  # others are never put there
        return False, ""
    return take(repo_id, place, {name: found[name] for name in place.slice["parents"]})


def files_of(place: Place, manifest: Manifest) -> dict[str, Path]:
    """What the cache keeps of a finished stage: path there, and the file here."""
    names = [*manifest.files, manifests.NAME]
    return {f"{_ARTIFACT}/{name}": place.artifact / name for name in names} | {_PROVENANCE: place.folder / _PROVENANCE}


def _accept(entry: Path, repo_id: str, place: Place, parents: Mapping[str, Place]) -> None:
    """Verify what was fetched and make it the stage's artifact; raises `UserError` for what is wrong with it."""
    artifact, facts = entry / _ARTIFACT, read_json(entry / _PROVENANCE)
    manifest = manifests.verify(artifact)
    if not isinstance(facts, dict) or not facts.keys() >= _FACTS:
        raise UserError(f"{_PROVENANCE} lacks what a stage records")
    asked = {"stage": place.stage, "version": place.slice["version"], "fingerprint": place.fingerprint}
    if manifest.producer != asked:
        raise UserError(f"{manifests.NAME} belongs to {manifest.producer}")
    for name, made_from in manifest.inputs.items():
        here = parents[name].artifact if name in parents else None
        if here is not None and here.exists() and manifests.read(here).hash != made_from:
            raise UserError(f"it was made from another {name} than the one here")
    for name in (*manifest.files, manifests.NAME):
        sync_file(artifact / name)
    # Before the commit, as when the stage runs: whoever finds the artifact finds its provenance.
    write_json(place.folder / _PROVENANCE, {**facts, "fetched": repo_id})
    manifests.commit(artifact, place.artifact)
