"""The PNG is decoded here by hand and compared with the loads, cell by cell."""

import struct
import zlib

import numpy as np
import pytest

from headrace.reporting.facts import ExpertLoad
from headrace.reporting.heatmap import COLUMNS, colour_limit, colours, draw_heatmap, png, relative
from headrace.reporting.svg import NARROW, WIDE


def decode_png(data: bytes) -> list[list[tuple[int, ...]]]:
    """Rows of RGBA pixels of an unfiltered, non-interlaced 8-bit PNG; checks signature and CRCs."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    body, chunks = data[8:], {}
    while body:
        (length,) = struct.unpack(">I", body[:4])
        kind, content, crc = body[4:8], body[8 : 8 + length], body[8 + length : 12 + length]
        assert struct.unpack(">I", crc)[0] == zlib.crc32(kind + content)
        chunks[kind] = content
        body = body[12 + length :]
    width, height, depth, colours = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colours) == (8, 6)
    raw, stride = zlib.decompress(chunks[b"IDAT"]), 4 * width + 1
    assert len(raw) == stride * height
    return [[tuple(raw[y * stride + 1 + 4 * x :][:4]) for x in range(width)] for y in range(height)]


def test_png_holds_the_cells_expert_zero_at_the_bottom() -> None:
    cells = np.array([[0.0, 1.0, 2.0], [1.0, 1.5, 0.5]])
    pixels = decode_png(png(cells, 2.0))
    opacity = [[pixel[3] for pixel in row] for row in pixels]
    half = round(255 * 0.5**0.8)
    assert opacity == [[255, half], [0, half], [255, 0]]
    assert pixels[0][0][0] > pixels[0][0][2] and pixels[2][0][0] < pixels[2][0][2]  # orange above, blue below


def test_colour_is_clear_when_balanced_and_full_at_the_ends() -> None:
    balanced, full, beyond, idle = colours(np.array([1.0, 2.0, 9.0, 0.0]), 2.0).tolist()
    assert balanced[3] == 0
    assert full == beyond and full[3] == idle[3] == 255
    assert full[:3] != idle[:3]


def test_relative_load_averages_to_one_and_is_thinned() -> None:
    shares = [[0.1 + 0.0002 * i, 0.9 - 0.0002 * i] for i in range(1000)]
    loads = relative(shares)
    assert len(loads) == COLUMNS
    assert all(sum(row) / 2 == pytest.approx(1) for row in loads)
    assert loads[0][0] == pytest.approx(2 * (0.1 + 0.0002 * 2.5))  # the mean of the first six moments


def test_many_layers_of_many_experts_stay_small() -> None:
    row = tuple((1 + (e % 7) / 10) / 300 for e in range(256))
    load = ExpertLoad(tuple(float(i) for i in range(200)), {f"layer {i}": (row,) * 200 for i in range(58)}, ())
    for width in (WIDE, NARROW):
        assert len(draw_heatmap(load, width)) < 400_000
    assert colour_limit(load) == 2.0


def test_colours_reach_further_for_an_unbalanced_run() -> None:
    load = ExpertLoad((0.0, 1.0), {"layer 0": ((0.25, 0.25, 0.25, 0.25), (0.75, 0.25, 0.0, 0.0))}, ())
    assert colour_limit(load) == 3.0
    dead = ExpertLoad((0.0,), {"layer 0": ((1.0,) + (0.0,) * 15,)}, ())
    assert colour_limit(dead) == 4.0
