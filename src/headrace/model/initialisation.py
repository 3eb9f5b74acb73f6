"""Initial weights: normal with one standard deviation, norms 1, selection biases 0.

The report trains with 0.006 at width 7168 (section 4.2); narrower models keep the same size of activations with 0.006 *
sqrt(7168 / width), which is `initializer_range: auto`. Every tensor, and every expert within a stacked tensor, has a
random stream of its own, keyed by the seed and its Hub name: so weights do not depend on the order of construction, on
which other tensors exist, or on how a layout divides them.
"""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from headrace.config.schema import ModelConfig
from headrace.model.transformer import Transformer

_WIDTH, _STD = 7168, 0.006


def standard_deviation(config: ModelConfig) -> float:
    """What `initializer_range` means for this width."""
    if config.initializer_range == "auto":
        return _STD * math.sqrt(_WIDTH / min(config.hidden_size, _WIDTH))
    return config.initializer_range


@torch.no_grad()
def initialise(model: Transformer, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and buffer of `model` in place; the same on every device."""
    initialise_parameters(model.named_parameters(), model.local_experts(), config, seed)
    for buffer in model.buffers():
        buffer.zero_()


@torch.no_grad()
def initialise_parameters(named: Iterable[tuple[str, Tensor]], local: range, config: ModelConfig, seed: int) -> None:
    """Fill some of a model's parameters, by their names in it; stacked experts are those numbered `local`."""
    std = standard_deviation(config)
    for name, parameter in named:
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif parameter.dim() == 3:
            prefix, projection = name.rsplit(".experts.", 1)
            for index, expert in enumerate(local):
                _draw(parameter[index], f"{prefix}.experts.{expert}.{projection}", std, seed)
        else:
            _draw(parameter, name, std, seed)


def _draw(tensor: Tensor, name: str, std: float, seed: int) -> None:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensor.copy_(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").normal_(0.0, std, generator=generator))
