"""Which tokens of a training response made it similar to a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models import Encoded, pad_token_id
from gradsafe.tracing.signature import SignaturePass

_INCOMPLETE = "\ufffd"  # what a decoder writes for a character whose bytes are not all there


def unit_gradients(model: nn.Module, tokenizer: Any, item: Encoded, layer: int) -> Tensor:
    """Rows of the response gradient of one sample, each of length 1, `[R, d]` float64.

    Row i is the gradient of the mean response NLL with respect to the hidden state that predicts
    response token i. A zero row stays zero.
    """
    runner = SignaturePass(model, [layer], pad_token_id(tokenizer))
    rows = runner.views([item])[layer].gradients[0].double()
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms, 0.0)


def token_influence(train: Tensor, test: Tensor) -> Tensor:
    """Influence of every training token: (sum of the test rows) . (train rows), `[R_train]`.

    Both are rows of length 1, see `unit_gradients`; so every token's influence lies between
    -R_test and R_test, and the sum over the training tokens is the same with the two exchanged.
    (arXiv 2510.02334; the published code has no token level.)
    """
    return train @ test.sum(0)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Decode token by token, so that the pieces join to the text of the whole.

    A character of several tokens is the piece of its last token; the others are empty.
    """
    pieces: list[str] = []
    begin = done = 0  # [begin, done) is context, [done, end) waits for the rest of a character
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[begin:done])
        text = _decode(tokenizer, ids[begin:end])
        if end < len(ids) and text.endswith(_INCOMPLETE):
            pieces.append("")
        else:
            pieces.append(text[len(before) :])
            begin, done = done, end
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text
