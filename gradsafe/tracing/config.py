"""Options of tracing; the command line and the documentation are generated from these classes.

This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gradsafe._checks import check_fields
from gradsafe.models import Encoding

PartNorm = Literal["none", "unit", "zscore"]
LayerRule = Literal["auto", "auto-lower", "auto-single"]
LAST = "last"
RULES: tuple[str, ...] = get_args(LayerRule)


@dataclass(frozen=True)
class TraceConfig:
    """Options of `TraceIndex.build`.

    Attributes:
        layer: Layer whose hidden states are compared: "last", an index into `hidden_states`, or a
            rule that chooses one: "auto" (the phase transition), "auto-lower" or "auto-single".
        part_norm: How queries compare signatures by default: "none", "unit" or "zscore". None for
            that of the existing index, and "unit" for a new one.
        shard_samples: Samples per file, and per turn of a process where several share the build.
            None for that of the existing index, and 1024 for a new one.
        template: Prompt template: a Jinja chat template, or a text with {prompt} and optionally
            {system}. None for the tokenizer's chat template.
        system: System message.
        append_eos: Append the EOS token to responses; the published procedure does not.
        overflow: Samples longer than max_length: "error", or "window" for overlapping windows of
            the prompt, of which the most similar one counts. Nothing is ever truncated.
        max_length: Largest number of tokens of prompt and response together. None for the context
            length of the model.
        split_special_tokens: Tokenise special tokens that the text of a prompt holds as ordinary
            text, not as control tokens; those of the template and of a response stay special.

    Raises:
        TypeError: A value is of another type.
        ValueError: A value is out of range.
    """

    layer: int | Literal["last", "auto", "auto-lower", "auto-single"] = "last"
    part_norm: Literal["none", "unit", "zscore"] | None = None
    shard_samples: int | None = None
    template: str | None = None
    system: str | None = None
    append_eos: bool = False
    overflow: Literal["error", "window"] = "error"
    max_length: int | None = None
    split_special_tokens: bool = False

    def __post_init__(self) -> None:
        check_fields("TraceIndex", self, {"shard_samples": 1, "max_length": 2})

    @property
    def encoding(self) -> Encoding:
        """The options that decide the token ids of a sample."""
        return Encoding(**{name: getattr(self, name) for name in Encoding.__dataclass_fields__})


@dataclass(frozen=True)
class QueryConfig:
    """Options of `TraceIndex.query`.

    Attributes:
        k: Samples per query, at most 1024.
        part_norm: How to compare signatures: "none" (as they are), "unit" (each part divided by its
            norm) or "zscore" (each feature standardised over the index). None for the default of
            the index.
        gradient_weight: Weight of the gradient part, from 0 to 1, for "unit" and "zscore". None for
            0.05 with "unit" and 0.5 with "zscore".
        approximate: Search with FAISS (extra "faiss"): a similar sample may be missed, the scores
            of those found are exact.

    Raises:
        TypeError: A value is of another type.
        ValueError: A value is out of range, or gradient_weight does not apply to part_norm.
    """

    k: int = 10
    part_norm: Literal["none", "unit", "zscore"] | None = None
    gradient_weight: float | None = None
    approximate: bool = False

    def __post_init__(self) -> None:
        check_fields("TraceIndex.query", self, {"k": 1})
        check_weighing(self.part_norm, self.gradient_weight)


def check_weighing(part_norm: str | None, gradient_weight: float | None) -> None:
    """Raises ValueError if a `gradient_weight` cannot be used with a `part_norm`."""
    if gradient_weight is not None and part_norm == "none":
        raise ValueError(
            'gradsafe.TraceIndex: gradient_weight needs part_norm "unit" or "zscore"; "none" does '
            "not scale the parts"
        )
    if gradient_weight is not None and not 0 <= gradient_weight <= 1:
        raise ValueError(
            f"gradsafe.TraceIndex: expected gradient_weight between 0 and 1, got {gradient_weight}"
        )
