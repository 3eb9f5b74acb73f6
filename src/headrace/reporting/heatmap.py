"""Expert load over time: one panel per layer, experts upward, tokens to the right, colour by load against the mean.

The cells are one small PNG per layer, stretched without smoothing: 58 layers of 256 experts stay a few kilobytes each.
A balanced cell is transparent, so that the map sits on a light and on a dark page alike: blue has too little, orange
too much.
"""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from headrace.reporting.facts import ExpertLoad
from headrace.reporting.quantities import plain, tick
from headrace.reporting.svg import WIDE, Scale, axis_below, drawing, element, text

_OVER, _UNDER = (202, 83, 16), (35, 112, 190)
COLUMNS = 160
"""At most so many moments are drawn; between them loads are averaged."""

Floats = NDArray[np.float64]


def relative(shares: Sequence[Sequence[float]], columns: int = COLUMNS) -> Floats:
    """Loads over the mean load (1 is balanced), averaged down to at most `columns` moments: [moments, experts]."""
    loads = np.asarray(shares, dtype=np.float64)
    count = min(len(loads), columns)
    starts = np.arange(count) * len(loads) // count
    totals = np.add.reduceat(loads, starts)
    means = totals.mean(axis=1, keepdims=True)
    balanced: Floats = np.divide(totals, means, out=np.ones_like(totals), where=means > 0)
    return balanced


def colours(loads: Floats, limit: float) -> NDArray[np.uint8]:
    """RGBA [..., 4] of loads relative to the mean: transparent at 1, full orange from `limit` on, full blue at 0."""
    over = loads >= 1
    strength = np.clip(np.where(over, (loads - 1) / (limit - 1), 1 - loads), 0, 1) ** 0.8
    pixels = np.empty((*loads.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(over[..., None], _OVER, _UNDER)
    pixels[..., 3] = np.rint(255 * strength)
    return pixels


def png(cells: Floats, limit: float) -> bytes:
    """An RGBA image of [moments, experts], expert 0 at the bottom."""
    moments, experts = cells.shape
    rows = colours(cells.T[::-1], limit).reshape(experts, 4 * moments)
    unfiltered = np.insert(rows, 0, 0, axis=1).tobytes()  # each row starts with the number of its filter

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", moments, experts, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(unfiltered, 9)) + chunk(b"IEND", b"")


def colour_limit(load: ExpertLoad) -> float:
    """Where orange is full: twice the mean, or more (up to 4) where the run was that unbalanced after its start."""
    late = [relative(shares)[len(load.tokens) // 4 :] for shares in load.layers.values()]
    return min(4.0, max(2.0, *(float(part.max()) for part in late if part.size)))


def draw_heatmap(load: ExpertLoad, width: float) -> Markup:
    """All layers over one token axis, and the colour key."""
    wide = width >= WIDE
    limit = colour_limit(load)
    left, right = (92.0, width - 8) if wide else (8.0, width - 8)
    caption = 0.0 if wide else 18.0
    panel = max(14.0, min(88.0 if wide else 70.0, 760.0 / len(load.layers)))
    top, gap = 40.0, 8.0
    parts = _colour_key(limit, left if wide else 8.0)
    for i, (name, shares) in enumerate(load.layers.items()):
        y = top + i * (panel + gap + caption) + caption
        parts.append(text(0 if wide else left, y + panel / 2 + 4 if wide else y - 5, name, class_="label"))
        if wide and panel >= 40:
            parts.append(text(0, y + panel / 2 + 20, f"{len(shares[0])} experts", class_="tick"))
        parts.append(_cells(relative(shares), limit, left, y, right - left, panel))
        parts.append(element("rect", x=left, y=y, width=right - left, height=panel, class_="frame"))
    bottom = top + len(load.layers) * (panel + gap + caption)
    scale = Scale(min(load.tokens), max(load.tokens) if len(load.tokens) > 1 else load.tokens[0] + 1, left, right)
    parts += axis_below(scale, bottom, scale.ticks(8 if wide else 4), "training tokens", tick)
    label = f"Load of each expert over training tokens in {len(load.layers)} layers, relative to its layer's mean."
    return drawing(width, bottom + 42, label, parts)


def _cells(cells: Floats, limit: float, x: float, y: float, width: float, height: float) -> Markup:
    href = f"data:image/png;base64,{base64.b64encode(png(cells, limit)).decode('ascii')}"
    return element("image", href=href, x=x, y=y, width=width, height=height, preserveAspectRatio="none", class_="cells")


def _colour_key(limit: float, left: float) -> list[Markup]:
    steps, x, width = 24, left + 48, 150
    mean = x + width / limit
    return [
        text(left, 14, "idle: 0", class_="tick"),
        _cells(np.linspace(0, limit, steps)[:, None], limit, x, 4, width, 12),
        element("rect", x=x, y=4, width=width, height=12, class_="frame"),
        element("line", x1=mean, x2=mean, y1=2, y2=19, class_="axis"),
        text(mean, 31, "mean: 1", "middle", "tick"),
        text(x + width + 6, 14, f"{plain(limit, 2)} times the mean", class_="tick"),
    ]
