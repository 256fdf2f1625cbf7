"""Correction while generating: prompts that a detector flags are answered with a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from gradsafe._checks import check_value, refuse
from gradsafe.detection.detector import Detector
from gradsafe.models import (
    Encoded,
    Encoding,
    Prompt,
    collate,
    encode,
    generate,
    pad_token_id,
    plan_batches,
    response_nll,
)
from gradsafe.models.batching import Batch
from gradsafe.models.decoder import decoder_blocks
from gradsafe.models.encode import located
from gradsafe.models.modes import evaluating, frozen
from gradsafe.models.threads import alone, own

REFUSAL = "I'm sorry, but I can't help with that."
Method = Literal["prefix", "hidden"]


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        text: The answer; of a flagged prompt, with the prefix.
        flagged: Whether the detector flagged the prompt, so that the answer was corrected.
        ids: Token ids of the answer.
    """

    text: str
    flagged: bool
    ids: list[int]


@overload
def correct(
    model: nn.Module, tokenizer: Any, prompt: str, detector: Detector, **options: Any
) -> Answer: ...
@overload
def correct(
    model: nn.Module, tokenizer: Any, prompt: Sequence[Any], detector: Detector, **options: Any
) -> Any: ...
def correct(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    detector: Detector,
    *,
    method: Method = "prefix",
    prefix: str = REFUSAL,
    block: int | None = None,
    eta: float = 0.5,
    batch_tokens: int = 4096,
    progress: bool = False,
    **generation: Any,
) -> Answer | list[Answer]:
    """Answer prompts; where the detector flags one, make the model refuse.

    Method "prefix" puts a refusal at the beginning of the answer and lets the model go on. Method
    "hidden" moves the hidden state h of one decoder block at the last prompt token, and the states
    of the generated tokens, by the same step: h + eta * |h| * g / |g|, where g is the gradient of
    the NLL of the detector's response ("Sure") with respect to h. To first order the NLL changes by
    the product of step and gradient, eta * |h| * |g|, so it rises: compliance becomes less likely.

    The weights are not changed. Other threads may use the model meanwhile.

    Args:
        model: A causal language model of `transformers`.
        tokenizer: Its tokenizer.
        prompt: A text or a conversation, or a list of them.
        detector: Calibrated, see `Detector.calibrate`; of this model or of another one. Prompts are
            encoded with its template and system message.
        method: "prefix" or "hidden".
        prefix: Beginning of the answer, for "prefix".
        block: Index of the decoder block, negative from the end, for "hidden"; None for the middle.
        eta: Length of the step relative to the hidden state, above 0, for "hidden".
        batch_tokens: Tokens per batch, padding included; lower it if memory runs out.
        progress: Show the detector's progress bar.
        **generation: Arguments of the model's `generate`, for example `max_new_tokens`; greedy
            unless they say otherwise.

    Returns:
        The answer, or a list of answers for a list of prompts. To a prompt that is not flagged, it
        is the model's own.

    Raises:
        ValueError: As in `Detector.flag`, an empty list, an option out of range, or a gradient that
            is not finite.
        TypeError: A prompt is neither a text nor a conversation.
    """
    check_value("correct", "method", method, Method)
    if method == "hidden" and not eta > 0:
        refuse("correct", "eta above 0", eta)
    one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
    prompts: list[Any] = [prompt] if one else list(prompt)
    flags = detector.flag(prompts, batch_tokens, progress).tolist()
    config = detector.config
    encoding = Encoding(
        config.template, config.system, split_special_tokens=config.split_special_tokens
    )
    response = prefix if method == "prefix" else config.response
    items: list[Encoded] = []
    for index, each in enumerate(prompts):
        with located(f"gradsafe.correct: prompts[{index}]"):
            items.append(encode(tokenizer, each, response, encoding))
    options = {"batch_tokens": batch_tokens, **generation}
    found: list[list[int]] = [[] for _ in items]
    for corrected in (False, True):
        chosen = [index for index, flag in enumerate(flags) if flag == corrected]
        own_items = [items[index] for index in chosen]
        if not corrected:
            answers = generate(model, tokenizer, own_items, **options)
        elif method == "prefix":
            rest = generate(model, tokenizer, own_items, keep_response=True, **options)
            starts = [item.input_ids[item.prompt_length :] for item in own_items]
            answers = [begin + ids for begin, ids in zip(starts, rest, strict=True)]
        else:
            answers = _steered(model, tokenizer, own_items, block, eta, options)
        for index, ids in zip(chosen, answers, strict=True):
            found[index] = ids
    result = [
        Answer(tokenizer.decode(ids, skip_special_tokens=True), flag, ids)
        for ids, flag in zip(found, flags, strict=True)
    ]
    return result[0] if one else result


def _steered(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Encoded],
    block: int | None,
    eta: float,
    options: dict[str, Any],
) -> list[list[int]]:
    module = chosen_block(model, block)
    pad, size = pad_token_id(tokenizer), options["batch_tokens"]
    steps = refusal_steps(model, module, items, pad, size, eta)

    def around(indices: list[int], batch: Batch) -> Any:
        # The batch ends with a token that stands for the response and is not fed in.
        return steered(module, steps[indices], [batch.input_ids.shape[1] - 2] * len(indices))

    return generate(model, tokenizer, items, around=around, **options)


def chosen_block(model: nn.Module, index: int | None) -> nn.Module:
    """The decoder block with this index, negative from the end; None for the middle one."""
    blocks = decoder_blocks(model)
    place = len(blocks) // 2 if index is None else index
    if not -len(blocks) <= place < len(blocks):
        refuse("correct", f"block from {-len(blocks)} to {len(blocks) - 1}", place)
    return blocks[place]


def refusal_steps(
    model: nn.Module,
    block: nn.Module,
    items: Sequence[Encoded],
    pad_id: int,
    batch_tokens: int = 4096,
    eta: float = 1.0,
) -> Tensor:
    """Steps of hidden states that make the response of each item less likely.

    Args:
        model: A causal language model.
        block: The decoder block whose output is to be moved.
        items: Encoded prompts with the compliance response.
        pad_id: Token id of the padding.
        batch_tokens: Tokens per batch.
        eta: Length of a step, relative to the hidden state at the last prompt token.

    Returns:
        `[n, d]` float32 on the CPU: eta * |h| * g / |g|; 0 where the gradient g is 0.

    Raises:
        ValueError: A gradient is not finite.
    """
    found: list[Tensor | None] = [None] * len(items)
    for indices in plan_batches([len(item) for item in items], batch_tokens):
        batch = collate([items[i] for i in indices], pad_id, "left")
        leaves: list[Tensor] = []

        def cut(module: nn.Module, args: Any, output: Any, leaves: list[Tensor] = leaves) -> Any:
            leaves.append(_states(output).detach().requires_grad_())
            return _with_states(output, leaves[-1])

        with alone(model), frozen(model), evaluating(model):
            handle = block.register_forward_hook(own(cut))
            try:
                with torch.enable_grad():
                    response_nll(model, batch).sum().backward()
            finally:
                handle.remove()
        assert leaves[-1].grad is not None
        ends = [a + n - 1 for a, n in zip(batch.starts, batch.prompt_lengths, strict=True)]
        for row, (index, end) in enumerate(zip(indices, ends, strict=True)):
            state = leaves[-1][row, end].detach().float()
            gradient = leaves[-1].grad[row, end].float()
            if not gradient.isfinite().all():
                raise ValueError(
                    f"gradsafe.correct: the gradient of flagged prompt {index} holds NaN or Inf; "
                    'use method="prefix"'
                )
            length = gradient.norm().clamp(min=torch.finfo(torch.float32).tiny)
            found[index] = (eta * state.norm() / length * gradient).cpu()
    return torch.stack([step for step in found if step is not None]) if found else torch.empty(0)


@contextmanager
def steered(block: nn.Module, steps: Tensor, first: Sequence[int]) -> Iterator[None]:
    """Add a step to the output of a block in the forward passes of this thread.

    Args:
        block: The decoder block.
        steps: `[B, d]`, one for each row of the batch.
        first: Column from which on a row is moved, in passes over several tokens. A pass over one
            token is that of a generated token, which is always moved.

    Raises:
        RuntimeError: In a pass, the batch has another number of rows.
    """

    def move(module: nn.Module, args: Any, output: Any) -> Any:
        states = _states(output)
        if len(states) != len(steps):
            raise RuntimeError(f"gradsafe.correct: {len(steps)} steps for {len(states)} rows")
        columns = torch.arange(states.shape[1], device=states.device)
        begin = torch.tensor(first, device=states.device)[:, None]
        moved = (columns >= begin) | (states.shape[1] == 1)
        return _with_states(output, states + moved[..., None] * steps[:, None].to(states))

    handle = block.register_forward_hook(own(move))
    try:
        yield
    finally:
        handle.remove()


def _states(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _with_states(output: Any, states: Tensor) -> Any:
    return (states, *output[1:]) if isinstance(output, tuple) else states
