"""Hub folder to training checkpoint: the reverse of `export.py`, for any folder in DeepSeek-V3's layout.

`hub_folder.py` checks the folder and reads it. Values are taken over as they are: BF16 widens to FP32 without loss, FP8
becomes code * scale, rounded to FP32 once, and is the master weight that training goes on from. The MTP module's copies
of embedding and head are dropped after their bits were compared.
"""

from math import prod
from pathlib import Path

import torch

from headrace.config.schema import ModelConfig
from headrace.conversion.export import METADATA
from headrace.conversion.hub_folder import open_hub_folder
from headrace.conversion.names import checkpoint_shapes
from headrace.conversion.streaming import PlannedTensor, TensorWriter


def import_(hub_folder: Path, out_path: Path) -> ModelConfig:
    """Write the checkpoint tensors file `out_path` (FP32, experts stacked) from a Hub folder; returns its network.

    Memory: one tensor of the Hub layout. Raises `UserError` for whatever `open_hub_folder` and `HubFolder.values`
    refuse, and for copies that differ.
    """
    folder = open_hub_folder(hub_folder)
    folder.check_copies()
    plan = {name: PlannedTensor(torch.float32, shape) for name, shape in checkpoint_shapes(folder.config).items()}
    with TensorWriter(out_path, plan, METADATA) as writer:
        for tensor, values in folder.values():
            writer.write(tensor.source, values, at=(tensor.expert or 0) * prod(tensor.shape))
    return folder.config
