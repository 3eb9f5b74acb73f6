"""How many shards a dataset has: known from the configuration alone, because the graph of jobs follows from it."""

from headrace.config.schema import TokensConfig

SHARD_TOKENS = 1 << 31
"""Of a full shard: 8.6 GB of ids."""
FEW = 8
"""Shards where nobody says how many tokens there will be."""


def training_shards(config: TokensConfig) -> int:
    """Shards of the training split."""
    if config.shards != "auto":
        return config.shards
    return -(-config.total // SHARD_TOKENS) if config.total else FEW
