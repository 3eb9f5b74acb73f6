"""`headrace runs`: every run directory under results/, from its own files alone.

What differs from the defaults is computed against the slice that bare `snakemake` would use, so a row shows just the
settings that make this run another one.
"""

from pathlib import Path
from typing import Any

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import read_json
from headrace.config.compose import load, to_dict
from headrace.errors import UserError

IMPORTED = "imported.json"
"""What an import, which is no stage and has no artifact, is finished with."""
_COLUMNS = ("stage", "id", "state", "differs from the defaults", "key figures")


def table(results: Path) -> str:
    """A text table of all runs in the order in which they were begun."""
    defaults = to_dict(load())
    rows = [_row(folder, defaults) for folder in _runs(results)]
    if not rows:
        return f"{results}: nothing here yet; `snakemake` makes the first run"
    widths = [max(len(row[column]) for row in [_COLUMNS, *rows]) for column in range(4)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
             for row in [_COLUMNS, *rows]]  # fmt: skip
    return "\n".join(lines)


def differences(values: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[str]:
    """`key=value` for every leaf of `values` that `defaults` lacks or has otherwise."""
    found = []
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            found += differences(value, default, f"{prefix}{key}.")
        elif value != default:
            found.append(f"{prefix}{key}={_short(value)}")
    return found


def _row(folder: Path, defaults: dict[str, Any]) -> tuple[str, ...]:
    stage_slice = read_json(folder / "stage.json")
    values = {key: value for key, value in stage_slice["config"].items() if key != "sources"}
    differing = " ".join(differences(values, defaults)) or "-"
    state, figures = "unfinished", "-"
    if (folder / "artifact").exists():
        try:
            summary = manifests.read(folder / "artifact").summary
            state, figures = "done", " ".join(f"{key}={_short(value)}" for key, value in summary.items())
        except UserError:
            state = "damaged"
    elif (folder / IMPORTED).exists():
        state = "done"
    return stage_slice["stage"], folder.name, state, _clip(differing, 60), figures


def _runs(results: Path) -> list[Path]:
    slices = [path for path in results.glob("*/*/stage.json") if path.parts[-3] != "latest"]
    return [path.parent for path in sorted(slices, key=lambda path: path.stat().st_mtime)]


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value).replace(" ", "")


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
