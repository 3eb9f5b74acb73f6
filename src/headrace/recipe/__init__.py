"""The recipe: everything that changes with tokens seen, as pure functions of the tokens seen.

It knows nothing of optimizers or files; the trainer asks it what holds at a step and does it.
"""
