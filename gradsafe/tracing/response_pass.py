"""Hidden states and their loss gradients at chosen layers: one forward, a truncated backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsafe._fallback import announce_fallback
from gradsafe.models import Encoded
from gradsafe.models.compat import cache_argument, is_recurrent, returned_cache
from gradsafe.models.decoder import decoder_blocks
from gradsafe.models.inspection import base_model, forward_parameters, input_device
from gradsafe.models.modes import decoder_loop


@dataclass(frozen=True)
class LayerView:
    """What one layer holds for a batch, on the CPU, float32 (float64 where the model is).

    Attributes:
        state: `[B, d]` hidden state at the last prompt token.
        gradients: `[B, R, d]` gradient of each row's mean response NLL at the positions that
            predict its response; row i predicts response token i, so row 0 stands at the last
            prompt token. Zero behind a row's last token. R is 1 in a prompt-only pass.
    """

    state: Tensor
    gradients: Tensor


@dataclass
class _Inputs:
    """Token ids whose logits are wanted, and where."""

    arguments: dict[str, Any]
    columns: Tensor  # [B, R] columns of the input that predict the response
    targets: Tensor  # [B, R] response tokens
    real: Tensor  # [B, R] bool, False behind a row's last token


class ResponsePass:
    """Runs batches of encoded samples through a model whose weights are frozen already.

    The state and the gradient at position p of layer l depend on positions before p only through
    the keys and values of the layers above (causal attention), so the prompt without its last token
    goes into a cache without any graph, and the last prompt token and the response run against it.
    The hidden states are detached at the lowest layer asked for: nothing below is differentiated.

    Args:
        model: A causal language model, PEFT wrapper or not; frozen and in eval mode.
        layers: Indices into `hidden_states` as transformers counts them: 0 is the input of the
            first block, l the input of block l, and L (the number of blocks) the output of the
            final norm.
        pad_id: Token id of the padding.

    Raises:
        ValueError: The model has a prompt-learning adapter, or its blocks are not found.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], pad_id: int) -> None:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "gradsafe.tracing: prompt-learning adapters put virtual tokens before the prompt "
                "and are not supported; use model.get_base_model() or a LoRA-like adapter"
            )
        self.model = model
        self.layers = sorted(set(layers))
        self.pad_id = pad_id
        self.blocks = decoder_blocks(model)
        self.decoder = decoder_loop(model, self.blocks)  # its output is what the head reads
        self.device = input_device(model) or torch.device("cpu")
        self.accepted = forward_parameters(model)
        self.cache_name = cache_argument(self.accepted)  # None: whole sequences
        if self.cache_name is None:
            self._announce("its forward takes no cache of keys and values")
        elif is_recurrent(base_model(model)):  # several tokens cannot go on from its state
            self.cache_name = None
            self._announce("it carries a recurrent state")

    @property
    def prompt_only(self) -> bool:
        """Whether the prompt alone is enough: the last layer reaches the loss only at its place."""
        return self.layers == [len(self.blocks)]

    def signature_views(self, items: Sequence[Encoded]) -> dict[int, LayerView]:
        """What a signature needs, per layer: state and row 0 of the gradients.

        At the last layer this is a forward pass over the prompts and one product with the output
        head: g = W^T (softmax(W h) - onehot(y_1)) / R_b for a plain head W; autograd through the
        model's own head covers scaled and soft-capped logits too.
        """
        if not self.prompt_only:
            return self.views(items)
        inputs = self._whole([(item.input_ids[: item.prompt_length], item) for item in items], 1)
        return self._run(inputs, [item.response_length for item in items])

    def views(self, items: Sequence[Encoded]) -> dict[int, LayerView]:
        """States and the gradients at all positions that predict the response, per layer."""
        counts = [item.response_length for item in items]
        if self.cache_name is not None:
            inputs = self._against_cache(items, self.cache_name)
            if inputs is not None:
                return self._run(inputs, counts)
            self.cache_name = None
            self._announce("its forward returns no cache")
        # The last response token predicts nothing that counts.
        rows = [(item.input_ids[:-1], item) for item in items]
        return self._run(self._whole(rows, max(counts)), counts)

    def _run(self, inputs: _Inputs, counts: list[int]) -> dict[int, LayerView]:
        held: dict[int, Tensor] = {}
        with torch.enable_grad(), ExitStack() as stack:
            for layer in self.layers:
                first = layer == self.layers[0]
                stack.callback(self._hold(layer, held, detach=first).remove)
            logits = self._logits(inputs)
            nll = functional.cross_entropy(
                logits.flatten(0, 1), inputs.targets.to(logits.device).flatten(), reduction="none"
            ).view(inputs.targets.shape)
            real = inputs.real.to(nll.device)
            nll = torch.where(real, nll, torch.zeros_like(nll))
            # Samples do not meet in a batch: the sum holds each row's own gradient.
            loss = (nll.sum(1) / torch.tensor(counts, device=nll.device, dtype=nll.dtype)).sum()
            self._check(held, inputs.arguments["input_ids"].shape)
            if not loss.requires_grad:
                raise RuntimeError(
                    f"gradsafe.tracing: the logits of {type(base_model(self.model)).__name__} do "
                    f"not depend on its hidden state at layer {self.layers[0]}; choose another "
                    f"layer"
                )
            gradients = torch.autograd.grad(loss, [held[layer] for layer in self.layers])
        found = {}
        for layer, gradient in zip(self.layers, gradients, strict=True):
            columns = inputs.columns.to(gradient.device)
            rows = torch.arange(len(columns), device=gradient.device)
            picked = gradient[rows[:, None], columns]
            picked = torch.where(inputs.real.to(picked.device)[..., None], picked, 0)
            state = held[layer].detach()[rows, columns[:, 0]]
            found[layer] = LayerView(_plain(state), _plain(picked))
        return found

    def _logits(self, inputs: _Inputs) -> Tensor:
        """`[B, R, V]` at the columns of `inputs`."""
        arguments = dict(inputs.arguments)
        columns, width = inputs.columns, arguments["input_ids"].shape[1]
        if "logits_to_keep" in self.accepted:
            kept = torch.unique(columns)
            arguments["logits_to_keep"] = kept
            columns, width = torch.searchsorted(kept, columns), len(kept)
        output = self.model(**arguments)
        logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
        if logits.shape[1] != width:
            raise RuntimeError(
                f"gradsafe.tracing: expected {type(self.model).__name__} to return logits for "
                f"{width} positions, got {logits.shape[1]}"
            )
        columns = columns.to(logits.device)
        in_place = columns.shape[1] == width and bool(
            (columns == torch.arange(width, device=columns.device)).all()
        )
        if not in_place:  # a copy of [B, R, V]
            logits = logits[torch.arange(len(columns), device=logits.device)[:, None], columns]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _against_cache(self, items: Sequence[Encoded], cache_name: str) -> _Inputs | None:
        """The last prompt token and the response against the cached rest; None without a cache."""
        known = [item.prompt_length - 1 for item in items]
        width, longest = max(known), max(item.response_length for item in items)
        # Left padding before, right padding behind: a row's tokens stay neighbors, as sliding
        # windows need it.
        prefix = _pad([item.input_ids[:n] for item, n in zip(items, known, strict=True)],
                      width, self.pad_id, left=True)  # fmt: skip
        tail = _pad([item.input_ids[n:-1] for item, n in zip(items, known, strict=True)],
                    longest, self.pad_id, left=False)  # fmt: skip
        tail.positions += tail.mask * torch.tensor(known)[:, None]
        arguments = self._arguments(tail)
        if width:
            with torch.no_grad():
                output = self.model(
                    **self._arguments(prefix),
                    use_cache=True,
                    **({"logits_to_keep": 1} if "logits_to_keep" in self.accepted else {}),
                )
            cache = returned_cache(output)
            if cache is None:
                return None
            mask = torch.cat([prefix.mask, tail.mask], 1).to(self.device)
            arguments |= {cache_name: cache, "attention_mask": mask, "use_cache": True}
        else:
            arguments["use_cache"] = False
        columns = torch.arange(longest).repeat(len(items), 1)
        return self._inputs(arguments, columns, items, longest)

    def _whole(self, rows: Sequence[tuple[list[int], Encoded]], longest: int) -> _Inputs:
        """Rows from their first token on, right-padded."""
        padded = _pad([ids for ids, _ in rows], max(len(ids) for ids, _ in rows), self.pad_id,
                      left=False)  # fmt: skip
        arguments = {**self._arguments(padded), "use_cache": False}
        items = [item for _, item in rows]
        first = torch.tensor([item.prompt_length - 1 for item in items])
        steps = torch.arange(longest)
        counts = torch.tensor([item.response_length for item in items])
        columns = first[:, None] + torch.where(steps < counts[:, None], steps, 0)
        return self._inputs(arguments, columns, items, longest)

    def _inputs(
        self, arguments: dict[str, Any], columns: Tensor, items: Sequence[Encoded], longest: int
    ) -> _Inputs:
        responses = [item.input_ids[item.prompt_length :][:longest] for item in items]
        targets = _pad(responses, longest, self.pad_id, left=False)
        device = self.device
        return _Inputs(
            arguments, columns.to(device), targets.ids.to(device), targets.mask.bool().to(device)
        )

    def _arguments(self, padded: _Padded) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "input_ids": padded.ids.to(self.device),
            "attention_mask": padded.mask.to(self.device),
        }
        if "position_ids" in self.accepted:
            arguments["position_ids"] = padded.positions.to(self.device)
        return arguments

    def _hold(self, layer: int, held: dict[int, Tensor], *, detach: bool) -> Any:
        """Hook that keeps a layer's hidden states, detached below where `detach` is set."""

        def take(hidden: Tensor) -> Tensor:
            held[layer] = hidden.detach().requires_grad_(True) if detach else hidden
            return held[layer]

        if layer == len(self.blocks):
            return self.decoder.register_forward_hook(_on_output(take))
        return self.blocks[layer].register_forward_pre_hook(_on_input(take), with_kwargs=True)

    def _check(self, held: dict[int, Tensor], shape: Sequence[int]) -> None:
        for layer in self.layers:
            found = list(held[layer].shape) if layer in held else None
            if found is None or len(found) != 3 or found[:2] != list(shape):
                raise RuntimeError(
                    f"gradsafe.tracing: expected hidden states [B, T, d] of "
                    f"{type(base_model(self.model)).__name__} at layer {layer} with [B, T] = "
                    f"{list(shape)}, got {found}; choose another layer"
                )

    def _announce(self, reason: str) -> None:
        announce_fallback(
            f"gradsafe.tracing: {type(base_model(self.model)).__name__} runs over whole sequences, "
            f"which costs more than prompt and response apart: {reason}"
        )


@dataclass
class _Padded:
    ids: Tensor
    mask: Tensor
    positions: Tensor


def _pad(rows: Sequence[Sequence[int]], width: int, pad_id: int, *, left: bool) -> _Padded:
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = width - len(row) if left else 0
        real = slice(start, start + len(row))
        ids[index, real] = torch.tensor(row, dtype=torch.int64)
        mask[index, real] = 1
        positions[index, real] = torch.arange(len(row))
    return _Padded(ids, mask, positions)


def _on_input(take: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            return (take(args[0]), *args[1:]), kwargs
        hidden = kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            return args, {**kwargs, "hidden_states": take(hidden)}
        raise RuntimeError(
            f"gradsafe.tracing: expected the block {type(module).__name__} to receive its hidden "
            f"states as first argument or as hidden_states="
        )

    return hook


def _on_output(take: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return take(output)
        if hasattr(output, "last_hidden_state"):
            output.last_hidden_state = take(output.last_hidden_state)
            return output
        return (take(output[0]), *output[1:])

    return hook


def _plain(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.promote_types(values.dtype, torch.float32))
