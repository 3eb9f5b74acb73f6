"""The lock that belongs to a configuration, which is part of the corpus' fingerprint.

It lies under `results/locks/`, named after the settings that say which files the corpus has, so that other filters or
fractions hash nothing again. The first run makes it; afterwards the files must stay as they were, until
`headrace index` takes the new text over.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from headrace.config.schema import Config
from headrace.corpus.lock import Lock, ensure, index, read, source_settings


def lock_path(config: Config) -> Path:
    """Where the lock of this corpus lies."""
    canonical = json.dumps(source_settings(config.corpus))
    name = f"{config.corpus.source}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}.lock"
    return Path(config.paths.results) / "locks" / name


def checked_lock(config: Config, overrides: Sequence[str]) -> tuple[Lock, list[str]]:
    """The lock and the names of new files that it lacks; a changed or missing source is a `UserError`."""
    return ensure(config.corpus, lock_path(config), overrides)


def known_lock(config: Config) -> Lock:
    """The lock as it stands, made where it is missing; the files are not looked at."""
    path = lock_path(config)
    return read(path) if path.exists() else index(config.corpus, path)
