import sys
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from evaluation_world import World, world
from headrace.evaluation.scorer import TransformersScorer

__all__ = ["world"]


@pytest.fixture
def harness_own_model(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's own Hugging Face model; it imports accelerate, which is not installed and not used on one CPU."""
    for name in ("accelerate", "accelerate.utils"):
        module = ModuleType(name)
        for attribute in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size", "get_max_memory"):
            setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    from lm_eval.models.huggingface import HFLM

    def build(length: int, batch: int = 4) -> Any:
        model = TransformersScorer.load(world.hub).model
        tokenizer = AutoTokenizer.from_pretrained(world.tokenizer)
        own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device="cpu", max_length=length)
        own.custom_prefix_token_id = world.encoder().eos  # its default, BOS, never occurs in training rows
        return own

    return build
