"""A part of an index: signatures of some samples, their ids and their token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.models import Encoded
from gradsafe.tracing.examples import Id


@dataclass(frozen=True)
class ShardPlan:
    """Which samples a shard holds, `[first, first + count)`, and its file."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Shard:
    """Contents of one shard of R rows; a sample has several rows if it came in windows.

    Attributes:
        signatures: `[R, 2d]` float32, as computed.
        owners: `[R]` int64, number of the sample of each row.
        ids: Ids of its samples, in order.
        items: Token ids of each row.
    """

    signatures: Tensor
    owners: Tensor
    ids: list[Id]
    items: list[Encoded]

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds."""
        flat = [token for item in self.items for token in item.input_ids]
        return {
            "signatures": self.signatures.float().contiguous(),
            "owners": self.owners,
            "ids": torch.frombuffer(bytearray(json.dumps(self.ids).encode()), dtype=torch.uint8),
            "tokens": torch.tensor(flat, dtype=torch.int32),
            "lengths": torch.tensor([len(item) for item in self.items]),
            "prompt_lengths": torch.tensor([item.prompt_length for item in self.items]),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Shard:
        """The contents of a file."""
        tokens = tensors["tokens"].tolist()
        lengths, prompts = tensors["lengths"].tolist(), tensors["prompt_lengths"].tolist()
        items, begin = [], 0
        for length, prompt in zip(lengths, prompts, strict=True):
            items.append(Encoded(tokens[begin : begin + length], prompt))
            begin += length
        return cls(tensors["signatures"], tensors["owners"], parse_ids(tensors["ids"]), items)


def parse_ids(values: Tensor) -> list[Id]:
    """Ids from the bytes of their JSON."""
    ids: list[Id] = json.loads(bytes(values.numpy()).decode())
    return ids
