"""Where text comes from: locked sources, readers, the environment corpus, duplicates, contamination, splits.

Its result is a folder that says which documents there are and which split each is in, and holds the text of validation,
held-out and a sample; training text is read from the sources again. It tokenises nothing and knows no stages.
"""
