"""Hub folder to training checkpoint: the reverse of `export.py`, for any folder in DeepSeek-V3's layout.

`hub_folder.py` checks the folder and reads it. Values are taken over as they are: BF16 widens to FP32 without loss, FP8
becomes code * scale, rounded to FP32 once, and is the master weight that training goes on from. The MTP module's copies
of embedding and head are dropped after their bits were compared.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from headrace.artifacts import manifest as manifests
from headrace.checkpoint.weights_only import Part, write_weights
from headrace.config.schema import ModelConfig
from headrace.conversion.hub_folder import HubFolder, open_hub_folder
from headrace.conversion.names import HubTensor, checkpoint_shapes
from headrace.errors import UserError


def open_for_import(hub_folder: Path) -> HubFolder:
    """The folder, with all checked that can be before its weights are read: `import_` takes it.

    Raises `UserError` for whatever `open_hub_folder` refuses, and for copies that differ from what they repeat.
    """
    folder = open_hub_folder(hub_folder, released=True)
    folder.check_copies()
    return folder


def import_(
    folder: HubFolder, checkpoints: Path, state: Mapping[str, Any], max_shard_bytes: int = 5_000_000_000
) -> ModelConfig:
    """Write the checkpoint of step 0 (FP32, experts stacked) under `checkpoints`; returns the Hub folder's network.

    state: what is kept beside the weights, JSON; another for another folder, since an attempt goes on where one with
    the same state was killed. Memory: one file of the checkpoint and one tensor of the Hub layout. Raises `UserError`
    for whatever `HubFolder.read` refuses; then nothing is left.
    """
    wanted = {_part(tensor): tensor for tensor in folder.tensors if not tensor.copy}
    try:
        write_weights(
            checkpoints,
            checkpoint_shapes(folder.config),
            wanted,
            lambda part: folder.read(wanted[part]).to(torch.float32),
            state,
            max_shard_bytes,
        )
    except UserError:
        manifests.discard(checkpoints)
        raise
    return folder.config


def _part(tensor: HubTensor) -> Part:
    size = prod(tensor.shape)
    return Part(tensor.source, (tensor.expert or 0) * size, size)
