"""Hidden states and their loss gradients at chosen layers: one forward, a truncated backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from gradsafe._fallback import announce_fallback
from gradsafe.models import Encoded
from gradsafe.models.compat import cache_argument, is_recurrent, returned_cache
from gradsafe.models.decoder import decoder_blocks
from gradsafe.models.inspection import base_model, forward_parameters, input_device
from gradsafe.models.modes import decoder_loop, evaluating, frozen
from gradsafe.models.threads import alone, own


class LayerView(NamedTuple):
    """States and gradients of one layer for a batch, on the CPU, float32 (float64 if the model is).

    Attributes:
        state: `[B, d]` hidden state at the last prompt token.
        gradients: `[B, R, d]` gradient of each row's mean response NLL at the positions that
            predict its response; row i predicts response token i, so row 0 is at the last prompt
            token. Zero after a row's last token. R is 1 if only the first row was asked for.
    """

    state: Tensor
    gradients: Tensor


class Padded(NamedTuple):
    """Token ids of a batch, `[B, T]` int64 each."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


class ResponsePass:
    """Runs batches of encoded samples through a model.

    The state and the gradient at position p of layer l depend on positions before p only through
    the keys and values of the layers above (causal attention). So the prompt without its last token
    goes into a cache without a graph, and the last prompt token and the response run against it.
    The hidden states are detached at the lowest layer asked for; nothing below is differentiated.

    Args:
        model: A causal language model of transformers, PEFT wrapper or not. Its weights are frozen
            and dropout is off while a batch runs; all flags are restored.
        layers: Indices into `hidden_states`, see `resolve_layer`.
        pad_id: Token id of the padding.

    Raises:
        ValueError: The model has a prompt-learning adapter, or its blocks are not found.
        RuntimeError: The model needs the slower path and GRADSAFE_STRICT is set.
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
        self.decoder = decoder_loop(model, self.blocks)  # the head reads its output
        self.device = input_device(model) or torch.device("cpu")
        self.accepted = forward_parameters(model)
        self.cache_name = cache_argument(self.accepted)  # None: whole sequences
        # At the last layer a state reaches the loss only through its own logits.
        self.prompt_only = self.layers == [len(self.blocks)]
        if self.cache_name is None:
            self._announce("its forward takes no cache of keys and values")
        elif is_recurrent(base_model(model)):
            self._announce("it carries a recurrent state, which cannot continue by several tokens")

    def views(self, items: Sequence[Encoded], *, first_only: bool = False) -> dict[int, LayerView]:
        """States and gradients per layer.

        With `first_only` the last layer takes a forward pass over the prompts and one product with
        the output head: g = W^T (softmax(W h) - onehot(y_1)) / R for a plain head W. Autograd
        through the model's own head covers scaled and soft-capped logits, too.
        """
        first_only = first_only and self.prompt_only
        responses = [item.input_ids[item.prompt_length :] for item in items]
        with (
            torch.inference_mode(False),  # in which there are no gradients
            alone(self.model),
            frozen(self.model),
            evaluating(self.model, ()),
        ):
            targets = self._pad([ids[:1] if first_only else ids for ids in responses])
            prepared = None
            if self.cache_name is not None and not first_only:
                prepared = self._after_cached_prompts(items, self.cache_name)
                if prepared is None:
                    self._announce("its forward returns no cache")
            if prepared is None:
                prepared = self._whole(items, targets.attention_mask, first_only)
            return self._run(items, *prepared, targets)

    def _run(
        self, items: Sequence[Encoded], arguments: dict[str, Any], columns: Tensor, targets: Padded
    ) -> dict[int, LayerView]:
        """One forward and one backward; `columns` `[B, R]` predict the `targets`."""
        held: dict[int, Tensor] = {}
        with torch.enable_grad(), ExitStack() as stack:
            for layer in self.layers:
                stack.callback(self._hold(layer, held).remove)
            logits = self._logits(arguments, columns)
            nll = functional.cross_entropy(
                logits.flatten(0, 1),
                targets.input_ids.to(logits.device).flatten(),
                reduction="none",
            ).view(columns.shape)
            nll = torch.where(targets.attention_mask.to(nll.device) > 0, nll, 0)
            # Samples are independent in a batch: the sum gives each row's own gradient.
            counts = torch.tensor([item.response_length for item in items])
            loss = (nll.sum(1) / counts.to(nll.device, nll.dtype)).sum()
            self._check(held, arguments["input_ids"].shape)
            if not loss.requires_grad:
                raise RuntimeError(
                    f"gradsafe.tracing: the logits of {type(base_model(self.model)).__name__} do "
                    f"not depend on its hidden state at layer {self.layers[0]}; choose another "
                    f"layer"
                )
            gradients = torch.autograd.grad(loss, [held[layer] for layer in self.layers])
        rows = torch.arange(len(columns))[:, None]
        found = {}
        for layer, gradient in zip(self.layers, gradients, strict=True):
            places = rows.to(gradient.device), columns.to(gradient.device)
            real = targets.attention_mask.to(gradient.device)[..., None] > 0
            picked = torch.where(real, gradient[places], 0)
            found[layer] = LayerView(_plain(held[layer].detach()[places][:, 0]), _plain(picked))
        return found

    def _logits(self, arguments: dict[str, Any], columns: Tensor) -> Tensor:
        """`[B, R, V]` at these columns."""
        width = arguments["input_ids"].shape[1]
        columns = columns.to(self.device)
        if "logits_to_keep" in self.accepted:
            kept = torch.unique(columns)
            arguments = {**arguments, "logits_to_keep": kept}
            columns, width = torch.searchsorted(kept, columns), len(kept)
        output = self.model(**arguments)
        logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
        if logits.shape[1] != width:
            raise RuntimeError(
                f"gradsafe.tracing: expected {type(self.model).__name__} to return logits for "
                f"{width} positions, got {logits.shape[1]}"
            )
        columns = columns.to(logits.device)
        every = torch.arange(width, device=columns.device).expand(len(columns), -1)
        if not torch.equal(columns, every):  # a copy of [B, R, V]
            logits = logits[torch.arange(len(columns), device=logits.device)[:, None], columns]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _after_cached_prompts(
        self, items: Sequence[Encoded], cache_name: str
    ) -> tuple[dict[str, Any], Tensor] | None:
        """The last prompt token and the response, the rest in a cache; None without a cache."""
        known = torch.tensor([item.prompt_length - 1 for item in items])
        # Padding on the outer sides only: a row's tokens stay neighbors, as sliding windows need.
        prefix = self._pad([item.input_ids[: item.prompt_length - 1] for item in items], "left")
        tail = self._pad([item.input_ids[item.prompt_length - 1 : -1] for item in items])
        tail.position_ids.add_(tail.attention_mask * known[:, None])
        arguments = model_inputs(self.accepted, tail, self.device) | {"use_cache": False}
        if prefix.input_ids.shape[1]:
            kept = {"logits_to_keep": 1} if "logits_to_keep" in self.accepted else {}
            inputs = model_inputs(self.accepted, prefix, self.device)
            with torch.no_grad():
                cache = returned_cache(self.model(**inputs, use_cache=True, **kept))
            if cache is None:
                return None
            mask = torch.cat([prefix.attention_mask, tail.attention_mask], 1).to(self.device)
            arguments |= {cache_name: cache, "attention_mask": mask, "use_cache": True}
        return arguments, torch.arange(tail.input_ids.shape[1]).repeat(len(items), 1)

    def _whole(
        self, items: Sequence[Encoded], real: Tensor, prompts_only: bool
    ) -> tuple[dict[str, Any], Tensor]:
        """Sequences from their first token; the last response token predicts nothing."""
        ends = [item.prompt_length if prompts_only else len(item) - 1 for item in items]
        padded = self._pad([item.input_ids[:end] for item, end in zip(items, ends, strict=True)])
        first = torch.tensor([item.prompt_length - 1 for item in items])
        columns = first[:, None] + torch.arange(real.shape[1]) * real
        return model_inputs(self.accepted, padded, self.device) | {"use_cache": False}, columns

    def _pad(
        self, rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "right"
    ) -> Padded:
        ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
        positions = (mask.cumsum(1) - 1) * mask
        return Padded(pad_sequence(ids, True, self.pad_id, side), mask, positions)

    def _hold(self, layer: int, held: dict[int, Tensor]) -> Any:
        """Hook that keeps a layer's hidden states; the graph begins at the lowest layer."""

        def take(hidden: Tensor) -> Tensor:
            if layer == self.layers[0]:
                hidden = hidden.detach().requires_grad_(True)
            held[layer] = hidden
            return hidden

        if layer == len(self.blocks):
            return self.decoder.register_forward_hook(own(_on_output(take)))
        hook = own(_on_input(take))
        return self.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)

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
        self.cache_name = None
        announce_fallback(
            f"gradsafe.tracing: {type(base_model(self.model)).__name__} runs over whole sequences, "
            f"which costs more than the prompt and the response separately: {reason}"
        )


def model_inputs(accepted: Collection[str], batch: Any, device: torch.device) -> dict[str, Any]:
    """The tensors of a padded batch as arguments of a forward that accepts these names."""
    names = ["input_ids", "attention_mask", *{"position_ids"}.intersection(accepted)]
    return {name: getattr(batch, name).to(device) for name in names}


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
    return values.to("cpu", torch.promote_types(values.dtype, torch.float32))
