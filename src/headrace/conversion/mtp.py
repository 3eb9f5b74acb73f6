"""Lets transformers load the MTP module of a model that is not 61 layers deep.

transformers 5.23 knows the tensors of a DeepSeek-V3 MTP module by a pattern with the published model's layer number in
it. For any other depth it reports them as unexpected, and `generate(use_mtp=True)` finds no weights. The pattern is a
class attribute that every model copies when it is built; this sets it for our layer number while models are loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel


@contextmanager
def mtp_loading(num_hidden_layers: int) -> Iterator[None]:
    """While active, `from_pretrained` takes `model.layers.<num_hidden_layers>.*` for the MTP module.

    Only loading needs it: models loaded inside keep the pattern and may generate afterwards.
    """
    patterns = DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected
    DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{num_hidden_layers}\..*"]
    try:
        yield
    finally:
        DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected = patterns
