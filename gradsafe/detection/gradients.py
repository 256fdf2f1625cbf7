"""Weight gradients of single prompts, one layer at a time, from batched backward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradsafe._checks import refuse
from gradsafe._fallback import announce_fallback
from gradsafe.detection.components import Rows
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.factors import Factors, MatrixFactors, StackFactors
from gradsafe.models import (
    Encoded,
    Encoding,
    Layers,
    LinearLayer,
    Prompt,
    Routing,
    capture,
    collate,
    context_length,
    encode_prompts,
    pad_token_id,
    plan_batches,
    response_nll,
)
from gradsafe.models.hidden import hidden_states
from gradsafe.models.inspection import check_token_ids
from gradsafe.models.modes import checkpointing_modules, evaluating
from gradsafe.models.opening import Opening, obstacle
from gradsafe.models.threads import alone
from gradsafe.models.windows import expect_prompts

Visit = Callable[[LinearLayer, Factors], None]

# Forward passes share what all prompts begin with from so many tokens on.
SHARED_FROM = 64


class NonFiniteGradientError(ValueError):
    """A gradient holds NaN or Inf; the message names the layer and the prompt."""


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as token ids, for one detector; see `Detector.encode`. A slice of it is one, too."""

    names: Sequence[str]  # what error messages call the prompts
    windows: Sequence[Sequence[Encoded]]  # of each prompt; one unless the prompt is too long

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, part: slice) -> EncodedPrompts:
        return EncodedPrompts(self.names[part], self.windows[part])

    @property
    def items(self) -> list[Encoded]:
        """All windows."""
        return [item for items in self.windows for item in items]

    @property
    def owners(self) -> list[int]:
        """Index of the prompt that each window belongs to."""
        return [index for index, items in enumerate(self.windows) for _ in items]


@dataclass(frozen=True)
class GradientPass:
    """Runs prompts through a model in batches of `batch_tokens`, padding included."""

    model: nn.Module
    tokenizer: Any
    config: DetectorConfig
    layers: Layers
    rows: Rows
    batch_tokens: int
    progress: bool
    owner: str = "Detector"  # public name that error messages begin with

    def encode(
        self, prompts: Sequence[Prompt] | EncodedPrompts, names: str | Sequence[str]
    ) -> EncodedPrompts:
        """See `Detector.encode`; encoded prompts stay as they are."""
        if self.config.prefix == "cut":
            self._check_cut()
        if isinstance(prompts, EncodedPrompts):
            if not len(prompts):
                refuse(self.owner, "at least one prompt", "none")
            return prompts
        expect_prompts(prompts)
        if isinstance(names, str):
            names = [f"{names}[{index}]" for index in range(len(prompts))]
        if len(names) != len(prompts):
            refuse(self.owner, f"a name for each of {len(prompts)} prompts", len(names))
        encoding = Encoding(
            template=self.config.template,
            system=self.config.system,
            append_eos=self.config.eos,
            overflow=self.config.overflow,
            max_length=context_length(self.model, self.tokenizer),
            split_special_tokens=self.config.split_special_tokens,
        )
        items, owners = encode_prompts(
            self.tokenizer,
            prompts,
            self.config.response,
            encoding,
            names=names,
            turns=self.config.turns,
        )
        windows: list[list[Encoded]] = [[] for _ in prompts]
        for item, owner in zip(items, owners, strict=True):
            windows[owner].append(item)
        largest = [max(max(item.input_ids) for item in parts) for parts in windows]
        check_token_ids("Detector", self.model, largest, names)
        return EncodedPrompts(names, windows)

    def _check_cut(self) -> None:
        reason = self._obstacle()
        start = min((layer.block for layer in self.layers.scored), default=0)
        if checkpointing_modules(self.model, self.layers.blocks, start):
            reason = "its activation checkpointing drops the cache; switch it off"
        if reason is not None:
            raise ValueError(
                f'gradsafe.Detector: prefix="cut" does not work with {type(self.model).__name__}: '
                f"{reason}; leave prefix out"
            )

    def losses(self, items: Sequence[Encoded], visit: Visit | None, label: str = "") -> Tensor:
        """`[n]` float32 NLL of each item's response, in input order; see `run`."""
        nll = torch.empty(len(items), dtype=torch.float32)
        for indices, batch_nll, _ in self.run(items, visit, label):
            nll[indices] = batch_nll
        return nll

    def run(
        self, items: Sequence[Encoded], visit: Visit | None, label: str, blocks: Sequence[int] = ()
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield the indices of each batch, its NLL `[B]` and hidden states `[B, blocks * H]`.

        Both are float32, on the CPU; the states are those of `blocks` at the last prompt token.
        Before that, `visit` was called for every layer, last block first; None means a forward pass
        without gradients. `label` names the progress bar; without one there is none.
        """
        budget = self.batch_tokens
        mixed = self.layers.one_at_a_time and len(items) > 1
        if mixed and (visit is not None or blocks):
            budget = 1
            reason = "does not show which sample a row of its experts belongs to"
            if not self.layers.padding:
                reason = "computes something else for a prompt with padding after it"
            announce_fallback(
                f"gradsafe.{self.owner}: prompts run one at a time, since this model {reason}"
            )
        if visit is not None and torch.is_inference_mode_enabled():
            visit = torch.inference_mode()(visit)  # it updates tensors of the caller
        hidden = not (self.progress and label)
        with tqdm(total=len(items), desc=label, disable=hidden, unit="prompt") as bar:
            for indices, opening in self._batches(items, visit, budget):
                batch = [items[i] for i in indices]
                try:
                    with torch.inference_mode(False):  # in which there are no gradients
                        nll, states = self._batch(batch, visit, blocks, opening)
                except RuntimeError as error:
                    self._advise_on_memory(error, batch)
                    raise
                yield indices, nll, states
                bar.update(len(indices))

    def _batches(
        self, items: Sequence[Encoded], visit: Visit | None, budget: int
    ) -> Iterator[tuple[list[int], Opening | None]]:
        """Indices of each batch, and what stands before all of its rows, if it is shared.

        Only the prompt decides whether its opening is cut off, never the rest of its batch.
        """
        first = self._first_shared(items, visit)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(items):
            length = item.opening if item.opening >= first else 0
            groups.setdefault(tuple(item.input_ids[:length]), []).append(index)
        single = [ids for ids, members in groups.items() if ids and len(members) == 1]
        if visit is None and single:  # nothing is shared, and batches of one are slow
            rest = [groups.pop(ids)[0] for ids in single]
            groups.setdefault((), []).extend(rest)
        for ids, members in groups.items():
            opening = None
            if ids:
                with torch.inference_mode(False), alone(self.model), evaluating(self.model, ()):
                    opening = Opening(self.model, ids)
            # Keys and values take about an eighth of the memory of a token that runs.
            lengths = [len(items[i]) - len(ids) + len(ids) // 8 for i in members]
            for places in plan_batches(lengths, budget):
                yield [members[place] for place in places], opening

    def _first_shared(self, items: Sequence[Encoded], visit: Visit | None) -> float:
        """Length from which openings run once; Inf for none."""
        if visit is not None:
            return 1 if self.config.prefix == "cut" else math.inf
        if all(item.opening < SHARED_FROM for item in items):
            return math.inf
        reason = self._obstacle()
        if reason is None:
            return SHARED_FROM
        announce_fallback(
            f"gradsafe.{self.owner}: what all prompts begin with runs once per prompt: the model's "
            f"class is {type(self.model).__name__}, and {reason}"
        )
        return math.inf

    def _obstacle(self) -> str | None:
        if self.layers.continues:
            return None
        return obstacle(self.model) or "its cache holds not only keys and values of earlier tokens"

    def _advise_on_memory(self, error: RuntimeError, batch: list[Encoded]) -> None:
        # The CPU's allocator raises a plain RuntimeError.
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            longest = max(len(item) for item in batch)
            advice = "it cannot be split; free memory, or use a smaller dtype or row_fraction"
            if len(batch) > 1:
                advice = f"lower batch_tokens, now {self.batch_tokens}"
            raise torch.OutOfMemoryError(
                f"gradsafe.{self.owner}: out of memory in a batch of {len(batch)} prompts of up to "
                f"{longest} tokens: {advice}"
            ) from error

    def _batch(
        self,
        items: list[Encoded],
        visit: Visit | None,
        blocks: Sequence[int],
        opening: Opening | None,
    ) -> tuple[Tensor, Tensor]:
        if opening is not None:
            items = [item.after(opening.length) for item in items]
        batch = collate(items, pad_token_id(self.tokenizer, self.model))
        states = torch.empty(len(items), 0)

        def forward() -> Tensor:
            nonlocal states
            with hidden_states(self.layers.blocks, blocks, batch) as found:
                loss = response_nll(self.model, batch, opening)
            if blocks:
                states = torch.cat([found[block].cpu() for block in blocks], 1)
            return loss

        if visit is None:
            with alone(self.model), torch.no_grad(), evaluating(self.model, ()):
                return forward().float().cpu(), states
        width = batch.input_ids.shape[1]

        def consume(
            layer: LinearLayer, x: Tensor, dy: Tensor, routing: Routing | None = None
        ) -> None:
            if dy.dtype == torch.float64:
                raise TypeError(
                    f"gradsafe.{self.owner}: float64 models are not supported; call model.float() "
                    "first"
                )
            if self.rows:  # the other rows are never computed
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
            loss = forward()
            # Samples of a batch are independent: the gradient of the sum holds each prompt's own.
            loss.sum().backward()
        return loss.detach().float().cpu(), states
