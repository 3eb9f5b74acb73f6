"""Text to token shards to training rows: tokenizer, engines, indexed files, shards, order, loader.

It reads the corpus artifact and knows nothing of where its text came from, of the model or of stages.
"""
