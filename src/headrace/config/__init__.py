"""Configuration: schema (frozen dataclasses), composition through Hydra, checks across fields.

It knows nothing of stages, fingerprints or files under results/.
"""
