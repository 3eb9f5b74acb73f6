"""What leaves the machine: the repository's tree with its model card, the gate it must pass, and the push to the Hub.

`repository` builds the exact tree that goes out, `card` writes README.md from computed facts, `gate` refuses whatever
should not be published, `hub` pushes the tree as one commit. Facts and paths are handed in; the room computes no score
and trains nothing. Data sets, kernels and the Hub as a cache of stages are not its business yet.
"""
