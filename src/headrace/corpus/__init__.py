"""Where text comes from: locked sources, readers, the environment corpus, duplicates, splits.

Its result is a folder of Parquet files, one per split, that the tokens room reads. It tokenises nothing and knows no
stages.
"""
