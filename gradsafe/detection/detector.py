"""The detector: fit on a few references, score, calibrate, flag, save and load."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.detection import persistence
from gradsafe.detection.calibration import Calibration, calibrate
from gradsafe.detection.components import ComponentMap
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.explanation import Explanation, explain
from gradsafe.detection.gradients import GradientPass, TableCollector
from gradsafe.detection.methods import (
    GradCoo,
    GradientMethod,
    GradNorm,
    GradSafe,
    component_names,
)
from gradsafe.detection.references import (
    Reference,
    build_reference,
    find_output_projections,
    prepare_function,
)
from gradsafe.detection.rows import Rows, choose_rows
from gradsafe.detection.scores import Scores
from gradsafe.models import Encoded, Layers, context_length, encode_prompts, find_layers

MIN_REFERENCE_GAP = 1.0  # nats


class ReferenceGapWarning(UserWarning):
    """The model answers the unsafe reference prompts as readily as the safe ones."""


class UncalibratedWarning(UserWarning):
    """Prompts were flagged with a published threshold that was never checked on this model."""


class Detector:
    """Scores prompts by the gradients they cause; higher means more likely unsafe.

    Make one with `Detector.fit` or `Detector.load`.

    Attributes:
        config: Options it was fitted with.
        threshold: Calibrated threshold, None before `calibrate`.
        calibration: What `calibrate` found, None before.
        reference_gap: Mean NLL of the response after unsafe minus after safe references, in nats;
            None for methods without references.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: DetectorConfig,
        layers: Layers,
        method: GradientMethod | None,
        components: ComponentMap | None,
        reference_gap: float | None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.layers = layers
        self.rows: Rows = choose_rows(layers, config.row_fraction, config.row_seed)
        self.method = method
        self.component_map = components
        self.reference_gap = reference_gap
        self.calibration: Calibration | None = None

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,
        unsafe: Sequence[str] | None = None,
        safe: Sequence[str] | None = None,
        *,
        batch_tokens: int = 4096,
        progress: bool = True,
        **options: Any,
    ) -> Detector:
        """Build a detector from a few unsafe and safe reference prompts.

        About four pairs in the style of the expected traffic work well. The model's weights are
        not changed, and no gradient of the whole model is ever held.

        Args:
            model: A causal language model of `transformers`, PEFT wrapper or not.
            tokenizer: Its tokenizer.
            unsafe: Prompts the model refuses. Not used by methods "nll" and "gradnorm".
            safe: Prompts the model answers.
            batch_tokens: Padded tokens per batch; lower it if memory runs out.
            progress: Show progress bars.
            **options: Fields of `DetectorConfig`, among them method, response, granularity,
                relative, layers, reference_dtype and template.

        Returns:
            The detector, not calibrated.

        Raises:
            ValueError: Missing references, options that do not fit, no chat template, a prompt
                beyond the context, a model without supported layers, or (as
                NonFiniteGradientError) NaN in a gradient.
            TypeError: An unknown option.

        Warns:
            ReferenceGapWarning: The references are less than 1 nat apart in NLL of the response:
                the model does not refuse the unsafe ones, and scores will be poor.
        """
        config = DetectorConfig(**options)
        layers = find_layers(model, config.layers, config.modules)
        detector = cls(model, tokenizer, config, layers, None, None, None)
        if not config.uses_references:
            if config.method == "gradnorm":
                detector.component_map = ComponentMap(layers, "tensor", rows=detector.rows)
                detector.method = GradNorm()
            return detector
        for name, prompts in (("unsafe", unsafe), ("safe", safe)):
            if prompts is None or isinstance(prompts, str) or len(prompts) == 0:
                raise ValueError(
                    f"gradsafe.Detector.fit: method {config.method!r} needs {name}=[...], a list "
                    f"of at least one {name} reference prompt"
                )
        detector._fit_references(list(unsafe or ()), list(safe or ()), batch_tokens, progress)
        return detector

    @property
    def threshold(self) -> float | None:
        """Calibrated threshold, None before `calibrate`."""
        return self.calibration.threshold if self.calibration else None

    @property
    def coverage(self) -> Layers:
        """Which weights are scored and which are not, and why; printable."""
        return self.layers

    @property
    def components(self) -> list[str]:
        """Names of the columns of `Scores.components`."""
        if self.method is None or self.component_map is None:
            return []
        return component_names(self.method, self.component_map)

    def score(
        self,
        prompts: Sequence[str],
        batch_tokens: int = 4096,
        progress: bool = True,
        components: bool = True,
    ) -> Scores:
        """Score prompts.

        Prompts of similar length share a batch; the result does not depend on which.

        Args:
            prompts: User texts.
            batch_tokens: Padded tokens per batch; lower it if memory runs out.
            progress: Show a progress bar.
            components: Keep the value of every component too.

        Returns:
            The scores, in input order, on the CPU.

        Raises:
            ValueError: No prompts, an empty one, one beyond the context (with overflow "error"), or
                (as NonFiniteGradientError) a NaN gradient; the message names the prompt.
            TypeError: Something is not a string.
        """
        items, owners = self._encode(prompts)
        gradients = self._gradient_pass(batch_tokens)
        label = "score" if progress else None
        if self.method is None:
            nll = gradients.run(items, None, progress=label)
            values, parts = nll.clone(), torch.empty(len(items), 0)
        else:
            values, parts, nll = self._run(gradients, items, owners, components, label)
        worst = _worst_window(values, owners, len(prompts))
        return Scores(values[worst], parts[worst], nll[worst], self.threshold)

    def calibrate(
        self,
        benign_prompts: Sequence[str],
        max_fpr: float = 0.01,
        batch_tokens: int = 4096,
        progress: bool = True,
    ) -> Calibration:
        """Set the threshold so that at most `max_fpr` of prompts like these are flagged.

        Args:
            benign_prompts: Harmless prompts of the expected traffic, not used as references.
            max_fpr: Wanted bound on the false-positive rate.
            batch_tokens: See `score`.
            progress: See `score`.

        Returns:
            Threshold, measured rate and its confidence interval; also in `self.calibration`.

        Raises:
            ValueError: As in `score`, or `max_fpr` out of range.

        Warns:
            UserWarning: Too few prompts to promise the rate.
        """
        scores = self.score(benign_prompts, batch_tokens, progress, components=False)
        self.calibration = calibrate(scores.values, max_fpr)
        return self.calibration

    def flag(
        self, prompts: Sequence[str], batch_tokens: int = 4096, progress: bool = True
    ) -> Tensor:
        """Which prompts score above the threshold, `[n]` bool.

        Raises:
            ValueError: As in `score`, or the method has no published threshold and the detector
                was not calibrated.

        Warns:
            UncalibratedWarning: The published threshold is used; it rarely fits another model.
        """
        threshold = self.threshold
        if threshold is None:
            threshold = self.config.default_threshold
            advice = "call detector.calibrate(benign_prompts) first"
            if threshold is None:
                raise ValueError(f"gradsafe.Detector.flag: no threshold is set; {advice}")
            warnings.warn(
                f"gradsafe.Detector.flag: using the published threshold {threshold}, which does "
                f"not transfer between models; {advice}",
                UncalibratedWarning,
                stacklevel=2,
            )
        return self.score(prompts, batch_tokens, progress, components=False).values > threshold

    def explain(self, prompt: str) -> Explanation:
        """Say which tokens and components a prompt's score comes from, exactly and additively.

        abs(G) of a weight gradient G = dy^T x has the sign of the whole sum over tokens, which
        makes <abs(G), R> = sum_t dy_t^T (sign(G) * R) x_t an exact sum over tokens. With a_ct and
        b_ct, token t's parts of a_c and b_c, its evidence is e_t = mean_c (a_ct - b_ct) / (a_c +
        b_c), which sums to 2 * score - 1. For relative "difference" and "unsafe", signed shares and
        GradSafe's cosines it sums to the score in the same way.

        The whole encoded prompt is explained, tokens of the template and the response included,
        and a token stands for its position: in a causal model the position has seen all before it.
        The loss is read where the response is predicted, so the last tokens of the template carry
        much of the evidence, and the last token of the response, behind the loss, carries none.

        Takes about two to three times as long as scoring the prompt, since the backward pass runs
        twice. No weight gradient is stored.

        Args:
            prompt: User text.

        Returns:
            The explanation, on the CPU. With overflow "window" that of the worst window.

        Raises:
            ValueError: As in `score`, or a method or option whose score is no sum over tokens:
                methods "nll" and "gradnorm", relative "ratio" and "logratio", reduce "median",
                `center` and absolute "before".
            TypeError: `prompt` is no string.
        """
        return explain(self, prompt, self._encode, self._gradient_pass(batch_tokens=1))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the detector (not the model) to a folder of safetensors and JSON, atomically.

        Raises:
            FileNotFoundError: The parent folder does not exist.
            FileExistsError: `folder` exists and is not a saved detector.
        """
        persistence.save(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: nn.Module, tokenizer: Any) -> Detector:
        """Read a saved detector for the same model and tokenizer.

        Raises:
            StorageError: The folder is missing, damaged or foreign (a ValueError).
            ValueError: It was fitted on another model or tokenizer.
        """
        return persistence.load(cls, folder, model, tokenizer)

    def _encode(self, prompts: Sequence[str]) -> tuple[list[Encoded], list[int]]:
        return encode_prompts(
            self.tokenizer,
            prompts,
            self.config.response,
            overflow=self.config.overflow,
            max_length=context_length(self.model, self.tokenizer),
            template=self.config.template,
            system=self.config.system,
            append_eos=self.config.eos,
        )

    def _gradient_pass(self, batch_tokens: int) -> GradientPass:
        return GradientPass(self.model, self.layers, self.tokenizer, batch_tokens, self.rows)

    def _fit_references(
        self, unsafe: list[str], safe: list[str], batch_tokens: int, progress: bool
    ) -> None:
        config = self.config
        gradients = self._gradient_pass(batch_tokens)
        groups = {"unsafe": self._encode(unsafe), "safe": self._encode(safe)}
        granularity = "row+column" if config.method == "gradsafe" else config.granularity
        projections: list[str] = []
        if granularity == "head":
            projections = find_output_projections(gradients, groups["safe"][0][0])
        self.component_map = ComponentMap(self.layers, granularity, projections, self.rows)
        built: dict[str, Reference] = {}
        for name, (items, _) in groups.items():
            label = f"{name} references" if progress else None
            if config.method == "gradsafe" and name == "safe":  # published: no safe reference
                continue
            built[name] = build_reference(gradients, items, self.component_map, config, label)
        if config.method == "gradcoo":
            self.method = GradCoo(config, built["unsafe"], built["safe"])
            losses = {name: reference.nll for name, reference in built.items()}
        else:
            method = self.method = GradSafe(built["unsafe"])
            cosines, losses = {}, {}
            for name, (items, owners) in groups.items():
                _, cosines[name], losses[name] = self._run(gradients, items, owners, True, None)
            method.select(cosines["unsafe"], cosines["safe"], config.gap)
        self.reference_gap = float(losses["unsafe"].mean() - losses["safe"].mean())
        self._check_gap(losses)

    def _check_gap(self, losses: dict[str, Tensor]) -> None:
        assert self.reference_gap is not None
        if self.reference_gap >= MIN_REFERENCE_GAP:
            return
        warnings.warn(
            f"gradsafe.Detector.fit: the mean NLL of {self.config.response!r} is "
            f"{float(losses['unsafe'].mean()):.2f} after the unsafe and "
            f"{float(losses['safe'].mean()):.2f} after the safe references, a gap of "
            f"{self.reference_gap:.2f} nats (expected at least {MIN_REFERENCE_GAP:g}): this model "
            "does not refuse the unsafe references, so scores will be poor. Choose references in "
            "the style of your traffic that the model refuses.",
            ReferenceGapWarning,
            stacklevel=4,
        )

    def _run(
        self,
        gradients: GradientPass,
        items: Sequence[Encoded],
        owners: Sequence[int],
        keep: bool,
        label: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values `[n]`, components `[n, C]` (C = 0 unless kept) and NLL `[n]` of encoded items."""
        method, components = self.method, self.component_map
        assert method is not None
        assert components is not None
        values = torch.empty(len(items), dtype=torch.float32)
        kept: list[tuple[list[int], Tensor]] = []

        def finish(indices: list[int], table: Tensor) -> None:
            batch_values, batch_parts = method(table)
            values[indices] = batch_values.float()
            if keep:
                kept.append((list(indices), batch_parts.float()))

        prepare = prepare_function(self.config) if isinstance(method, GradCoo) else None
        collector = TableCollector(
            components,
            method.references,
            method.scales,
            method.unsigned,
            prepare,
            finish,
            owners,
        )
        nll = gradients.run(items, collector.begin, collector.end, label)
        parts = torch.empty(len(items), kept[0][1].shape[1] if kept else 0)
        for indices, batch_parts in kept:
            parts[indices] = batch_parts
        return values, parts, nll


def _worst_window(values: Tensor, owners: Sequence[int], prompts: int) -> Tensor:
    """Index of each prompt's highest-scoring window: nothing hides behind its harmless part."""
    worst = [-1] * prompts
    for item, owner in enumerate(owners):
        if worst[owner] < 0 or values[item] > values[worst[owner]]:
            worst[owner] = item
    return torch.tensor(worst)
