"""Weight gradients of single prompts, one layer at a time, from batched backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradsafe._fallback import announce_fallback
from gradsafe.detection.components import ComponentMap
from gradsafe.detection.factors import Buffers, Factors, MatrixFactors, StackFactors
from gradsafe.detection.rows import Rows
from gradsafe.models import (
    Encoded,
    Layers,
    LinearLayer,
    Routing,
    capture,
    collate,
    pad_token_id,
    plan_batches,
    response_nll,
)
from gradsafe.models.modes import evaluating
from gradsafe.ops import Axis

Visit = Callable[[LinearLayer, Factors], None]


class NonFiniteGradientError(ValueError):
    """A gradient holds NaN or Inf; the message names the layer and the prompt."""


class GradientPass:
    """Runs encoded prompts through a model in batches of similar length.

    Args:
        model: Causal language model.
        layers: Scored layers.
        tokenizer: Its padding token fills short rows.
        batch_tokens: Padded tokens per batch.
        rows: Rows that are kept of each weight; empty for all.
    """

    def __init__(
        self, model: nn.Module, layers: Layers, tokenizer: Any, batch_tokens: int, rows: Rows
    ) -> None:
        self.model = model
        self.layers = layers
        self.pad_id = pad_token_id(tokenizer)
        self.batch_tokens = batch_tokens
        self.rows = rows

    def run(
        self,
        items: Sequence[Encoded],
        begin: Callable[[list[int]], Visit] | None,
        end: Callable[[list[int]], None] | None = None,
        progress: str | None = None,
    ) -> Tensor:
        """Process all items.

        Args:
            items: Encoded prompts.
            begin: Called with the indices of each batch; returns the visitor of its layers. None
                for a forward pass without gradients.
            end: Called with the indices after a batch's backward pass.
            progress: Label of a progress bar over the items, None for no bar.

        Returns:
            `[n]` float32 NLL of each item's response, in input order.
        """
        nll = torch.empty(len(items), dtype=torch.float32)
        budget = self.batch_tokens
        if begin is not None and self.layers.one_at_a_time and len(items) > 1:
            budget = 1
            announce_fallback(
                "gradsafe.Detector: prompts run one at a time, since this model "
                + (
                    "does not show which sample a row of its experts belongs to"
                    if self.layers.padding
                    else "computes something else for a prompt with padding behind it"
                )
            )
        with tqdm(total=len(items), desc=progress, disable=progress is None, unit="prompt") as bar:
            for indices in plan_batches([len(item) for item in items], budget):
                visit = begin(indices) if begin is not None else None
                batch = [items[i] for i in indices]
                with self._explained(batch):
                    nll[indices] = self._batch(batch, visit)
                if end is not None:
                    end(indices)
                bar.update(len(indices))
        return nll

    @contextmanager
    def _explained(self, batch: list[Encoded]) -> Iterator[None]:
        """Says what to do when memory runs out."""
        try:
            yield
        except RuntimeError as error:
            # The CPU's allocator has no exception of its own.
            if not (
                isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
            ):
                raise
            longest = max(len(item) for item in batch)
            advice = (
                f"lower batch_tokens, now {self.batch_tokens}"
                if len(batch) > 1
                else "it cannot be split; free memory, or use a smaller dtype or row_fraction"
            )
            raise torch.OutOfMemoryError(
                f"gradsafe.Detector: out of memory in a batch of {len(batch)} prompts of up to "
                f"{longest} tokens: {advice}"
            ) from error

    def _batch(self, items: list[Encoded], visit: Visit | None) -> Tensor:
        batch = collate(items, self.pad_id)
        if visit is None:
            with torch.no_grad(), evaluating(self.model, ()):
                return response_nll(self.model, batch).float().cpu()

        width = batch.input_ids.shape[1]

        def consume(
            layer: LinearLayer, x: Tensor, dy: Tensor, routing: Routing | None = None
        ) -> None:
            if dy.dtype == torch.float64:
                raise TypeError(
                    "gradsafe.Detector: float64 models are not supported; call model.float() first"
                )
            if self.rows:  # the others are never computed
                dy = dy.index_select(-1, self.rows[layer.name].to(dy.device))
            if routing is not None:
                visit(layer, StackFactors.of(x, dy, routing, batch.lengths, layer.experts))
                return
            repeat, lengths = 0, [x.shape[1]] * len(items)
            if layer.layout is not None and layer.layout.time is not None:
                repeat = x.shape[1] // width
                lengths = [repeat * length for length in batch.lengths]
            visit(layer, MatrixFactors(x.contiguous(), dy.contiguous(), lengths, repeat))

        with torch.enable_grad(), capture(self.model, self.layers, consume):
            loss = response_nll(self.model, batch)
            # Samples do not meet in a batch: the gradient of the sum holds each prompt's own.
            loss.sum().backward()
        return loss.detach().float().cpu()


class TableCollector:
    """Turns a batch's gradients into a table of component sums, `[B, C, 3 + K]`.

    The gradients themselves are never stored, unless `prepare` has to change them: then one layer's
    gradient of one prompt exists at a time.

    Args:
        components: The component map.
        references: K references of a layer, each `[O, I]`, or `[E, O, I]` of a stack.
        scales: Factor of a layer's dots.
        unsigned: Dots of abs(g).
        prepare: Changes a gradient in place before it is read (ablations), given its axis.
        finish: Called with a batch's item indices and its table.
        owners: Number of the prompt each item comes from, for error messages.
    """

    def __init__(
        self,
        components: ComponentMap,
        references: Callable[[LinearLayer], list[Tensor]],
        scales: Callable[[LinearLayer], Sequence[float]],
        unsigned: bool,
        prepare: Callable[[Tensor, Axis], None] | None,
        finish: Callable[[list[int], Tensor], None],
        owners: Sequence[int],
    ) -> None:
        self.components = components
        self.references = references
        self.scales = scales
        self.unsigned = unsigned
        self.prepare = prepare
        self.finish = finish
        self.owners = owners
        self.buffers = Buffers()
        self._reached: list[tuple[LinearLayer, Tensor]] = []

    def begin(self, indices: list[int]) -> Visit:
        """Start a batch."""
        self._reached.clear()
        return self._visit

    def _visit(self, layer: LinearLayer, factors: Factors) -> None:
        axis = self.components[layer].axis
        refs = self.references(layer)
        if self.prepare is None:
            values = factors.moments(refs, axis, self.unsigned)
        else:
            rest = (self.prepare, self.buffers)
            values = factors.prepared_moments(refs, axis, self.unsigned, *rest)
        self._reached.append((layer, values))

    def end(self, indices: list[int]) -> None:
        """Bring the batch's sums together; devices are waited for here and not per layer."""
        table: Tensor | None = None
        for layer, device_values in self._reached:
            values = device_values.cpu()
            for k, scale in enumerate(self.scales(layer)):
                values[..., 3 + k] *= scale
            if table is None:
                shape = (len(indices), self.components.size, values.shape[-1])
                table = torch.zeros(shape, dtype=torch.float64)
            _check_finite(layer, [self.owners[i] for i in indices], values)
            self.components.add(table, layer, values)
        self._reached.clear()
        assert table is not None
        self.finish(indices, table)


def _check_finite(layer: LinearLayer, prompts: list[int], values: Tensor) -> None:
    bad = (~torch.isfinite(values)).flatten(1).any(1)
    if bad.any():
        raise NonFiniteGradientError(
            f"gradsafe.Detector: the gradient of {layer.name} holds NaN or Inf for "
            f"prompts[{prompts[int(bad.nonzero()[0])]}]; check the model's weights, or run it in "
            "bfloat16 or float32 if it is in float16"
        )
