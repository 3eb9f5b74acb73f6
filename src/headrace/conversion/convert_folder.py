"""One Hub folder to another of the same model: FP8 to BF16 or FP32, and these to FP8, without a GPU.

    FP8 -> FP32          exact: code * scale, rounded to FP32 once
    FP8 -> BF16          that product rounded to BF16
    BF16, FP32 -> FP8    quantised as an export is (`export.py`)
    BF16 -> BF16         bit by bit, into other files

FP8 to BF16 and back gives the same codes in every block whose largest code is 448, as amax / 448 makes it, and scales
within 2^-8 of what they were: BF16 rounds each value by at most 2^-8 of it, the largest among them, so what is encoded
again is off by at most 2^-7, less than half a step of E4M3, 1/30. By FP32 the way back is exact (see `export.py`).

The configuration is copied, but for the keys that say the format; so are the tokenizer and what `COPIED` names. Code
is not, not even the code that a release names in its `auto_map`.
"""

import re
import shutil
from pathlib import Path

from headrace.artifacts.files import sync_file, write_json
from headrace.config.schema import ModelConfig
from headrace.conversion.fp8_layout import Unaligned
from headrace.conversion.hub_config import CONFIG, Dtype, converted_config
from headrace.conversion.hub_folder import HubFolder, open_hub_folder
from headrace.conversion.shards import Exported, Plan, Record, begin, plan_folder, write_shards
from headrace.conversion.special_tokens import copy_tokenizer, read_special_tokens
from headrace.errors import UserError

COPIED = re.compile(
    r"generation_config\.json|special_tokens_map\.json|chat_template\.jinja|(?:LICEN[SC]E|NOTICE)[\w.-]*", re.ASCII
)
"""Files beside weights and tokenizer that go along, byte for byte. transformers keeps a chat template in its own."""


def plan_conversion(
    source: Path, dtype: Dtype, max_shard_bytes: int, unaligned: Unaligned = "deepseek"
) -> tuple[HubFolder, Plan]:
    """Open the Hub folder `source` and plan what it becomes; nothing is written.

    unaligned, max_shard_bytes: see `plan_folder`. Memory: a band of two tensors. Raises `UserError` for whatever
    `open_hub_folder` refuses, for FP8 to FP8, and for copies of the MTP module that differ from what they repeat.
    """
    folder = open_hub_folder(source, released=True)
    read_special_tokens(source, folder.config.vocab_size)
    if dtype == "fp8" and folder.is_fp8:
        raise UserError(f"{source}: is FP8 already; use convert.dtype=bf16 or convert.dtype=fp32")
    plan = plan_folder(folder.tensors, dtype, unaligned, max_shard_bytes)
    folder.check_copies()
    return folder, plan


def write_conversion(folder: HubFolder, plan: Plan, out: Path, record: Record | None = None) -> None:
    """Write `out` (new or empty). record: of a conversion that may have begun, see `shards.py`.

    Memory: one tensor and a band of it. Raises `UserError` for values that are not finite, by name.
    """
    begin(plan, out, record)
    write_shards(plan, folder, out, record)
    write_json(out / CONFIG, converted_config(folder.path, plan.dtype, plan.quantization))
    copy_tokenizer(folder.path, out)
    for path in folder.path.iterdir():
        if COPIED.fullmatch(path.name) and path.is_file():
            shutil.copyfile(path, out / path.name)
            sync_file(out / path.name)


def convert_folder(
    source: Path,
    out: Path,
    dtype: Dtype,
    max_shard_bytes: int,
    unaligned: Unaligned = "deepseek",
    record: Record | None = None,
) -> tuple[ModelConfig, Exported]:
    """Plan and write in one: `out` from the Hub folder `source`; returns its network and what was written."""
    folder, plan = plan_conversion(source, dtype, max_shard_bytes, unaligned)
    write_conversion(folder, plan, out, record)
    return folder.config, plan.exported
