"""Which tokens of a training response made it similar to a query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models import Encoded, pad_token_id
from gradsafe.tracing.signature import SignaturePass


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
