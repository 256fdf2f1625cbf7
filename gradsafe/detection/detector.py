"""The detector: fit on a few references, score, calibrate, flag, save and load."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gradsafe.detection import persistence
from gradsafe.detection.calibration import Calibration, calibrate
from gradsafe.detection.cascade import Band, choose_band
from gradsafe.detection.components import ComponentMap
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.explanation import Explanation, explain
from gradsafe.detection.fitting import (
    check_coverage,
    fit_references,
    fit_without_references,
)
from gradsafe.detection.gradients import GradientPass
from gradsafe.detection.methods import GradientMethod, component_names
from gradsafe.detection.rows import Rows, choose_rows
from gradsafe.detection.scores import Scores
from gradsafe.detection.scoring import (
    score_in_cascade,
    score_with_gradients,
    score_without_gradients,
    worst_windows,
)
from gradsafe.models import Encoded, Layers, context_length, encode_prompts, find_layers


class UncalibratedWarning(UserWarning):
    """Prompts were flagged with a threshold that was never checked on this model."""


class Detector:
    """Scores prompts by the gradients they cause; higher means more likely unsafe.

    Make one with `Detector.fit` or `Detector.load`.

    Attributes:
        config: Options it was fitted with.
        threshold: Calibrated threshold, None before `calibrate`.
        calibration: What `calibrate` found, None before.
        reference_gap: Mean NLL of the response after unsafe minus after safe references, in nats;
            None for methods without references.
        band: Losses between which method "cascade" computes gradients, None before `calibrate`,
            where it does for every prompt.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: DetectorConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.layers = find_layers(model, config.layers, config.modules)
        self.rows: Rows = choose_rows(self.layers, config.row_fraction, config.row_seed)
        self.method: GradientMethod | None = None
        self.component_map: ComponentMap | None = None
        self.reference_gap: float | None = None
        self.calibration: Calibration | None = None
        self.band: Band | None = None

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
            CoverageWarning: Less than half of the weights of the chosen blocks are scored.
        """
        config = DetectorConfig(**options)
        detector = cls(model, tokenizer, config)
        gradients = detector._gradient_pass(batch_tokens)
        if config.uses_gradients:
            check_coverage(config, detector.layers)
        if config.uses_references:
            groups = [
                detector._encode(_references(config, name, prompts))
                for name, prompts in (("unsafe", unsafe), ("safe", safe))
            ]
            fitted = fit_references(config, gradients, groups[0], groups[1], progress)
        else:
            fitted = fit_without_references(config, gradients)
        detector.method, detector.component_map = fitted.method, fitted.components
        detector.reference_gap = fitted.reference_gap
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
                (as NonFiniteGradientError) a NaN gradient; the message names the prompt. Without
                gradients (method "nll") the score of such a prompt is NaN.
            TypeError: Something is not a string.
        """
        items, owners = self._encode(prompts)
        gradients = self._gradient_pass(batch_tokens)
        label = "score" if progress else None
        if self.method is None or self.component_map is None:
            found = score_without_gradients(gradients, items, label)
        else:
            rest = (self.method, self.component_map, self.config, gradients, items, owners)
            if self.band is None:
                found = score_with_gradients(*rest, components, label)
            else:
                found = score_in_cascade(self.band, *rest, components, label)
        worst = worst_windows(found.values, owners, len(prompts))
        return Scores(
            found.values[worst],
            found.components[worst],
            found.nll[worst],
            found.backward[worst],
            self.threshold,
        )

    def calibrate(
        self,
        benign_prompts: Sequence[str],
        max_fpr: float = 0.01,
        batch_tokens: int = 4096,
        progress: bool = True,
        *,
        unsafe_prompts: Sequence[str] | None = None,
        max_fnr: float = 0.01,
    ) -> Calibration:
        """Set the threshold so that at most `max_fpr` of prompts like these are flagged.

        For method "cascade" it first sets `band`, from every second benign prompt and the unsafe
        ones: prompts with a smaller loss are cleared without gradients, at most `max_fnr` of unsafe
        ones among them. The threshold then comes from the other benign prompts.

        Args:
            benign_prompts: Harmless prompts of the expected traffic, not used as references.
            max_fpr: Wanted bound on the false-positive rate.
            batch_tokens: See `score`.
            progress: See `score`.
            unsafe_prompts: Unsafe prompts, not used as references; method "cascade" only.
            max_fnr: Wanted bound on the unsafe prompts that their loss alone clears; method
                "cascade" only.

        Returns:
            Threshold, measured rate and its confidence interval; also in `self.calibration`.

        Raises:
            ValueError: As in `score`, `max_fpr` or `max_fnr` out of range, or `unsafe_prompts`
                missing for method "cascade" or given for another.

        Warns:
            UserWarning: Too few prompts to promise the rate.
        """
        if self.config.method == "cascade" and unsafe_prompts is None:
            raise ValueError(
                'gradsafe.Detector.calibrate: method "cascade" needs unsafe_prompts=[...], unsafe '
                "prompts that are no references"
            )
        if self.config.method != "cascade" and unsafe_prompts is not None:
            raise ValueError(
                'gradsafe.Detector.calibrate: unsafe_prompts=[...] is for method "cascade", not '
                f"for {self.config.method!r}"
            )
        if unsafe_prompts is not None and len(benign_prompts) < 2:
            raise ValueError(
                'gradsafe.Detector.calibrate: method "cascade" needs at least two benign_prompts, '
                f"half of them for the losses, got {len(benign_prompts)}"
            )
        before = self.band
        try:
            if unsafe_prompts is not None:
                benign, benign_prompts = benign_prompts[::2], benign_prompts[1::2]
                losses = [
                    self._losses(prompts, batch_tokens, progress)
                    for prompts in (benign, unsafe_prompts)
                ]
                self.band = choose_band(losses[0], losses[1], max_fpr / 2, max_fnr)
            scores = self.score(benign_prompts, batch_tokens, progress, components=False)
            calibration = calibrate(scores.values, max_fpr)
        except BaseException:
            self.band = before  # never one half of two calibrations
            raise
        self.calibration = calibration
        return calibration

    def flag(
        self, prompts: Sequence[str], batch_tokens: int = 4096, progress: bool = True
    ) -> Tensor:
        """Which prompts score above the threshold, `[n]` bool; a NaN score is no clearance.

        Raises:
            ValueError: As in `score`, or the method has no neutral score and the detector was not
                calibrated.

        Warns:
            UncalibratedWarning: The neutral score is the threshold; it rarely fits a model.
        """
        threshold = self.threshold
        if threshold is None:
            threshold = self.config.default_threshold
            advice = "call detector.calibrate(benign_prompts) first"
            if threshold is None:
                raise ValueError(f"gradsafe.Detector.flag: no threshold is set; {advice}")
            warnings.warn(
                f"gradsafe.Detector.flag: using the default threshold {threshold}, which rarely "
                f"fits a model; {advice}",
                UncalibratedWarning,
                stacklevel=2,
            )
        values = self.score(prompts, batch_tokens, progress, components=False).values
        return (values > threshold) | values.isnan()

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

    def _losses(self, prompts: Sequence[str], batch_tokens: int, progress: bool) -> Tensor:
        """Largest NLL among each prompt's windows, `[n]`."""
        items, owners = self._encode(prompts)
        label = "loss" if progress else None
        nll = self._gradient_pass(batch_tokens).run(items, None, progress=label)
        return nll[worst_windows(nll, owners, len(prompts))]

    def _gradient_pass(self, batch_tokens: int) -> GradientPass:
        return GradientPass(self.model, self.layers, self.tokenizer, batch_tokens, self.rows)


def _references(config: DetectorConfig, name: str, prompts: Sequence[str] | None) -> list[str]:
    if prompts is None or isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(
            f"gradsafe.Detector.fit: method {config.method!r} needs {name}=[...], a list "
            f"of at least one {name} reference prompt"
        )
    return list(prompts)
