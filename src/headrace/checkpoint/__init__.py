"""Checkpoints: save, load, validate and retain the state of a training run.

A checkpoint holds the Hub's tensor names and whole, global shapes, whatever the layout of the ranks that wrote it. It
knows nothing of models, optimizers or schedules: it is handed named tensors and a JSON object, and hands them back.
"""
