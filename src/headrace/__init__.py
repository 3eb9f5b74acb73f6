"""Headrace: raw text to a published DeepSeek-V3-style model, as one declarative pipeline."""

__version__ = "0.1.0"
