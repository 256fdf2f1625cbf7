"""The screener: fit on a few rows, calibrate on clean ones, score and explain training rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from gradsafe._checks import refuse
from gradsafe.detection.calibration import Calibration, calibrate
from gradsafe.detection.components import ComponentMap, choose_rows
from gradsafe.detection.explanation import Explanation, explain
from gradsafe.detection.gradients import EncodedPrompts, GradientPass
from gradsafe.detection.references import Reference, build_reference
from gradsafe.detection.state import DetectorState
from gradsafe.models import Layers, find_layers, probe_prompts
from gradsafe.models.rows import pair
from gradsafe.screening.adapters import AdapterPass, adapted
from gradsafe.screening.config import ScoreName, ScreenConfig
from gradsafe.screening.methods import Both, make_method
from gradsafe.screening.rows import RowEncoder, Rows, TruncatedRow, place
from gradsafe.screening.safety import safety_gradient
from gradsafe.screening.scores import ScreenScores

SLICE = 64  # rows that are encoded at a time


class Screener:
    """Scores training rows by what a step on them would do to a model's alignment.

    `Screener.fit` makes one. Rows are dicts in the formats of TRL: `prompt` (text or messages) with
    `response` or `completion`, or `messages` that end with the assistant's response. Nothing is
    trained, and no gradient of a whole model is ever held.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, config: ScreenConfig, layers: Layers, method: Both
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.layers, self.method = layers, method
        self.calibrations: dict[ScoreName, Calibration] = {}
        self._encode = RowEncoder(model, tokenizer, config)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,
        unsafe: Rows | None = None,
        safe: Rows | None = None,
        alignment: Rows | None = None,
        *,
        sample: Rows | None = None,
        batch_tokens: int = 4096,
        progress: bool = True,
        **options: Any,
    ) -> Screener:
        """Compute the safety gradient and the reference gradients from a few rows.

        Args:
            model: The aligned model before training, with or without a PEFT adapter.
            tokenizer: Its tokenizer.
            unsafe: Harmful rows: unsafe prompts with harmful answers, for the score "share".
            safe: Harmless rows, for the score "share"; in the style of the data to be screened.
            alignment: Unsafe prompts with refusals, for the score "alignment".
            sample: Some of the rows to be screened, for scale="adam" only.
            batch_tokens: Tokens per batch, padding included; lower it if memory runs out.
            progress: Show progress bars.
            **options: Fields of `ScreenConfig`.

        Raises:
            ValueError: No rows at all, rows of one class only, a row without response, a row
                longer than the context, no LoRA adapter for parameters="lora", or (as
                NonFiniteGradientError) NaN in a gradient.
            TypeError: An unknown option, or a value of the wrong type.
        """
        config, where = ScreenConfig(**options), "Screener.fit"
        if (unsafe is None) != (safe is None):
            missing, known = ("safe", "unsafe") if safe is None else ("unsafe", "safe")
            got, do = f"{known}= alone", f"give {missing}=[...] too, or leave out {known}="
            refuse(where, "reference rows of both classes", got, do)
        if unsafe is None and alignment is None:
            refuse(
                where,
                "alignment=[...] (unsafe prompts with refusals), unsafe=[...] and safe=[...] "
                "(harmful and harmless rows), or all three",
                "none of them",
            )
        if (config.scale == "adam") != (sample is not None):
            refuse(where, 'sample=[...] with scale="adam", and only then', repr(config.scale))
        if config.scale == "adam" and alignment is None:
            refuse(where, 'alignment=[...] with scale="adam"', "none")
        layers = scored = find_layers(model, config.layers, config.modules)
        if config.parameters == "lora":
            layers, scored = adapted(layers)
        weights = choose_rows(scored, config.row_fraction, config.row_seed)
        kind = AdapterPass if config.parameters == "lora" else GradientPass
        run = kind(
            model, tokenizer, config.detection, layers, weights, batch_tokens, progress, "Screener"
        )
        encode = RowEncoder(model, tokenizer, config)
        given = {"unsafe": unsafe, "safe": safe, "alignment": alignment, "sample": sample}
        encoded = {k: encode(rows, k) for k, rows in given.items() if rows is not None}
        components = ComponentMap(scored, "tensor", (), weights)
        references: dict[str, Reference] = {
            name: build_reference(run, encoded[name].items, components, True, name)[0]
            for name in ("unsafe", "safe")
            if name in encoded
        }
        if alignment is not None:
            groups = ("alignment", "unsafe" if config.safety == "margin" else "", "sample")
            items = (encoded[name].items if name in encoded else [] for name in groups)
            references["alignment"] = safety_gradient(run, components, *items)
        state = DetectorState(config.detection, weights)
        return cls(
            model, tokenizer, config, layers, make_method(state, references, scored, config.measure)
        )

    @property
    def decide(self) -> ScoreName:
        """The name of the score that flags: the option, or else the only score."""
        names = tuple(self.method.parts)
        return self.config.decide if self.config.decide in names else names[0]

    @property
    def scores(self) -> tuple[ScoreName, ...]:
        """The names of the scores."""
        return tuple(self.method.parts)

    def encode(self, rows: Rows, name: str = "rows", first: int = 0) -> EncodedPrompts:
        """Encode rows, of which the first has the number `first` in error messages."""
        return self._encode(rows, name, first)

    def score(
        self, rows: Rows | EncodedPrompts, batch_tokens: int = 4096, progress: bool = True
    ) -> ScreenScores:
        """Score rows with one forward and one backward pass each.

        Rows of similar length share a batch; scores do not depend on the batches.

        Args:
            rows: Rows, or the result of `encode`.
            batch_tokens: Tokens per batch, padding included; lower it if memory runs out.
            progress: Show a progress bar.

        Raises:
            ValueError: No rows, a row without response or longer than the context, or (as
                NonFiniteGradientError) a NaN gradient; the message names the row.
            TypeError: A row is no dict, or a field is of another type.
        """
        encoded = rows if isinstance(rows, EncodedPrompts) else self.encode(rows)
        items, count = encoded.items, len(encoded)
        nll = torch.empty(count, dtype=torch.float32)
        found = {name: torch.empty_like(nll) for name in self.scores}
        gradients = self._gradients(batch_tokens, progress)
        for indices, batch_nll, table, _ in self.method.tables(gradients, encoded):
            nll[indices] = batch_nll
            for name, values in self.method.scores(table).items():
                found[name][indices] = values.float()
        lengths = torch.tensor([len(item) for item in items])
        cut = torch.tensor([isinstance(item, TruncatedRow) for item in items])
        thresholds = {name: c.threshold for name, c in self.calibrations.items()}
        both = found.get("alignment"), found.get("share")
        return ScreenScores(*both, nll, lengths, cut, self.decide, thresholds)

    def stream(
        self, rows: Iterable[Mapping[str, Any]], batch_tokens: int = 4096, size: int = SLICE
    ) -> Iterator[ScreenScores]:
        """Score any number of rows, `size` at a time; only these are in memory.

        Raises:
            ValueError, TypeError: As `score`; the message names the row by its number.
        """
        if size < 1:
            refuse("Screener.stream", "size to be at least 1", size)
        iterator, first = iter(rows), 0
        while chosen := list(islice(iterator, size)):
            yield self.score(self.encode(chosen, first=first), batch_tokens, False)
            first += len(chosen)

    def calibrate(
        self,
        clean_rows: Rows | EncodedPrompts,
        max_fpr: float = 0.01,
        batch_tokens: int = 4096,
        progress: bool = True,
    ) -> dict[ScoreName, Calibration]:
        """Set the threshold of each score so that at most `max_fpr` of rows like these are flagged.

        Args:
            clean_rows: Rows known to be clean, in the style of the data to be screened; none of
                the rows that the screener was fitted on. 99 or more for 1 %.
            max_fpr: Bound on the false-positive rate.
            batch_tokens: See `score`.
            progress: See `score`.

        Returns:
            Threshold, measured rate and its confidence interval of each score.

        Raises:
            ValueError: As in `score`, or `max_fpr` is out of range.

        Warns:
            UserWarning: Too few rows to guarantee the rate.
        """
        encoded = clean_rows
        if not isinstance(encoded, EncodedPrompts):
            encoded = self.encode(encoded, "clean_rows")
        scores = self.score(encoded, batch_tokens, progress)
        found = {name: calibrate(getattr(scores, name), max_fpr) for name in self.scores}
        self.calibrations = found
        return found

    def explain(self, row: Mapping[str, Any], name: str = "row") -> dict[ScoreName, Explanation]:
        """The exact evidence of every token of a row, for each score.

        The evidence of "alignment" sums to the score, that of "share" to 2 * score - 1; see
        `Explanation`, whose `response_tokens` are the row's own response. It takes two backward
        passes per score.

        Raises:
            ValueError, TypeError: As in `score`.
        """
        prompt, response = pair(row, where := place(row, name, 0))
        encoded = self.encode([row], name)
        variants = [{"prompt": text, "response": response} for text in probe_prompts(prompt)]
        probes = self.encode(variants, where)
        gradients = self._gradients(1, False)
        thresholds = {name: c.threshold for name, c in self.calibrations.items()}
        return {
            name: explain(part, gradients, encoded, probes, thresholds.get(name))
            for name, part in self.method.parts.items()
        }

    def _gradients(self, batch_tokens: int, progress: bool) -> GradientPass:
        kind = AdapterPass if self.config.parameters == "lora" else GradientPass
        state = self.method.state
        parts = self.model, self.tokenizer, state.config, self.layers, state.rows
        return kind(*parts, batch_tokens, progress, "Screener")
