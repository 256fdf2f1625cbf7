"""`gradsafe explain`: the evidence of one prompt, by token and component or by word."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import ClassVar

from gradsafe import detection
from gradsafe._io.processes import Processes
from gradsafe._io.records import check_output
from gradsafe._jobs import detector as detectors
from gradsafe._jobs.data import read_prompts, refuse_inputs
from gradsafe._jobs.detector import FitOptions
from gradsafe._jobs.options import FLAT, ModelOptions, check_positive, save_config, transient
from gradsafe.detection.config import DetectorConfig, Evidence
from gradsafe.models.encoding import Prompt
from gradsafe.models.rows import prompt_of


@dataclass(frozen=True)
class ExplainResult:
    """An explanation and the name of the method."""

    method: str
    explanation: detection.Explanation


@dataclass(frozen=True)
class Explain:
    """Show which tokens and components, or which words, a score comes from.

    The prompt is printed, also one from a file: the command shows its tokens.

    Attributes:
        prompt: Text to explain.
        prompt_file: File to read the prompt from instead: JSON Lines or .txt.
        line: Its line in that file, from 1.
        model: Model.
        fit: References and calibration.
        config: Detector.
        evidence: What is shown: "position" (exact parts of the score, by token) or "deletion" (how
            much lower the score is without a word; one score per word).
        html: File for a page with a heat map.
        overwrite: Replace an existing page.
        json: Print JSON.
        progress: Show progress bars and notes.
    """

    prompt: str | None = None
    prompt_file: str | None = None
    line: int | None = None
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    fit: FitOptions = field(default_factory=FitOptions, metadata=FLAT)
    config: DetectorConfig = field(default_factory=DetectorConfig, metadata=FLAT)
    evidence: Evidence = "position"
    html: str | None = None
    overwrite: bool = transient(False)
    json: bool = transient(False)
    progress: bool = transient(True)

    POSITIONAL: ClassVar = "prompt"

    def run(self, processes: Processes | None = None) -> ExplainResult:
        """Explains the prompt.

        Raises:
            ValueError, OSError: Inputs or options do not fit; the message says what to do.
        """
        self.model.check()
        self.fit.check(self.config)
        if self.overwrite and not self.html:
            raise ValueError("--overwrite needs --html FILE")
        where, prompt = self._prompt()
        prompts = self.fit.read()
        if self.html:
            refuse_inputs("--html", self.html, [self.prompt_file, *self.fit.files])
            check_output(self.html, overwrite=self.overwrite)

        # Everything below needs torch, which takes seconds to import.
        from gradsafe._jobs.model import load_model
        from gradsafe.detection.explanation import check_explainable

        if not self.fit.detector and self.evidence == "position":
            check_explainable(self.config, self.fit.learn_features if self.fit.learn else None)
        bars = self.progress and sys.stderr.isatty()
        model, tokenizer = load_model(self.model)
        detector = detectors.prepare(
            self.fit,
            self.config,
            prompts,
            model,
            tokenizer,
            batch_tokens=4096,
            progress=bars,
            say=lambda text: print(f"gradsafe: {text}", file=sys.stderr) if self.progress else None,
        )
        explanation = detector.explain(prompt, where, self.evidence, progress=bars)
        if self.html:
            save_config(self, self.html)
        return ExplainResult(detector.config.method, explanation)

    def _prompt(self) -> tuple[str, Prompt]:
        """The place of the prompt, for error messages, and the prompt."""
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("give either PROMPT or --prompt_file FILE")
        check_positive(line=self.line)
        if self.prompt_file is not None:
            line = self.line or 1
            for row in read_prompts(self.prompt_file) or ():
                if row.line == line:
                    return row.where, prompt_of(row, row.where)
            raise ValueError(f"{self.prompt_file}:{line}: no prompt in this line")
        if self.line is not None:
            raise ValueError("--line needs --prompt_file FILE")
        assert self.prompt is not None
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError("PROMPT is not valid text in this terminal's encoding") from error
        return "PROMPT", self.prompt
