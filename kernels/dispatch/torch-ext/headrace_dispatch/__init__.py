"""Bringing tokens to their experts and the results back, as in DeepSeek-V3.

In one GPU's memory (Triton): ``lay_out`` decides which row a token gets at each of its experts; ``permute``,
``permute_quantise`` and ``permute_quantised`` move tokens there, ``combine`` sums their rows.
Between the GPUs of a node (CUDA, built on demand): ``connect`` makes an ``Exchange`` whose ``dispatch`` sends tokens to
the ranks that hold their experts and whose ``combine`` fetches and adds the results.
``reference`` and ``PlainExchange`` say the same in plain PyTorch.
"""

from .layout import ROWS_MULTIPLE, Layout, lay_out, permute_weights, rows_needed
from .movers import Exchange, connect
from .peers import BufferPlan, PlainExchange, Received
from .rows import combine, permute, permute_quantise, permute_quantised

__all__ = [
    "ROWS_MULTIPLE",
    "BufferPlan",
    "Exchange",
    "Layout",
    "PlainExchange",
    "Received",
    "combine",
    "connect",
    "lay_out",
    "permute",
    "permute_quantise",
    "permute_quantised",
    "permute_weights",
    "rows_needed",
]
