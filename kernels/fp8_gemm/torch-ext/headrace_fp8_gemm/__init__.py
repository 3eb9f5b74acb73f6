"""FP8 matrix products for training: forward, input gradient and weight gradient, of linear layers and of experts.

The functions here are the portable Triton back end; `headrace_fp8_gemm.gluon_gemm` offers the same three for Hopper and
`headrace_fp8_gemm.reference` in naive PyTorch. Importing this needs no GPU; a call does, or Triton's interpreter.
"""

from .triton_gemm import dense, k_grouped, m_grouped

__all__ = ["dense", "k_grouped", "m_grouped"]
