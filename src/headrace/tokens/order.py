"""The order of training rows: a permutation that is a function, so that nothing is stored and any position is a start.

A Feistel network is a bijection whatever its round function is. Six rounds over the smallest even number of bits that
can count the rows permute a range of at most 4 x rows; values outside are sent through again until they fall inside
("cycle walking"), which makes it a bijection on the rows. The key is derived from seed and epoch, so each epoch has
its own order.
"""

import hashlib

_ROUNDS = 6
_MASK = (1 << 64) - 1


def row_at(seed: int, position: int, rows: int) -> int:
    """The row that is read at `position` of the endless stream of epochs over `rows` rows.

    Positions [e * rows, (e + 1) * rows) are epoch e and meet every row once. A pure function of its arguments.
    """
    assert rows >= 1, "an empty split has no order"
    assert position >= 0, "positions count from 0"
    epoch, index = divmod(position, rows)
    half = max(1, ((rows - 1).bit_length() + 1) // 2)  # bits of each half
    keys = _round_keys(seed, epoch)
    index = _permute(index, half, keys)
    while index >= rows:
        index = _permute(index, half, keys)
    return index


def _permute(value: int, half: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(value: int) -> int:
    """Spread every bit of a 64-bit value over all bits (the finaliser of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"headrace row order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))
