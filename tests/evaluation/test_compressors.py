import shutil
import subprocess

import pytest

from headrace.evaluation.compressors import xz_bits_per_byte


def test_equals_the_xz_program() -> None:
    if shutil.which("xz") is None:
        pytest.skip("no xz program here; it would be compared byte for byte")
    text = b"".join(f"line {number * 7919 % 1000} of the text\n".encode() for number in range(5000))
    packed = subprocess.run(["xz", "-9", "-T1", "--stdout"], input=text, capture_output=True, check=True).stdout
    assert xz_bits_per_byte(text) == pytest.approx(8 * len(packed) / len(text), rel=0.002)


def test_random_bytes_cost_eight_bits_and_repetition_almost_none() -> None:
    import random

    noise = random.Random(0).randbytes(100_000)
    assert 8 < xz_bits_per_byte(noise) < 8.02
    assert xz_bits_per_byte(b"abcd" * 25_000) < 0.05
