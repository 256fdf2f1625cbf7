"""Answers of a model to prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gradsafe._checks import refuse
from gradsafe.models.batching import Batch, collate, pad_token_id, plan_batches
from gradsafe.models.encode import Encoded
from gradsafe.models.inspection import input_device

Around = Callable[[list[int], Batch], AbstractContextManager[Any]]


def generate(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Encoded],
    *,
    keep_response: bool = False,
    batch_tokens: int = 4096,
    around: Around = lambda indices, batch: nullcontext(),
    **options: Any,
) -> list[list[int]]:
    """Continue prompts; greedily unless the options say otherwise.

    Args:
        model: A causal language model, in the mode in which it is to answer.
        tokenizer: Its tokenizer, of which the padding is taken.
        items: Encoded prompts, each with a response (see `keep_response`).
        keep_response: Continue behind the response instead of in its place.
        batch_tokens: Tokens per batch, padding included, without those that are generated.
        around: Called with the numbers of a batch's items and the batch; the batch runs within.
        **options: Arguments of the model's `generate`, for example `max_new_tokens`.

    Returns:
        The new token ids of each prompt, up to the first EOS.

    Raises:
        ValueError: `num_return_sequences` or `num_beams` other than 1.
    """
    configs = [options.get("generation_config"), getattr(model, "generation_config", None)]

    def chosen(name: str) -> Any:
        """An option, as `model.generate` finds it."""
        known = (getattr(config, name, None) for config in configs)
        return options.get(name, next((value for value in known if value is not None), None))

    for name in ("num_return_sequences", "num_beams"):
        if chosen(name) not in (None, 1):
            refuse("generate", f"{name}=1", chosen(name))
    pad = pad_token_id(tokenizer, model)
    options = {"do_sample": False, "pad_token_id": pad, **options}
    eos = chosen("eos_token_id")
    ends = set(eos) if isinstance(eos, (list, tuple)) else {eos}
    given = [
        item.input_ids if keep_response else item.input_ids[: item.prompt_length] for item in items
    ]
    found: list[list[int]] = [[] for _ in items]
    for indices in plan_batches([len(ids) for ids in given], batch_tokens):
        # A batch needs responses, so the prompts end one token earlier.
        batch = collate([Encoded([*given[i], pad], len(given[i])) for i in indices], pad, "left")
        device = input_device(model) or batch.input_ids.device
        columns = batch.input_ids.shape[1] - 1
        with around(indices, batch), torch.no_grad():
            written: Any = model.generate(  # type: ignore[operator]
                input_ids=batch.input_ids[:, :-1].to(device),
                attention_mask=batch.attention_mask[:, :-1].to(device),
                **options,
            )
        for index, ids in zip(indices, written[:, columns:].tolist(), strict=True):
            end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            found[index] = ids[:end]
    return found
