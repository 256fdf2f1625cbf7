"""Every choice a detector is fitted with, in one record that is saved beside its references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Method = Literal["gradcoo", "gradsafe", "cascade", "nll", "gradnorm"]
Granularity = Literal["tensor", "row", "column", "row+column", "head", "layer", "expert"]
Relative = Literal["share", "ratio", "logratio", "difference", "unsafe"]
Reduction = Literal["mean", "weighted", "median"]
ReferenceOrder = Literal["mean_then_norm", "norm_then_mean"]
Absolute = Literal["after", "before"]
Overflow = Literal["error", "window"]
Modules = Literal["all", "attention", "mlp"]

ReferenceDtype = Literal["float32", "bfloat16", "float16", "float8"]

# Where a score says neither safe nor unsafe, for want of a calibration. GradSafe's is the published
# one (arXiv 2402.13494); GradCoo's paper gives none.
DEFAULT_THRESHOLDS: dict[tuple[str, str | None], float] = {
    ("gradcoo", "share"): 0.5,
    ("gradcoo", "ratio"): 1.0,
    ("gradcoo", "logratio"): 0.0,
    ("gradcoo", "difference"): 0.0,
    ("gradsafe", None): 0.25,
}
# Fields that only these methods read.
COOCCURRENCE = ("gradcoo", "cascade")
READ_BY = {
    "granularity": COOCCURRENCE,
    "relative": COOCCURRENCE,
    "unsigned": COOCCURRENCE,
    "normalize": COOCCURRENCE,
    "center": COOCCURRENCE,
    "absolute": COOCCURRENCE,
    "reference_order": COOCCURRENCE,
    "reduce": COOCCURRENCE,
    "gap": ("gradsafe",),
}


@dataclass(frozen=True)
class DetectorConfig:
    """Options of `Detector.fit`; the defaults are the best-supported reading of GradCoo.

    Attributes:
        method: "gradcoo" (arXiv 2502.12411), "gradsafe" (arXiv 2402.13494), "cascade" (the loss of
            the response where it is sure, GradCoo elsewhere), or a baseline: "nll" (loss of the
            response, forward only) or "gradnorm" (norm of the scored gradients).
        response: Compliance response whose loss is differentiated.
        append_eos: Close the response with EOS; None means only for "gradsafe", as published.
        granularity: What one component is: a weight tensor, its rows, columns or both, an attention
            head (MLP weights stay whole), all weights of a decoder block, or an expert's matrix
            (other weights stay whole). Fused expert weights `[E, O, I]` are one tensor, of E * O
            rows and I columns.
        relative: Evidence of a component from a (unsafe) and b (safe): "share" a/(a+b), "ratio"
            a/b, "logratio" log(a/b), "difference" (a-b)/n, "unsafe" a/n, with n its entries.
        unsigned: Take absolute values (the co-occurrence); False is the ablation "no abs".
        normalize: Divide by the standard deviation of the component; False is "no norm".
        center: Subtract the component's mean first (tensor, row and column granularity).
        absolute: Absolute value after or before the standard deviation is taken.
        reference_order: Average the reference gradients, then normalise, or the other way round.
        reduce: Score from components: "mean", mean "weighted" by entries, or "median".
        layers: Last n blocks, block indices, or None for all.
        modules: Score attention weights, MLP weights, or all.
        row_fraction: Part of the rows of every weight that is scored, above 0 and at most 1; time
            and memory for references and scores shrink with it. Of fused expert weights every
            expert keeps the same rows.
        row_seed: Seed of the draw of these rows.
        reference_dtype: Storage of the references: "float32", "bfloat16", "float16" or "float8"
            (e4m3); each weight's reference is scaled into the range of its dtype.
        gap: GradSafe: a slice counts if its mean cosine to the unsafe reference is larger by more
            than this for the unsafe reference prompts than for the safe ones.
        template: Prompt template, see `gradsafe.models.encode`; None for the tokenizer's own.
        system: System message.
        overflow: Prompts beyond the context: "error", or "window" (the worst window counts).
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

    def __post_init__(self) -> None:
        if isinstance(self.layers, Sequence) and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))  # JSON and callers give lists
        for name, kind in (
            ("method", Method),
            ("granularity", Granularity),
            ("relative", Relative),
            ("absolute", Absolute),
            ("reference_order", ReferenceOrder),
            ("reduce", Reduction),
            ("modules", Modules),
            ("overflow", Overflow),
            ("reference_dtype", ReferenceDtype),
        ):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise ValueError(
                    f"gradsafe.Detector: expected {name} in {list(allowed)}, got {value!r}"
                )
        self._check_types()
        if not 0 < self.row_fraction <= 1:
            raise ValueError(
                f"gradsafe.Detector: expected 0 < row_fraction <= 1, got {self.row_fraction}"
            )
        self._check_combinations()

    def _check_types(self) -> None:
        for name, kind in (
            ("unsigned", bool),
            ("normalize", bool),
            ("center", bool),
            ("row_seed", int),
            ("row_fraction", (int, float)),
            ("gap", (int, float)),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                expected = getattr(kind, "__name__", "a number")
                raise TypeError(
                    f"gradsafe.Detector: expected {name} to be {expected}, got {value!r}"
                )
        numbers = self.layers if isinstance(self.layers, tuple) else (self.layers or 0,)
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            raise TypeError(
                "gradsafe.Detector: expected layers to be a number of blocks, a list of block "
                f"indices or None, got {self.layers!r}"
            )

    def _check_combinations(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, methods in READ_BY.items():
            if self.method not in methods and getattr(self, name) != defaults[name]:
                self._refuse(f"{name}={getattr(self, name)!r}", f"method in {list(methods)}")
        whole_slices = ("tensor", "row", "column")
        if self.center and self.granularity not in whole_slices:
            self._refuse("center=True", f"granularity in {list(whole_slices)}")
        if self.center and self.absolute == "before":
            self._refuse("center=True", 'absolute="after"')
        if self.reference_order == "norm_then_mean" and self.granularity in ("row+column", "layer"):
            self._refuse(
                'reference_order="norm_then_mean"',
                'granularity "tensor", "row", "column" or "head"',
            )
        if not self.unsigned and self.relative in ("ratio", "logratio"):
            self._refuse("unsigned=False", 'relative "share", "difference" or "unsafe"')
        if not self.unsigned and self.absolute == "before":
            self._refuse("unsigned=False", 'absolute="after"')
        if self.method == "cascade" and not (self.unsigned and self.relative == "share"):
            self._refuse('method="cascade"', 'relative="share" and unsigned=True')

    def _refuse(self, option: str, needed: str) -> None:
        raise ValueError(f"gradsafe.Detector: {option} needs {needed}")

    @property
    def uses_gradients(self) -> bool:
        """Whether scoring needs a backward pass."""
        return self.method != "nll"

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
        """Where a score is neutral (GradSafe: the published one), None where that is unknown."""
        if self.method == "gradcoo" and self.relative == "share" and not self.unsigned:
            return 0.0  # signed shares lie around zero
        relative = self.relative if self.method == "gradcoo" else None
        return DEFAULT_THRESHOLDS.get((self.method, relative))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `DetectorConfig(**values)` restores the record."""
        return asdict(self)
