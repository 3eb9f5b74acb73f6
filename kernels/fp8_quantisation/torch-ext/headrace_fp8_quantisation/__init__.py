"""FP8 quantisers of DeepSeek-V3's training, alone and fused with what comes before them, in Triton.

E4M3 codes with FP32 scales per 1x128, 128x1 or 128x128 tile (report, section 3.3). Each function stands beside the same
in plain PyTorch in `reference`. Importing this needs no GPU; calling it does, or Triton's interpreter.
"""

from .rmsnorm import rmsnorm_quantise
from .rope import rope_concat, rope_concat_backward
from .rows import quantise_rows, quantise_rows_and_columns, requantise_columns
from .swiglu import SwigluGradients, swiglu_backward_quantise, swiglu_quantise
from .weights import quantise_weight

__all__ = [
    "SwigluGradients",
    "quantise_rows",
    "quantise_rows_and_columns",
    "quantise_weight",
    "requantise_columns",
    "rmsnorm_quantise",
    "rope_concat",
    "rope_concat_backward",
    "swiglu_backward_quantise",
    "swiglu_quantise",
]
