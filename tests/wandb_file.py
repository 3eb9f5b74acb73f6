"""Read W&B's `.wandb` files: LevelDB's log framing around protocol buffers.

A 7-byte file header, then blocks of 32 KiB; a record is one or more chunks, each with a header of CRC-32 (4 bytes),
length (2) and type (1): 1 whole, 2 first, 3 middle, 4 last. Fewer than 7 bytes at a block's end are padding.
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, 7


@dataclass
class WandbRun:
    """What one fragment holds."""

    run_id: str = ""
    group: str = ""
    job_type: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)  # name, type, aliases
    exit_code: int | None = None


def read_wandb(path: Path) -> WandbRun:
    run = WandbRun()
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.group = record.run.run_id, record.run.run_group
            run.job_type, run.project = record.run.job_type, record.run.project
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            run.history.append({key: json.loads(value) for key, value in items.items()})
        elif kind == "summary":
            for item in record.summary.update:
                run.summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        elif kind == "request" and record.request.HasField("log_artifact"):
            made = record.request.log_artifact.artifact
            run.artifacts.append((made.name, made.type, tuple(sorted(made.aliases))))
        elif kind == "artifact":
            run.artifacts.append((record.artifact.name, record.artifact.type, tuple(sorted(record.artifact.aliases))))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _records(data: bytes) -> list[bytes]:
    assert data[:4] == b":W&B"
    position, parts, records = _HEADER, b"", []
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _HEADER
        parts += data[position : position + length]
        position += length
        if kind in (1, 4):
            records.append(parts)
            parts = b""
    return records
