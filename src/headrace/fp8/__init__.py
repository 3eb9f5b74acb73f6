"""Numerics of the matrix multiplications: one linear layer, grouped GEMMs, and where weight gradients go.

Everything that multiplies by a weight in this project comes through here, so that a format (FP32, BF16, FP8) is decided
in one place. Master weights and accumulated weight gradients are FP32 (report, arXiv 2412.19437, section 3.3). The room
knows nothing about attention, routing or losses.

    formats, quantise, specification, accumulator     what FP8 numbers, tiles and products are: plain PyTorch
    gemms                                             the operands and products that a linear layer asks for; FP32, BF16
    emulated, kernel_gemms with libraries, backends   the same in FP8: on any device, on GPUs, and who is picked
    activations, linear, weight_gradients             the layer, what it keeps, and when weight gradients are computed
    numerics                                          the configuration resolved: who runs in which format
"""
