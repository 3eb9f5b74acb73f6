"""What leaves the machine: the repository's tree with its model card, the gate it must pass, and the push to the Hub.

`repository` builds the exact tree that goes out, `card` writes README.md from computed facts, `gate` refuses whatever
should not be published, `hub` pushes the tree as one commit; `token_dataset` and `kernels` do the same for data and
kernels. `incoming` is the gate for folders of foreign origin, `cache` keeps finished stages on the Hub. Facts and paths
are handed in; the room computes no score and trains nothing.
"""
