"""The bytes of tensors as one number: what differs in a single bit differs in it.

Equality of values is not enough to find corruption: 0.0 equals -0.0, and NaN does not equal itself. Nor is a tensor's
version counter: torch's fused optimizers change parameters without raising it, and a bad memory cell raises nothing. So
the memory itself is read. Tensors on a GPU are copied to the CPU first.
"""

import torch
import xxhash
from torch import Tensor


def digest(*tensors: Tensor) -> int:
    """The xxh3 hash (64 bits) of the bytes of `tensors`, one after the other, whatever their strides."""
    hasher = xxhash.xxh3_64()
    for tensor in tensors:
        hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    value: int = hasher.intdigest()
    return value
