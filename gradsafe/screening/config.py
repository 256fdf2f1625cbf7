"""The options of screening. Needs no torch: the command line and the docs are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradsafe._checks import check_fields, refuse
from gradsafe.detection.config import DetectorConfig, Modules, ReferenceDtype
from gradsafe.models.encode import Encoding

ScoreName = Literal["alignment", "share"]
Safety = Literal["margin", "refusals"]
Measure = Literal["cosine", "dot"]
Parameters = Literal["weights", "lora"]
Scale = Literal["none", "adam"]
TooLong = Literal["error", "truncate"]


@dataclass(frozen=True)
class ScreenConfig:
    """Options of `Screener.fit`.

    Attributes:
        decide: The score whose threshold flags rows, where both exist.
        safety: The safety loss of the score "alignment": the NLL of the "refusals", or, where
            unsafe rows are given, a "margin", that NLL less the NLL of the harmful answers.
        measure: The alignment score: "cosine" of the row's gradient with the safety gradient, or
            their "dot" product, the first-order effect of one SGD step, which grows with the norm
            of the row's gradient.
        parameters: Gradients of the decoder's "weights", or of the "lora" parameters of a PEFT
            model.
        scale: What the safety gradient is divided by: nothing, or entrywise the step size of
            "adam", estimated from a sample of the screened rows.
        layers: Which decoder blocks are scored: a number n for the last n blocks, a list of block
            indices, or none for all. The backward pass stops at the first scored block.
        modules: Score the attention weights, the MLP weights, or all.
        row_fraction: Part of the rows of every weight matrix that is scored, above 0 and at most 1.
        row_seed: Seed of the random choice of these rows.
        reference_dtype: Storage type of the reference gradients; "float8" is e4m3.
        template: Prompt template: a Jinja chat template or a text with {prompt}; none for the
            tokenizer's own chat template.
        system: System message.
        append_eos: End every response with EOS, as `gradsafe finetune` does.
        max_length: Largest number of tokens of prompt and response together; none for the context
            length of the model.
        overflow: What to do with longer rows: raise an "error", or cut the end of the response
            ("truncate"), as a trainer with the same max_length does.
        split_special_tokens: Tokenise special tokens that the text of a prompt holds as ordinary
            text, not as control tokens.
    """

    decide: ScoreName = "share"
    safety: Safety = "margin"
    measure: Measure = "cosine"
    parameters: Parameters = "weights"
    scale: Scale = "none"
    layers: int | tuple[int, ...] | None = None
    modules: Modules = "all"
    row_fraction: float = 1.0
    row_seed: int = 0
    reference_dtype: ReferenceDtype = "bfloat16"
    template: str | None = None
    system: str | None = None
    append_eos: bool = True
    max_length: int | None = None
    overflow: TooLong = "error"
    split_special_tokens: bool = False

    def __post_init__(self) -> None:
        check_fields("Screener", self, {"max_length": 2})
        if not 0 < self.row_fraction <= 1:
            refuse("Screener", "0 < row_fraction <= 1", self.row_fraction)
        if self.parameters == "lora" and self.row_fraction < 1:
            refuse("Screener", 'row_fraction=1 with parameters="lora"', self.row_fraction)

    @property
    def detection(self) -> DetectorConfig:
        """The same options for the passes and references of `gradsafe.detection`."""
        names = ("layers", "modules", "row_fraction", "row_seed", "reference_dtype")
        return DetectorConfig(**{name: getattr(self, name) for name in names})

    @property
    def encoding(self) -> Encoding:
        """The options that decide the token ids of a row, whatever its length."""
        names = ("template", "system", "append_eos", "split_special_tokens")
        return Encoding(**{name: getattr(self, name) for name in names})
