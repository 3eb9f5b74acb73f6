"""FP8 kernels of Headrace."""
