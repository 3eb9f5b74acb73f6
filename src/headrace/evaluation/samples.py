"""Generated text, to be looked at: continuations of held-out prompts, half of them greedy, half sampled.

Samples are shown as they come out; none is chosen or dropped, and no figure is made from them.
"""

from collections.abc import Iterator
from typing import Any

import torch

from headrace.evaluation.heldout import Heldout
from headrace.evaluation.text import TextEncoder

PROMPT_TOKENS = 32

_SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "temperature": None, "top_k": None, "top_p": None},
    "temperature 0.8": {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0},
}


def generate(
    model: Any, encoder: TextEncoder, heldout: Heldout, count: int, new_tokens: int, seed: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """`count` continuations of up to `new_tokens` tokens by a transformers model; two settings for each prompt.

    Prompts are the first tokens of held-out rows of different documents. Bytes that are no UTF-8 show as U+FFFD.
    """
    samples: list[dict[str, Any]] = []
    wanted = [(row, name) for row in _prompt_rows(heldout) for name in _SETTINGS][:count]
    for own_seed, (row, name) in enumerate(wanted, start=seed):
        prompt = heldout.tokens[row, : 1 + min(PROMPT_TOKENS, int(heldout.lengths[row]))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own_seed)
            out = model.generate(
                input_ids=torch.from_numpy(prompt[None]).to(device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=device),
                max_new_tokens=new_tokens,
                eos_token_id=encoder.eos,
                pad_token_id=encoder.eos,
                **_SETTINGS[name],
            )
        continuation = out[0, len(prompt) :].cpu().numpy()
        document = heldout.documents[heldout.owner[row]]
        samples.append(
            {
                "prompt": encoder.decode_bytes(prompt).decode("utf-8", errors="replace"),
                "continuation": encoder.decode_bytes(continuation).decode("utf-8", errors="replace"),
                "settings": name,
                "seed": own_seed,
                "tokens": len(continuation),
                "document": document.path,
                "kind": document.kind,
            }
        )
    return samples


def _prompt_rows(heldout: Heldout) -> Iterator[int]:
    """The longest row of each document, longest first, so that prompts differ and are whole."""
    best: dict[int, int] = {}
    for row, owner in enumerate(heldout.owner.tolist()):
        if owner not in best or heldout.lengths[row] > heldout.lengths[best[owner]]:
            best[owner] = row
    return iter(sorted(best.values(), key=lambda row: (-min(int(heldout.lengths[row]), PROMPT_TOKENS), row)))
