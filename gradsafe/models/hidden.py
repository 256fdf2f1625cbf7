"""Hidden states of decoder blocks at the last prompt token, from a pass that runs anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models.batching import Batch
from gradsafe.models.threads import own


@contextmanager
def hidden_states(
    blocks: nn.ModuleList, chosen: Sequence[int], batch: Batch
) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs `[B, H]` float32 of chosen blocks at the last prompt token.

    Only forward passes of this thread are seen. Of a block that runs several times, the last run
    counts. Leave the context before the backward pass, which may recompute the forward pass.

    Args:
        blocks: The decoder's blocks, `Layers.blocks`.
        chosen: Indices of blocks.
        batch: The batch that runs inside the context, padded on either side.

    Yields:
        A dict from index to states, on the block's device and without a graph; filled by the
        forward pass.

    Raises:
        ValueError: In the forward pass, a block's output is not `[B, T, H]`.
    """
    found: dict[int, Tensor] = {}
    columns = [a + n - 1 for a, n in zip(batch.starts, batch.prompt_lengths, strict=True)]

    def hook(index: int) -> Callable[..., None]:
        def take(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            if shape[:2] != tuple(batch.input_ids.shape) or len(shape) != 3:
                raise ValueError(
                    f"gradsafe.hidden_states: expected block {index} to return "
                    f"{list(batch.input_ids.shape)} hidden states, got {shape}; this model has "
                    'none to learn from, use features="components"'
                )
            with torch.no_grad():
                found[index] = states[range(len(columns)), columns].float()

        return take

    with ExitStack() as stack:
        for index in chosen:
            stack.callback(blocks[index].register_forward_hook(own(hook(index))).remove)
        yield found
