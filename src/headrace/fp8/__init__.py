"""Numerics of the matrix multiplications: one linear layer, grouped GEMMs, and where weight gradients go.

Everything that multiplies by a weight in this project comes through here, so that a format (FP32, BF16, later FP8) is
decided in one place. Master weights and accumulated weight gradients are FP32 (report, arXiv 2412.19437, section 3.3).
The room knows nothing about attention, routing or losses.
"""
