"""DeepSeek-V3's network (report, arXiv 2412.19437, section 2), equal to transformers' `DeepseekV3ForCausalLM` 5.23.

Bottom up: `rope`, `norm`, `causal` (attention itself), `attention` (MLA), `router`, `dispatch`, `experts`, `layer`,
`mtp`, `loss`, `transformer`, `initialisation`. Parameter names are those of the Hub checkpoint, except that the experts
of a layer are stacked. The room neither trains, saves nor distributes: dispatchers and optimizers are handed in or come
later.
"""
