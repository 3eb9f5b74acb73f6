"""What a general compressor needs for the same text: `xz -9`.

xz starts with no knowledge of the training text but adapts to what it compresses, and a single short document gives it
nothing to adapt to. So the scored held-out text is compressed in one piece, per kind and all together, which favours
xz over compressing document by document. The figure has no interval: bits cannot be assigned to documents.
"""

import lzma


def xz_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `xz -9`: an .xz file with LZMA2 at preset 9 (not 9e), its headers included."""
    assert text
    return 8 * len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=9)) / len(text)
