"""Train, validation and held-out: whole groups go to one split, chosen by hash until each has its share of the text.

A group is a second-level directory (neighbouring files repeat each other: a document-wise split would test on copies of
the training text, or nearly) or, in JSONL and Parquet, a document. Groups of code, headers, documentation and text are
divided apart, so that each kind is in each split where it has groups enough. Validation chooses settings; held-out text
is for the reported figures and nothing else.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping

from headrace.errors import UserError

TRAIN, VALIDATION, HELDOUT = "train", "validation", "heldout"
SPLITS = (TRAIN, VALIDATION, HELDOUT)


def assign(
    sizes: Mapping[str, int], strata: Mapping[str, str], validation_fraction: float, heldout_fraction: float
) -> dict[str, str]:
    """The split of each group; `sizes` are bytes by group, `strata` its kind.

    In each stratum groups are taken in the order of their names' hash: into held-out until it has its fraction of the
    stratum's bytes, then into validation. A group that would overfill a split by over a quarter is passed over, but a
    split whose fraction is not 0 gets at least one. Strata with too few groups for that join the one that has most;
    `UserError` if there are too few in all.
    """
    wanted = [(HELDOUT, heldout_fraction), (VALIDATION, validation_fraction)]
    wanted = [(split, fraction) for split, fraction in wanted if fraction > 0]
    if len(sizes) <= len(wanted):
        raise UserError(
            f"corpus: too small: {len(sizes)} group(s) of text (folders, or documents) cannot be divided into "
            f"{', '.join([TRAIN, *(split for split, _ in wanted)])}; add text"
        )
    counts = Counter(strata[group] for group in sizes)
    largest = max(sorted(counts), key=counts.__getitem__)
    splits: dict[str, str] = {}
    for stratum in [name for name in sorted(counts) if counts[name] > len(wanted) or name == largest]:
        few = {name for name in counts if counts[name] <= len(wanted)} if stratum == largest else set()
        splits |= _divide({group: size for group, size in sizes.items() if strata[group] in {stratum, *few}}, wanted)
    return splits


def _divide(sizes: Mapping[str, int], wanted: list[tuple[str, float]]) -> dict[str, str]:
    total, free = sum(sizes.values()), sorted(sizes, key=_rank)
    splits = dict.fromkeys(sizes, TRAIN)
    for index, (split, fraction) in enumerate(wanted):
        after = len(wanted) - index  # groups that the later splits and train need at least
        chosen = set(_fill(free, sizes, total * fraction, len(free) - after))
        splits.update(dict.fromkeys(chosen, split))
        free = [group for group in free if group not in chosen]
    return splits


def _fill(free: list[str], sizes: Mapping[str, int], target: float, most: int) -> list[str]:
    """At most `most` groups in order until `target` bytes are reached; the smallest one if none fits."""
    chosen: list[str] = []
    filled = 0
    for group in free:
        if filled >= target or len(chosen) == most:
            break
        if filled + sizes[group] <= 1.25 * target:
            chosen.append(group)
            filled += sizes[group]
    return chosen or [min(free, key=lambda group: (sizes[group], _rank(group)))]


def _rank(group: str) -> bytes:
    return hashlib.sha256(group.encode()).digest()
