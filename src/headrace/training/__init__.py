"""Training: the optimizer, the loop that drives it, and what is measured on the way.

It is handed a model, rows of tokens, a folder for checkpoints, a tracker, a logger and a deadline. It knows nothing
of run directories, stages or how the model is laid out over ranks.
"""
