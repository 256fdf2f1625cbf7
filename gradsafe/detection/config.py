"""The options of a detector. Needs no torch: the command line and the docs are made from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from gradsafe._checks import check_fields, refuse

Method = Literal["gradcoo", "gradsafe", "cascade", "nll", "gradnorm"]
Granularity = Literal["tensor", "row", "column", "row+column", "head", "layer", "expert"]
Relative = Literal["share", "ratio", "logratio", "difference", "unsafe"]
Reduction = Literal["mean", "weighted", "median"]
ReferenceOrder = Literal["mean_then_norm", "norm_then_mean"]
Absolute = Literal["after", "before"]
Overflow = Literal["error", "window"]
Turns = Literal["all", "worst"]
Prefix = Literal["exact", "cut"]
Features = Literal["components", "hidden", "both"]  # what `Detector.learn` reads
Evidence = Literal["position", "deletion"]  # what `Detector.explain` measures
Modules = Literal["all", "attention", "mlp"]
ReferenceDtype = Literal["float32", "bfloat16", "float16", "float8"]

_OF_GRADCOO = "granularity relative unsigned normalize center absolute reference_order reduce"
# The methods that read a field, where not all of them do.
READ_BY = {
    **dict.fromkeys(_OF_GRADCOO.split(), ("gradcoo", "cascade")),
    "gap": ("gradsafe",),
    "prefix": ("gradcoo", "gradsafe", "cascade", "gradnorm"),
}


@dataclass(frozen=True)
class DetectorConfig:
    """Options of `Detector.fit`. The defaults are the best-supported reading of GradCoo.

    Attributes:
        method: Score method: "gradcoo" (arXiv 2502.12411), "gradsafe" (arXiv 2402.13494),
            "cascade" (the NLL of the response where it is decisive, GradCoo for the other prompts),
            or a baseline: "nll" (NLL of the response, forward pass only) or "gradnorm" (norm of the
            scored gradients).
        response: Compliance response whose loss is differentiated.
        append_eos: Whether the response ends with the EOS token; None means only for method
            "gradsafe", as published.
        granularity: What one component is: a weight tensor ("tensor"), its rows, its columns or
            both, an attention head ("head"; MLP weights stay whole), all weights of a decoder block
            ("layer"), or the matrix of one expert ("expert"; other weights stay whole). Fused
            expert weights [E, O, I] are one tensor with E * O rows and I columns.
        relative: Value of a component, computed from its similarity a to the unsafe reference and b
            to the safe one: "share" a/(a+b), "ratio" a/b, "logratio" log(a/b), "difference"
            (a-b)/n or "unsafe" a/n, where n is the number of its entries.
        unsigned: Use absolute values of the gradients; false is the paper's ablation "no abs".
        normalize: Divide by the standard deviation of the component; false is the ablation "no
            norm".
        center: Subtract the mean of the component first; needs granularity "tensor", "row" or
            "column".
        absolute: Take absolute values "after" or "before" the standard deviation is computed.
        reference_order: Average the reference gradients and then normalise the mean
            ("mean_then_norm", the paper's formula), or normalise each of them first
            ("norm_then_mean").
        reduce: How component values become one score: "mean", the mean "weighted" by the number of
            entries, or "median".
        layers: Which decoder blocks are scored: a number n for the last n blocks, a list of block
            indices, or none for all. The backward pass stops at the first scored block.
        modules: Score the attention weights, the MLP weights, or all.
        row_fraction: Part of the rows of every weight that is scored, above 0 and at most 1. Time
            and memory shrink with it. All experts of a fused expert weight keep the same rows.
        row_seed: Seed of the random choice of these rows.
        reference_dtype: Storage type of the reference gradients; "float8" is e4m3. Each weight's
            reference is scaled into the range of the type.
        gap: GradSafe only: a row or column is used if its mean cosine similarity to the unsafe
            reference is larger by more than this for the unsafe reference prompts than for the safe
            ones.
        template: Prompt template: a Jinja chat template or a text with {prompt}; none for the
            tokenizer's own chat template.
        system: System message.
        overflow: What to do with prompts longer than the context: raise an "error", or score
            overlapping windows and keep the highest score ("window").
        split_special_tokens: Tokenise special tokens that the text of a prompt holds ("</s>" typed
            by a user) as ordinary text. With false, they are control tokens, as in serving engines
            that do not split them: the detector must see what the model sees.
        turns: Score a conversation as a whole ("all"), or every turn of a user or tool alone after
            the system message, and keep the highest score ("worst").
        prefix: Whether gradients flow through the tokens that the template and the system message
            put before the user's text ("exact"), or these are constants ("cut"): they then run once
            per call instead of once per prompt, and the gradient is that of the tokens behind them.
    """

    method: Method = "gradcoo"
    response: str = "Sure"
    append_eos: bool | None = None
    granularity: Granularity = "tensor"
    relative: Relative = "share"
    unsigned: bool = True
    normalize: bool = True
    center: bool = False
    absolute: Absolute = "after"
    reference_order: ReferenceOrder = "mean_then_norm"
    reduce: Reduction = "mean"
    layers: int | tuple[int, ...] | None = None
    modules: Modules = "all"
    row_fraction: float = 1.0
    row_seed: int = 0
    reference_dtype: ReferenceDtype = "bfloat16"
    gap: float = 1.0
    template: str | None = None
    system: str | None = None
    overflow: Overflow = "error"
    split_special_tokens: bool = False
    turns: Turns = "all"
    prefix: Prefix = "exact"

    def __post_init__(self) -> None:
        check_fields("Detector", self)
        if not 0 < self.row_fraction <= 1:
            refuse("Detector", "0 < row_fraction <= 1", self.row_fraction)
        for field in fields(self):
            methods, value = READ_BY.get(field.name), getattr(self, field.name)
            if methods and self.method not in methods and value != field.default:
                _refuse(f"{field.name}={value!r}", f"method in {list(methods)}")
        if self.center and self.granularity not in ("tensor", "row", "column"):
            _refuse("center=True", 'granularity "tensor", "row" or "column"')
        if self.reference_order == "norm_then_mean" and self.granularity in ("row+column", "layer"):
            needed = 'granularity "tensor", "row", "column" or "head"'
            _refuse('reference_order="norm_then_mean"', needed)
        if not self.unsigned and self.relative in ("ratio", "logratio"):
            _refuse("unsigned=False", 'relative "share", "difference" or "unsafe"')
        if self.absolute == "before" and (self.center or not self.unsigned):
            _refuse("center=True" if self.center else "unsigned=False", 'absolute="after"')
        if self.method == "cascade" and not (self.unsigned and self.relative == "share"):
            _refuse('method="cascade"', 'relative="share" and unsigned=True')

    @property
    def uses_references(self) -> bool:
        """Whether fitting needs reference prompts."""
        return self.method in ("gradcoo", "gradsafe", "cascade")

    @property
    def eos(self) -> bool:
        """Whether the response ends with EOS."""
        return self.method == "gradsafe" if self.append_eos is None else self.append_eos

    @property
    def default_threshold(self) -> float | None:
        """The neutral score (GradSafe: the published threshold), None where it is unknown."""
        if self.method == "gradcoo":
            share = 0.5 if self.unsigned else 0.0  # signed shares lie around zero
            neutral = {"share": share, "ratio": 1.0, "logratio": 0.0, "difference": 0.0}
            return neutral.get(self.relative)
        return 0.25 if self.method == "gradsafe" else None  # arXiv 2402.13494


def _refuse(option: str, needed: str) -> None:
    raise ValueError(f"gradsafe.Detector: {option} needs {needed}")
