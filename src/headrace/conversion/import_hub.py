"""Hub folder to training checkpoint: the reverse of `export.py`, for any folder in DeepSeek-V3's layout.

`hub_folder.py` checks the folder and reads it. Values are taken over as they are: BF16 widens to FP32 without loss, FP8
becomes code * scale, rounded to FP32 once, and is the master weight that training goes on from. The MTP module's copies
of embedding and head are dropped after their bits were compared.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from headrace.artifacts import manifest as manifests
from headrace.checkpoint.weights_only import write_weights
from headrace.config.schema import ModelConfig
from headrace.conversion.hub_folder import open_hub_folder
from headrace.conversion.names import checkpoint_shapes


def import_(hub_folder: Path, checkpoints: Path, state: Mapping[str, Any]) -> ModelConfig:
    """Write the checkpoint of step 0 (FP32, experts stacked) under `checkpoints`; returns the Hub folder's network.

    What stops half way leaves nothing: `checkpoints` is of this import alone.
    state: what is kept beside the weights, JSON. Memory: one tensor of the Hub layout. Raises `UserError` for whatever
    `open_hub_folder` and `HubFolder.values` refuse, and for copies that differ.
    """
    folder = open_hub_folder(hub_folder, released=True)
    folder.check_copies()
    placed = ((tensor.source, (tensor.expert or 0) * prod(tensor.shape), values) for tensor, values in folder.values())
    try:
        write_weights(checkpoints, checkpoint_shapes(folder.config), placed, state)
    except BaseException:
        manifests.discard(checkpoints)
        raise
    return folder.config
