"""Training checkpoint to Hub folder and back, tensor by tensor, and the proof that both hold the same numbers.

A training checkpoint stacks the experts of a layer as one tensor [E, out, in]; the Hub stores each expert apart, beside
a `config.json` that transformers, vLLM and SGLang read, in BF16, FP32 or FP8. This room knows the two layouts and
nothing else: it trains nothing, evaluates nothing and talks to no server.
"""
