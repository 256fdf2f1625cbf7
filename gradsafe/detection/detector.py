"""The detector: fit on a few references, learn, score, calibrate, flag, explain, save, load."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe._checks import check_value, refuse
from gradsafe._io.artifacts import StorageError, checked, load_folder, save_folder
from gradsafe._io.fingerprints import (
    model_fingerprint,
    model_sample,
    tokenizer_fingerprint,
)
from gradsafe.detection.calibration import Band, Calibration, calibrate, choose_band
from gradsafe.detection.components import choose_rows
from gradsafe.detection.config import DetectorConfig, Evidence, Features
from gradsafe.detection.explanation import (
    Explanation,
    check_explainable,
    explain,
    explain_by_deletion,
)
from gradsafe.detection.facts import calibration_facts
from gradsafe.detection.gradients import EncodedPrompts, GradientPass
from gradsafe.detection.learned import learn, make_method
from gradsafe.detection.learning import Learning, check_labels
from gradsafe.detection.methods import NLL, fit
from gradsafe.detection.scoring import Method, Scores, worst_windows
from gradsafe.detection.state import DetectorState
from gradsafe.models import Layers, Prompt, find_layers, probe_prompts

KIND = "detector"  # of the saved folder


class UncalibratedWarning(UserWarning):
    """Prompts were flagged with a threshold that was not calibrated on this model."""


class Detector:
    """Scores prompts by the gradients they cause; a higher score means more likely unsafe.

    `Detector.fit` and `Detector.load` make one. A prompt is a text or a conversation: a list of
    `{"role": ..., "content": ...}` messages, the last one from the user or a tool.

    Any number of threads may use one detector, or several on one model, while others run the
    model's forward pass: batches that need gradients take turns.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, state: DetectorState, layers: Layers | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.layers = layers or find_layers(model, state.config.layers, state.config.modules)
        self.state = state
        self._sample = model_sample(model)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,
        unsafe: Sequence[Prompt] | None = None,
        safe: Sequence[Prompt] | None = None,
        *,
        batch_tokens: int = 4096,
        progress: bool = True,
        **options: Any,
    ) -> Detector:
        """Build a detector from a few unsafe and safe reference prompts.

        Eight or more of each, in the style of the expected traffic, work well. The model is not
        changed, and its whole gradient is never held at once.

        Args:
            model: A causal language model of `transformers`, with or without a PEFT wrapper.
            tokenizer: Its tokenizer.
            unsafe: Prompts that the model refuses. Not used by methods "nll" and "gradnorm".
            safe: Prompts that the model answers.
            batch_tokens: Tokens per batch, padding included; lower it if memory runs out.
            progress: Show progress bars.
            **options: Fields of `DetectorConfig`, for example method, response, granularity,
                relative, layers, reference_dtype and template.

        Returns:
            The detector, not calibrated.

        Raises:
            ValueError: Missing references, options that exclude each other, no chat template, a
                prompt longer than the context, a model without supported layers, or (as
                NonFiniteGradientError) NaN in a gradient.
            TypeError: An unknown option, or a value of the wrong type.

        Warns:
            ReferenceGapWarning: Method "cascade", and the mean NLL of the response is less than 1
                nat higher after the unsafe references.
            CoverageWarning: Less than half of the weights of the chosen blocks are scored.
        """
        config = DetectorConfig(**options)
        layers = find_layers(model, config.layers, config.modules)
        rows = choose_rows(layers, config.row_fraction, config.row_seed)
        gradients = GradientPass(model, tokenizer, config, layers, rows, batch_tokens, progress)
        groups = {}
        references = {"unsafe": unsafe, "safe": safe} if config.uses_references else {}
        for name, prompts in references.items():
            empty = isinstance(prompts, Sequence) and not prompts
            if prompts is None or isinstance(prompts, str) or empty:
                raise ValueError(
                    f"gradsafe.Detector.fit: method {config.method!r} needs {name}=[...], a list "
                    f"of at least one {name} reference prompt"
                )
            groups[name] = gradients.encode(prompts, name)
        return cls(model, tokenizer, fit(gradients, groups), layers)

    @property
    def state(self) -> DetectorState:
        """The fitted state, frozen; `learn` and `calibrate` replace it."""
        return self.method.state

    @state.setter
    def state(self, state: DetectorState) -> None:
        self.method: Method = make_method(state, self.layers)

    @property
    def config(self) -> DetectorConfig:
        """Options it was fitted with."""
        return self.state.config

    @property
    def reference_gap(self) -> float | None:
        """Mean NLL of the response, in nats, after the unsafe minus after the safe references.

        It says whether the NLL will work; it does not predict how well gradients separate prompts.
        None for methods without references.
        """
        return self.state.reference_gap

    @property
    def learning(self) -> Learning | None:
        """What `learn` found, None before."""
        return self.state.learning

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` found, None before."""
        return self.state.calibration

    @property
    def threshold(self) -> float | None:
        """Calibrated threshold, None before `calibrate`."""
        return self.state.threshold

    @property
    def band(self) -> Band | None:
        """NLL values between which method "cascade" computes gradients.

        None before `calibrate`: then it computes them for every prompt.
        """
        return self.state.band

    @property
    def coverage(self) -> Layers:
        """Which weights are scored and which are not, and why; printable."""
        return self.layers

    @property
    def components(self) -> list[str]:
        """Names of the columns of `Scores.components`."""
        return self.method.names

    def score(
        self,
        prompts: Sequence[Prompt] | EncodedPrompts,
        batch_tokens: int = 4096,
        progress: bool = True,
        components: bool = True,
    ) -> Scores:
        """Score prompts.

        Prompts of similar length share a batch; scores do not depend on the batches.

        Args:
            prompts: Texts or conversations, or the result of `encode`.
            batch_tokens: Tokens per batch, padding included; lower it if memory runs out.
            progress: Show a progress bar.
            components: Keep the value of every component too.

        Returns:
            The scores, in input order, on the CPU.

        Raises:
            ValueError: No prompts, an empty prompt, one longer than the context (with overflow
                "error"), or (as NonFiniteGradientError) a NaN gradient; the message names the
                prompt, for example prompts[3]. Method "nll" gives such a prompt the score NaN.
            TypeError: An entry is neither a text nor a conversation.
        """
        gradients = self._gradients(batch_tokens, progress)
        encoded = gradients.encode(prompts, "prompts")
        return self._score(self.method, gradients, encoded, components)

    def encode(
        self, prompts: Sequence[Prompt], names: str | Sequence[str] = "prompts"
    ) -> EncodedPrompts:
        """Encode prompts in advance, to find errors before long work.

        Args:
            prompts: Texts or conversations.
            names: What error messages call each prompt, for example `file:line`; a single name for
                all gives prompts[0], prompts[1] and so on.

        Raises:
            ValueError, TypeError: As in `score`, except for a NaN gradient.
        """
        return self._gradients(batch_tokens=1, progress=False).encode(prompts, names)

    def learn(
        self,
        prompts: Sequence[Prompt] | EncodedPrompts,
        labels: Sequence[Any] | Tensor,
        *,
        features: Features = "both",
        layer: int | None = None,
        batch_tokens: int = 4096,
        progress: bool = True,
    ) -> Learning:
        """Learn the score from labelled prompts; method "gradcoo" only.

        A logistic regression replaces the mean of the components. From then on a score is the
        log-odds that a prompt is unsafe if both classes are equally frequent: above 0, unsafe is
        more likely. The components of `score` stay as they are. Learning again starts anew.

        Of a prompt with several windows or turns, it learns from the one with the highest score
        without learning; `score` takes the highest learned score.

        Args:
            prompts: Prompts of the expected traffic, not used as references, at least two of each
                class; about 25 of each are needed to gain much.
            labels: 1 or True for unsafe, 0 or False for safe.
            features: What is weighted: the "components", the "hidden" state of a decoder block at
                the last prompt token (then scores without components need no backward pass), or
                "both".
            layer: Index of that block, negative from the end; None chooses among three by
                cross-validation.
            batch_tokens: See `score`.
            progress: See `score`.

        Returns:
            Layer and cross-validated quality; also in `learning`. It removes the calibration, since
            scores change. An error leaves the detector as it was.

        Raises:
            ValueError: As in `score`, another method, less than two labels of a class, a label that
                is neither 0 nor 1, not one label per prompt, a layer out of range or without hidden
                state, or values that are not finite.
            TypeError: `labels` or `layer` is of another type.
        """
        where, depth, config = "Detector.learn", len(self.layers.blocks), self.config
        if config.method != "gradcoo":
            refuse(where, 'a detector fitted with method="gradcoo"', repr(config.method))
        check_value(where, "features", features, Features)
        check_value(where, "layer", layer, int | None)
        if layer is not None and (features == "components" or not -depth <= layer < depth):
            expected = f'-{depth} <= layer < {depth} and features="both" or "hidden"'
            refuse(where, expected, f"layer={layer}, features={features!r}")
        gradients = self._gradients(batch_tokens, progress)
        encoded = gradients.encode(prompts, "prompts")
        found = check_labels(labels, len(encoded))
        self.state = learn(self.state, gradients, encoded, found, features, layer)
        assert self.state.learning is not None
        return self.state.learning

    def calibrate(
        self,
        benign_prompts: Sequence[Prompt] | EncodedPrompts,
        max_fpr: float = 0.01,
        batch_tokens: int = 4096,
        progress: bool = True,
        *,
        unsafe_prompts: Sequence[Prompt] | EncodedPrompts | None = None,
        max_fnr: float = 0.01,
    ) -> Calibration:
        """Set the threshold so that at most `max_fpr` of prompts like these are flagged.

        For method "cascade" it first sets `band` from every second benign prompt and the unsafe
        prompts: prompts with a smaller NLL are cleared without gradients, among them at most
        `max_fnr` of the unsafe ones. The threshold then comes from the other benign prompts.

        Args:
            benign_prompts: Harmless prompts of the expected traffic, not used as references.
            max_fpr: Bound on the false-positive rate.
            batch_tokens: See `score`.
            progress: See `score`.
            unsafe_prompts: Unsafe prompts, not used as references; method "cascade" only.
            max_fnr: Bound on the share of unsafe prompts that are cleared by their NLL alone;
                method "cascade" only.

        Returns:
            Threshold, measured rate and its confidence interval; also in `calibration`, with what
            it belongs to (model, template, versions), which `gradsafe serve` compares. An error
            leaves the detector as it was.

        Raises:
            ValueError: As in `score`, `max_fpr` or `max_fnr` out of range, or `unsafe_prompts`
                missing for method "cascade" or given for another.

        Warns:
            UserWarning: Too few prompts to guarantee the rate.
        """
        if (self.config.method == "cascade") != (unsafe_prompts is not None):
            raise ValueError(
                'gradsafe.Detector.calibrate: method "cascade" needs unsafe_prompts=[...], unsafe '
                "prompts that are not references, and the other methods take none; got "
                f"unsafe_prompts={unsafe_prompts and '[...]'} for {self.config.method!r}"
            )
        state, gradients = self.state, self._gradients(batch_tokens, progress)
        benign = gradients.encode(benign_prompts, "benign_prompts")
        if unsafe_prompts is not None:
            if len(benign) < 2:
                raise ValueError(
                    'gradsafe.Detector.calibrate: method "cascade" needs at least two '
                    f"benign_prompts, half of them for the band, got {len(benign)}"
                )
            unsafe = gradients.encode(unsafe_prompts, "unsafe_prompts")
            nll = NLL(state, self.layers)
            losses = (self._score(nll, gradients, p).values for p in (benign[::2], unsafe))
            state = replace(state, band=choose_band(*losses, max_fpr=max_fpr / 2, max_fnr=max_fnr))
            benign = benign[1::2]
        method = type(self.method)(state, self.layers)
        found = calibrate(self._score(method, gradients, benign).values, max_fpr)
        facts = calibration_facts(self.model, self.tokenizer, *state.pack())
        calibration = replace(found, facts=facts)
        self.state = replace(state, calibration=calibration)
        return calibration

    def flag(
        self,
        prompts: Sequence[Prompt] | EncodedPrompts,
        batch_tokens: int = 4096,
        progress: bool = True,
    ) -> Tensor:
        """Which prompts score above the threshold, `[n]` bool; NaN scores are flagged.

        Raises:
            ValueError: As in `score`, or the method has no neutral score and the detector was not
                calibrated.

        Warns:
            UncalibratedWarning: The neutral score is used as threshold; it rarely fits a model.
        """
        # Once: another thread may calibrate.
        method, gradients = self.method, self._gradients(batch_tokens, progress)
        threshold = method.state.threshold
        if threshold is None:
            threshold = 0.0 if method.state.learning else self.config.default_threshold
            advice = "call detector.calibrate(benign_prompts) first"
            if threshold is None:
                raise ValueError(f"gradsafe.Detector.flag: no threshold is set; {advice}")
            warnings.warn(
                f"gradsafe.Detector.flag: using the default threshold {threshold}, which rarely "
                f"fits a model; {advice}",
                UncalibratedWarning,
                stacklevel=2,
            )
        values = self._score(method, gradients, gradients.encode(prompts, "prompts")).values
        return (values > threshold) | values.isnan()

    def explain(
        self,
        prompt: Prompt,
        name: str = "prompt",
        evidence: Evidence = "position",
        batch_tokens: int = 4096,
        progress: bool = True,
    ) -> Explanation:
        """Explain a score with contributions of components and tokens, or of the prompt's words.

        Evidence "position" is exact and additive. With a_ct and b_ct, token t's parts of the
        similarities a_c and b_c of component c to the references, the evidence of the token is
        e_t = mean_c (a_ct - b_ct) / (a_c + b_c), which sums to 2 * score - 1. For relative
        "difference" and "unsafe", signed shares and GradSafe's cosines it sums to the score. After
        `learn`, every component counts with its learned weight in place of the mean; the hidden
        state's evidence is one number (`hidden_evidence`), and a constant remains: see
        `Explanation`. The tokens of the template and of the response are included. The evidence of
        a token belongs to its position, which depends on all tokens before it. The last tokens of
        the template carry much of it, since the response is predicted there; the last token of the
        response carries none. It takes two to three times as long as a score: the backward pass
        runs twice.

        Evidence "deletion" answers which words raise the score: that of a word is the score of the
        prompt less the score without the word. It exists for every method and option, takes one
        score per word, and does not sum to the score. Of a conversation the words are those of the
        last user turn. Neighbours share one deletion where a text has more than 64 words; a single
        word is divided into characters.

        Args:
            prompt: A text or a conversation.
            name: What error messages call it.
            evidence: "position" or "deletion".
            batch_tokens: Tokens per batch with "deletion", see `score`.
            progress: Show a progress bar with "deletion".

        Returns:
            The explanation, on the CPU. With overflow "window", the explanation of the window with
            the highest score; with "deletion" the scores are those of whole prompts.

        Raises:
            ValueError: As in `score`, a prompt of one character with "deletion", or, with
                "position", a method or option whose score is not a sum over tokens: methods "nll",
                "gradnorm" and "cascade", relative "ratio" and "logratio", reduce "median",
                `center`, absolute "before" and a score learned from "hidden" alone.
            TypeError: `prompt` is neither a text nor a conversation.
        """
        method = self.method  # another thread may learn or calibrate
        check_value("Detector.explain", "evidence", evidence, Evidence)
        if evidence == "position":
            learning = method.state.learning
            check_explainable(self.config, learning.features if learning else None)
        several = isinstance(prompt, (list, tuple)) and not isinstance((*prompt, {})[0], Mapping)
        if several or isinstance(prompt, Mapping):
            expected, got = "prompt to be str or a list of messages", type(prompt).__name__
            refuse("Detector.explain", expected, got, "explain takes one prompt", TypeError)
        if evidence == "deletion":
            gradients = self._gradients(batch_tokens, progress)
            windows = len(gradients.encode([prompt], [name]).items)

            def score(prompts: list[Prompt]) -> Scores:
                encoded = gradients.encode(prompts, [name] * len(prompts))
                return self._score(method, gradients, encoded, False)

            return explain_by_deletion(score, prompt, windows)
        gradients = self._gradients(batch_tokens=1, progress=False)
        encoded = gradients.encode([prompt], [name])
        probes = gradients.encode(probe_prompts(prompt), name)
        return explain(method, gradients, encoded, probes, method.state.threshold)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the detector (not the model) to a folder of safetensors and JSON, atomically.

        Raises:
            FileNotFoundError: The parent folder does not exist.
            FileExistsError: `folder` exists and is not a saved detector.
            ValueError: The weights or active adapters have changed since `fit` or `load`.
        """
        if model_sample(self.model) != self._sample:
            raise ValueError(
                "gradsafe.Detector.save: the model was changed after the detector was fitted on "
                "it; fit it again"
            )
        save_folder(folder, KIND, *pack(self))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: nn.Module, tokenizer: Any) -> Detector:
        """Read a saved detector for the same model and tokenizer.

        Raises:
            StorageError: The folder is missing, damaged or not a saved detector (a ValueError).
            ValueError: It was fitted on another model or tokenizer.
        """
        return unpack(folder, *load_folder(folder, KIND), model, tokenizer, cls)

    def _score(
        self,
        method: Method,
        gradients: GradientPass,
        prompts: EncodedPrompts,
        components: bool = False,
    ) -> Scores:
        found = method.score(gradients, prompts, components)
        worst = worst_windows(found.values, prompts.owners, len(prompts))
        columns = (found.values, found.components, found.nll, found.backward)
        values, parts, nll, backward = (column[worst] for column in columns)
        typed = torch.tensor([item.control_tokens for item in prompts.items])[worst]
        return Scores(values, parts, nll, backward, method.state.threshold, typed)

    def _gradients(self, batch_tokens: int, progress: bool) -> GradientPass:
        parts = self.model, self.tokenizer, self.config, self.layers, self.state.rows
        return GradientPass(*parts, batch_tokens, progress)


def pack(detector: Detector) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything of a detector but the model, as tensors and JSON values; see `unpack`."""
    tensors, metadata = detector.state.pack()
    return tensors, {**metadata, **_fingerprints(detector.model, detector.tokenizer)}


def unpack(
    where: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    model: nn.Module,
    tokenizer: Any,
    cls: type[Detector] = Detector,
) -> Detector:
    """Restore a detector from the result of `pack`, read from `where`; see `Detector.load`."""
    fingerprints = _fingerprints(model, tokenizer)
    saved = checked(where, {name: metadata.get(name) for name in fingerprints}, dict[str, str])
    for what, given in fingerprints.items():
        if saved[what] != given:
            raise ValueError(
                f"gradsafe.Detector.load: {where} was fitted on another {what} (fingerprint "
                f"{saved[what][:16]}, given {given[:16]}); load it with that {what}, or fit a new "
                "detector"
            )
    rest = {name: value for name, value in metadata.items() if name not in fingerprints}
    state, layers = DetectorState.unpack(where, tensors, rest, model)
    detector = cls(model, tokenizer, state, layers)
    for group, reference in state.references.items():
        if len(reference.sums) != detector.method.components.size:
            raise StorageError(f"{where} is malformed: {group}/sums are of other components")
    return detector


def _fingerprints(model: nn.Module, tokenizer: Any) -> dict[str, str]:
    return {"model": model_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer)}
