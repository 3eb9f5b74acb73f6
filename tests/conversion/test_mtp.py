"""The shim changes one class attribute, and only while it is active."""

import re

import pytest
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

from headrace.conversion.mtp import mtp_loading


def patterns():
    return DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected


def test_the_pattern_is_ours_inside_and_transformers_own_outside():
    before = list(patterns())
    assert not any(re.search(pattern, "model.layers.6.enorm.weight") for pattern in before)
    with mtp_loading(6):
        assert any(re.search(pattern, "model.layers.6.enorm.weight") for pattern in patterns())
        assert not any(re.search(pattern, "model.layers.61.enorm.weight") for pattern in patterns())
    assert patterns() == before


def test_it_is_restored_after_an_error():
    before = list(patterns())
    with pytest.raises(RuntimeError), mtp_loading(2):
        raise RuntimeError
    assert patterns() == before
