"""RepT's signature of a sample: hidden state and loss gradient at the last prompt token."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradsafe.models import Encoded, plan_batches
from gradsafe.models.decoder import decoder_blocks
from gradsafe.tracing.config import LAST
from gradsafe.tracing.response_pass import ResponsePass

# Responses whose lengths differ by less share a batch: the backward pass runs over them.
RESPONSE_STEP = 16


class NonFiniteSignatureError(ValueError):
    """A signature holds NaN or Inf; the message names the sample."""


def resolve_layer(model: nn.Module, layer: int | Literal["last"]) -> int:
    """Return the index into transformers' `hidden_states`, from 0 to L (the number of blocks).

    Index 0 is the input of the first block, l the input of block l (the output of the block before
    it), and L, which is also "last" and -1, the output of the final norm that the head reads.

    Args:
        model: A causal language model.
        layer: "last" or an index; negative ones count from the end.

    Raises:
        TypeError: `layer` is neither "last" nor an int.
        ValueError: It is out of range.
    """
    depth = len(decoder_blocks(model))
    if layer == LAST:
        return depth
    if isinstance(layer, (bool, str, float)):
        raise TypeError(f'gradsafe.tracing: expected layer="last", "auto" or an int, got {layer!r}')
    index = operator.index(layer)
    if not -depth - 1 <= index <= depth:
        raise ValueError(
            f"gradsafe.tracing: layer {index} is out of range; the model has {depth} blocks, so "
            f"pass 0 (input of the first block) to {depth} (after the final norm), or -1 to "
            f"{-depth - 1}"
        )
    return index % (depth + 1)


class SignaturePass(ResponsePass):
    """Signatures of batches at one or several layers.

    Signature of (prompt, response) at layer l: `[h ; g]`, 2d values, h the hidden state at the last
    prompt token and g the gradient of the mean NLL of the response with respect to it
    (arXiv 2510.02334). The parts are concatenated unscaled; `Metric` scales them later.
    """

    def plan(self, items: Sequence[Encoded], batch_tokens: int) -> list[list[int]]:
        """Group samples under a budget of padded tokens, the largest batches first.

        A batch takes `B * (columns of the prompts + columns of the responses)`; a sample above the
        budget is a batch of its own. Every index into `items` occurs once.
        """
        if self.prompt_only:
            return plan_batches([item.prompt_length for item in items], batch_tokens)
        return _plan_pairs(items, batch_tokens)

    def batch(self, items: Sequence[Encoded]) -> dict[int, Tensor]:
        """Signatures `[B, 2d]` per layer, on the CPU, float32 (float64 for a float64 model)."""
        views = self.views(items, first_only=True)
        return {
            layer: torch.cat([view.state, view.gradients[:, 0]], 1) for layer, view in views.items()
        }


def signatures(
    model: nn.Module,
    items: Sequence[Encoded],
    layers: Sequence[int],
    pad_id: int,
    batch_tokens: int = 4096,
    progress: str | None = None,
    *,
    names: Sequence[str] | None = None,
) -> dict[int, Tensor]:
    """Compute signatures, several layers in one pass.

    The result does not depend on how samples share batches (1e-5 relative in float32).

    Args:
        model: A causal language model.
        items: Encoded samples, see `gradsafe.models.encode`.
        layers: Indices into `hidden_states`, see `resolve_layer`.
        pad_id: Token id of the padding, see `gradsafe.models.pad_token_id`.
        batch_tokens: Padded tokens per batch; lower it if memory runs out.
        progress: Label of a progress bar, None for none.
        names: What messages call the items; None for their numbers.

    Returns:
        `[n, 2d]` per layer, in the order of `items`.

    Raises:
        ValueError: No items or layers, an index out of range, a prompt-learning adapter, or (as
            NonFiniteSignatureError) NaN or Inf; the message names the item.
        RuntimeError: A slower path is needed and GRADSAFE_STRICT is set.

    Warns:
        FallbackWarning: The model keeps no cache of keys and values, so whole sequences run.
    """
    if len(items) == 0 or len(layers) == 0:
        raise ValueError("gradsafe.signatures: expected at least one item and one layer, got none")
    chosen = [resolve_layer(model, layer) for layer in layers]
    runner = SignaturePass(model, chosen, pad_id)
    found: dict[int, Tensor] = {}
    with tqdm(total=len(items), desc=progress, disable=progress is None, unit="sample") as bar:
        for indices in runner.plan(items, batch_tokens):
            for layer, values in runner.batch([items[i] for i in indices]).items():
                check_finite(values, [names[i] if names else f"items[{i}]" for i in indices])
                if layer not in found:
                    found[layer] = values.new_empty(len(items), values.shape[1])
                found[layer][indices] = values
            bar.update(len(indices))
    return found


def check_finite(values: Tensor, names: Sequence[str]) -> None:
    """Raise NonFiniteSignatureError for the first row of `[B, 2d]` with NaN or Inf."""
    bad = (~torch.isfinite(values)).any(1)
    if bad.any():
        raise NonFiniteSignatureError(
            f"gradsafe.tracing: the signature of {names[int(bad.nonzero()[0])]} holds NaN or Inf; "
            "check the model's weights, or run it in bfloat16 or float32 if it is in float16"
        )


def _plan_pairs(items: Sequence[Encoded], batch_tokens: int) -> list[list[int]]:
    if batch_tokens < 1:
        raise ValueError(f"gradsafe.signatures: expected batch_tokens >= 1, got {batch_tokens}")

    def rank(index: int) -> tuple[int, int]:
        item = items[index]
        return -(item.response_length // RESPONSE_STEP), -item.prompt_length

    batches: list[list[int]] = []
    widest = longest = 0
    for index in sorted(range(len(items)), key=rank):
        prompt, response = items[index].prompt_length, items[index].response_length
        wider, longer = max(widest, prompt), max(longest, response)
        if batches and (len(batches[-1]) + 1) * (wider + longer) <= batch_tokens:
            batches[-1].append(index)
            widest, longest = wider, longer
        else:
            batches.append([index])
            widest, longest = prompt, response
    return batches
