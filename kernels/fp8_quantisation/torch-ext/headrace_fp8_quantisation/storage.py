"""How codes and scales lie in memory, and what a kernel demands of its inputs."""

from torch import Tensor, bfloat16, float8_e4m3fn, float32

TILE = 128


def tiles(length: int) -> int:
    """Tiles along a dimension; the last may be smaller than 128."""
    return -(-length // TILE)


def empty_codes(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised E4M3 codes, contiguous, on the device of `like`."""
    return like.new_empty(shape, dtype=float8_e4m3fn)


def empty_scales(like: Tensor, rows: int, blocks: int) -> Tensor:
    """Uninitialised FP32 scales [rows, blocks], MN-major: stride (1, rows rounded up to 4).

    So the scales of neighbouring rows are neighbours, and every block starts at a multiple of 16 bytes, which a
    GEMM's bulk copies (TMA) demand.
    """
    return like.new_empty((blocks, -(-rows // 4) * 4), dtype=float32).t()[:rows]


def check_matrix(x: Tensor, name: str, like: Tensor | None = None) -> None:
    """Refuse what the kernels cannot read: they take BF16 or FP32 matrices whose rows are contiguous."""
    if x.dim() != 2 or x.dtype not in (bfloat16, float32) or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)}, stride {x.stride()}: "
            "give a BF16 or FP32 matrix whose last dimension is contiguous"
        )
    if like is not None and (x.shape != like.shape or x.device != like.device):
        raise ValueError(
            f"{name} is {tuple(x.shape)} on {x.device}, but {tuple(like.shape)} on {like.device} is needed"
        )
