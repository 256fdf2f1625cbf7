"""Correction while generating: prompts that a detector flags are answered with a refusal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from gradsafe.detection.detector import Detector
from gradsafe.models import (
    ContextOverflowError,
    Encoded,
    Encoding,
    Prompt,
    context_length,
    encode,
    generate,
)
from gradsafe.models.encode import located

REFUSAL = "I'm sorry, but I can't help with that."


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
    prefix: str = REFUSAL,
    batch_tokens: int = 4096,
    progress: bool = False,
    **generation: Any,
) -> Answer | list[Answer]:
    """Answer prompts; where the detector flags one, the answer begins with a refusal.

    The model goes on behind the refusal, and what it writes there is its own. The weights are not
    changed.

    Args:
        model: A causal language model of `transformers`.
        tokenizer: Its tokenizer.
        prompt: A text or a conversation, or a list of them.
        detector: Calibrated, see `Detector.calibrate`; of this model or of another one. Prompts are
            encoded with its template and system message.
        prefix: Beginning of the answer to a flagged prompt.
        batch_tokens: Tokens per batch, padding included; lower it if memory runs out.
        progress: Show the detector's progress bar.
        **generation: Arguments of the model's `generate`, for example `max_new_tokens`; greedy
            unless they say otherwise.

    Returns:
        The answer, or a list of answers for a list of prompts. To a prompt that is not flagged, it
        is the model's own.

    Raises:
        ValueError: As in `Detector.flag`, an empty list, several answers per prompt, or (as
            ContextOverflowError) a prompt that fills the context, with the prefix if it is flagged.
        TypeError: A prompt is neither a text nor a conversation.
    """
    one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
    prompts: list[Any] = [prompt] if one else list(prompt)
    config = detector.config
    encoding = Encoding(
        config.template, config.system, split_special_tokens=config.split_special_tokens
    )
    longest = context_length(model, tokenizer) or math.inf

    def check(index: int, length: int, what: str) -> None:
        if length >= longest:
            raise ContextOverflowError(
                f"gradsafe.correct: prompts[{index}]: {what} has {length} tokens, which leaves no "
                f"room for an answer in a context of {longest}: shorten it"
            )

    items: list[Encoded] = []
    for index, each in enumerate(prompts):
        with located(f"gradsafe.correct: prompts[{index}]"):
            items.append(encode(tokenizer, each, prefix, encoding))
        check(index, items[index].prompt_length, "the prompt")
    flags = detector.flag(prompts, batch_tokens, progress).tolist()
    for index, flag in enumerate(flags):
        if flag:
            check(index, len(items[index]), "the prompt with the prefix")
    found: list[list[int]] = [[] for _ in items]
    for flagged in (False, True):
        chosen = [index for index, flag in enumerate(flags) if flag == flagged]
        answers = generate(
            model,
            tokenizer,
            [items[index] for index in chosen],
            keep_response=flagged,
            batch_tokens=batch_tokens,
            **generation,
        )
        for index, ids in zip(chosen, answers, strict=True):
            item = items[index]
            found[index] = item.input_ids[item.prompt_length :] + ids if flagged else ids
    result = [
        Answer(tokenizer.decode(ids, skip_special_tokens=True), flag, ids)
        for ids, flag in zip(found, flags, strict=True)
    ]
    return result[0] if one else result
