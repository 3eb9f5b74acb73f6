"""What a configuration will cost, computed before anything runs: parameters, FLOPs, tokens, bytes.

Formulas only: no torch, no GPU, no files. What a run really took is measured by training.
"""
