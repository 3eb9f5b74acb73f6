"""Training checkpoints in a bucket: storage on the Hub that may change, for what is large and soon out of date.

    <fingerprint of pretrain>/step-00000100/model-00000.safetensors, ... slices.json, state.json
                                            manifest.json, last: a folder without it is no checkpoint

A bucket has no commits, so order does what a commit does for a repository: all files but the manifest, a look at what
the bucket holds then, the manifest, a look again. Whoever reads meanwhile finds a whole checkpoint or none, and the
next push ends one that was cut off. Files are compared by Xet's hash, which the bucket tells of each and hf_xet
computes here from the bytes: what is there is not sent. Where a checkpoint of the same name has another manifest, as
of another machine, that one stays. Retention here removes nothing there.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hf_xet import XetAuthenticationError, hash_files
from huggingface_hub import BucketFile, HfApi

from headrace.artifacts.manifest import NAME
from headrace.checkpoint.reader import at_step, steps
from headrace.errors import UserError
from headrace.publication.cache import Stored
from headrace.publication.gate import inspect_checkpoint
from headrace.publication.hub import writing_client

_REFUSED = re.compile(r"\((401|403) ")  # how hf_xet tells the Hub's answer


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that retention has left under `folder`, by step; verified byte by byte, and through the gate.

    Raises `UserError` that names the first file which is damaged or may not go out.
    """
    found = [at_step(folder, step).folder for step in steps(folder)]
    for checkpoint in found:
        inspect_checkpoint(checkpoint)
    return found


def push_checkpoints(
    bucket: str, entry: str, checkpoints: Sequence[Path], *, private: bool, endpoint: str | None = None
) -> dict[str, Stored]:
    """Bring checkpoints into the folder `entry` of a bucket, which is made, private, where it is missing.

    Returns for each `pushed`, `there`, or `another` where the bucket holds another one of this name. Raises what
    `hub.push` raises; what is whole in the bucket then stays whole.
    """
    where = f"publish.checkpoints={bucket}"
    hashes = {checkpoint: _hashes(checkpoint) for checkpoint in checkpoints}
    with writing_client(where, endpoint) as api:
        api.create_bucket(bucket, private=True, exist_ok=True)
        if private and not api.bucket_info(bucket).private:
            raise UserError(
                f"{where}: is public, and publish.private is true; make it private there, or set publish.private=false"
            )
        return {
            path.name: _Push(api, bucket, f"{entry}/{path.name}", path, known, where).run()
            for path, known in hashes.items()
        }


def _hashes(checkpoint: Path) -> dict[str, str]:
    names = inspect_checkpoint(checkpoint)
    found = hash_files([str(checkpoint / name) for name in names])
    return {name: one.hash for name, one in zip(names, found, strict=True)}


@dataclass(frozen=True)
class _Push:
    """One checkpoint on its way to the folder `entry`."""

    api: HfApi
    bucket: str
    entry: str
    folder: Path
    hashes: Mapping[str, str]  # Xet's, of every file
    where: str  # how messages begin

    def run(self) -> Stored:
        there = self._listed()
        differing = self._differing(there)
        if NAME in differing and NAME in there:
            return "another"
        stray = sorted(there.keys() - self.hashes.keys())
        if not differing and not stray:
            return "there"
        if NAME in there:  # somebody changed files under it: until they are right again, there is no checkpoint
            self._send([], [NAME])
        self._send(sorted(differing - {NAME}), stray)
        self._compare({NAME})
        self._send([NAME], [])
        self._compare(set())
        return "pushed"

    def _listed(self) -> dict[str, str]:
        """Xet's hash of every file of the folder."""
        found = self.api.list_bucket_tree(self.bucket, self.entry, recursive=True)
        files = [one for one in found if isinstance(one, BucketFile) and one.path.startswith(f"{self.entry}/")]
        return {one.path.removeprefix(f"{self.entry}/"): one.xet_hash for one in files}

    def _differing(self, there: Mapping[str, str]) -> set[str]:
        return {name for name, known in self.hashes.items() if there.get(name) != known}

    def _send(self, names: Collection[str], gone: Collection[str]) -> None:
        add: list[tuple[str | Path | bytes, str]] = [(self.folder / name, f"{self.entry}/{name}") for name in names]
        try:
            self.api.batch_bucket_files(self.bucket, add=add, delete=[f"{self.entry}/{name}" for name in gone])
        except (ConnectionError, TimeoutError, XetAuthenticationError) as error:
            self._explain(error)

    def _explain(self, error: OSError) -> NoReturn:
        """hf_xet's errors, which tell the Hub's answer as text only."""
        reason = str(error).partition("\n")[0]
        if isinstance(error, XetAuthenticationError) or _REFUSED.search(reason):
            raise UserError(f"{self.where}: this token may not write there ({reason}); use one with write access")
        raise ConnectionError(f"{self.where}: the upload failed ({reason}); publish again") from error

    def _compare(self, not_yet: Collection[str]) -> None:
        there = self._listed()
        wrong = (self._differing(there) | (there.keys() - self.hashes.keys())) - set(not_yet)
        if wrong:
            raise ConnectionError(f"{self.where}: {self.entry}/{min(wrong)} is not as it was sent; publish again")
