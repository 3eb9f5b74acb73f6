"""Per-token log-probabilities of any model, in FP32, behind one small protocol.

Two models speak it: the exported one, run by transformers (what a user of the Hub repository gets), and ours, loaded
from the training checkpoint. Shapes: B rows, T targets, V vocabulary. `tokens[:, t]` is context for `tokens[:, t +
1]`; causal attention makes padding on the right harmless, and no token is dropped by the router, so rows do not
influence each other.

An FP8 export is run with the values that its codes and scales stand for, dequantised by `conversion.hub_folder`.
transformers can do that as well, but needs accelerate for it and misreads blocks at edges (docs/pipeline-stages.md).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.checkpoint.reader import tensors_of
from headrace.config.schema import ModelConfig
from headrace.conversion.hub_config import is_quantised, read_hub_config
from headrace.conversion.hub_folder import open_hub_folder
from headrace.errors import UserError
from headrace.fp8.gemms import Compute
from headrace.fp8.numerics import Numerics
from headrace.model.transformer import Transformer

_LOGITS = 1 << 22  # logits held at once: 16 MiB in FP32; on a CPU larger batches are slower (out of cache)


class Scorer(Protocol):
    """A language model as a function of token rows."""

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T + 1] -> natural log-probability of tokens[:, 1:], float32 [B, T], on the CPU."""
        ...


class TransformersScorer:
    """The exported model, run by transformers in FP32."""

    def __init__(self, model: Any, device: str = "cpu") -> None:
        self.model = model.eval().to(device)
        self.vocab_size = int(model.config.vocab_size)
        self._device = device

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "TransformersScorer":
        """Load a Hub folder from disk, weights as FP32. Raises `UserError` where a tensor is missing or unknown."""
        from transformers import AutoModelForCausalLM

        from headrace.conversion.mtp import mtp_loading

        with mtp_loading(read_hub_config(folder).num_hidden_layers), _without_progress_bar():
            if is_quantised(folder):
                model, report = _load_dequantised(folder)
            else:
                model, report = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        wrong = sorted(
            str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]
        )
        if wrong:
            raise UserError(
                f"{folder}: transformers finds missing or unknown tensors, such as {wrong[0]}; convert again"
            )
        return cls(model, device)

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """See `Scorer`."""
        return self.score(tokens)[0]

    @torch.inference_mode()
    def score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T + 1] -> log-probabilities float32 [B, T]; whether each target is the likeliest, bool [B, T]."""
        tokens = tokens.to(self._device)
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        targets = tokens[:, 1:]
        chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
        return (chosen - logits.logsumexp(-1)).cpu(), (logits.argmax(-1) == targets).cpu()


def _load_dequantised(folder: Path) -> Any:
    from transformers import AutoConfig, DeepseekV3ForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    weights = {tensor.name: values for tensor, values in open_hub_folder(folder).values()}
    return DeepseekV3ForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class TransformerScorer:
    """Our own model."""

    def __init__(self, model: Transformer, device: str = "cpu") -> None:
        self.model = model.eval().to(device)
        self._device = device

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        config: ModelConfig,
        numerics: Numerics | Compute,
        device: str = "cpu",
        kind: str = "model",
    ) -> "TransformerScorer":
        """Load a training checkpoint: its folder or a safetensors file. Raises `UserError` as `of` does."""
        with tensors_of(checkpoint, kind) as source:
            tensors = {name: source.get(name) for name in source.keys()}  # noqa: SIM118 - a source is no mapping
        return cls.of(tensors, checkpoint, config, numerics, device)

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        source: Path,
        config: ModelConfig,
        numerics: Numerics | Compute,
        device: str = "cpu",
    ) -> "TransformerScorer":
        """Our model with the FP32 `tensors` of `source`; `UserError` where some are missing, unknown or misshapen."""
        model = Transformer(config, numerics)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            problem = " ".join(str(error).split())
            raise UserError(f"{source}: does not fit the model of this config: {problem}") from None
        return cls(model, device)

    @torch.inference_mode()
    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """See `Scorer`."""
        return self.model.token_log_probabilities(tokens.to(self._device)).float().cpu()


def score_rows(
    scorer: Scorer, tokens: NDArray[np.int64], lengths: NDArray[np.int64], vocab_size: int
) -> NDArray[np.float64]:
    """Log-probabilities of rows of different lengths, batched by length.

    tokens [N, L + 1] padded on the right, lengths [N] in targets -> [N, L], zero beyond each row's length.
    """
    scores = np.zeros((len(tokens), tokens.shape[1] - 1))
    for rows in batches(lengths, vocab_size):
        width = int(lengths[rows].max())
        batch = torch.from_numpy(tokens[rows, : width + 1])
        scores[rows, :width] = scorer.log_probabilities(batch).double().numpy()
    scores[np.arange(scores.shape[1]) >= lengths[:, None]] = 0.0
    return scores


def batches(lengths: NDArray[np.int64], vocab_size: int) -> list[NDArray[np.int64]]:
    """Row numbers in batches, longest first, so that a batch's logits stay within 16 MiB (at least one row)."""
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    while start < len(order):
        size = max(1, _LOGITS // (vocab_size * max(1, int(lengths[order[start]]))))
        groups.append(order[start : start + size])
        start += size
    return groups
