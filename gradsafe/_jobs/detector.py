"""The detector of a job: fitted or loaded, calibrated, and the same in all processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradsafe import detection
from gradsafe._io.artifacts import read_manifest
from gradsafe._io.processes import Processes
from gradsafe._io.records import Row, labels_of
from gradsafe._jobs.data import located, prompts_of, read_prompts
from gradsafe._jobs.options import as_options, changed, plain
from gradsafe.detection.config import DetectorConfig, Features
from gradsafe.models.rows import prompt_of


@dataclass(frozen=True)
class FitOptions:
    """References and calibration.

    Attributes:
        unsafe: Unsafe reference prompts: JSON Lines, .txt or hf:ID:SPLIT.
        safe: Safe reference prompts.
        calibrate: Harmless prompts, which set the threshold for flags.
        calibrate_unsafe: Unsafe prompts; with calibrate they set which prompts the method "cascade"
            decides without gradients.
        max_fpr: False-positive rate to calibrate for.
        learn: Prompts with "label" (safe or unsafe), at least two of each, to learn the score from;
            method "gradcoo" only.
        learn_features: What is learned from: components, the hidden state of a block, or both.
        learn_layer: Index of that block; chosen by cross-validation if not given.
        detector: Folder of a saved detector, which is used instead of fitting one.
    """

    unsafe: str | None = None
    safe: str | None = None
    calibrate: str | None = None
    calibrate_unsafe: str | None = None
    max_fpr: float = 0.01
    learn: str | None = None
    learn_features: Features = "both"
    learn_layer: int | None = None
    detector: str | None = None

    def check(self, config: DetectorConfig) -> None:
        """Raises ValueError if options contradict each other or one is missing."""
        if not 0 < self.max_fpr < 1:
            raise ValueError(f"--max_fpr must be between 0 and 1, got {self.max_fpr}")
        if not self.learn and (self.learn_features, self.learn_layer) != ("both", None):
            raise ValueError("--learn_features and --learn_layer need --learn FILE")
        if self.detector:
            fitted = [*changed(config), *(n for n in ("unsafe", "safe") if getattr(self, n))]
            if fitted:
                raise ValueError(
                    f"--detector {self.detector} is fitted already: leave out --{fitted[0]}"
                )
            read_manifest(self.detector)
            if self.calibrate_unsafe and not self.calibrate:
                raise ValueError("--calibrate_unsafe needs --calibrate FILE")
            return
        if self.learn and config.method != "gradcoo":
            raise ValueError(f"--learn needs --method gradcoo, got {config.method}")
        cascade = config.method == "cascade"
        if self.calibrate_unsafe and not (cascade and self.calibrate):
            raise ValueError("--calibrate_unsafe needs --method cascade and --calibrate FILE")
        if cascade and self.calibrate and not self.calibrate_unsafe:
            raise ValueError("--method cascade with --calibrate needs --calibrate_unsafe FILE too")
        if (self.unsafe is None) != (self.safe is None):
            raise ValueError("--unsafe and --safe belong together: give both files")
        if config.uses_references and self.unsafe is None:
            raise ValueError(
                "--unsafe FILE and --safe FILE are needed: a few reference prompts of each kind, "
                "in the style of your traffic"
            )

    @property
    def files(self) -> list[str | None]:
        """The input files."""
        return [self.unsafe, self.safe, self.calibrate, self.calibrate_unsafe, self.learn]

    def read(self) -> Prompts:
        """Reads the files; a label, if a row has one, must not contradict."""
        labelled = read_prompts(self.learn)
        if labelled is not None:
            from gradsafe.detection.learning import check_labels

            with located(f"--learn {self.learn}"):
                labels = labels_of(labelled)
                if labels is None:
                    raise ValueError('no labels: give every row "label": "safe" or "unsafe"')
                check_labels(labels, len(labelled))
        return Prompts(
            read_prompts(self.unsafe, "unsafe"),
            read_prompts(self.safe, "safe"),
            read_prompts(self.calibrate, "safe"),
            read_prompts(self.calibrate_unsafe, "unsafe"),
            labelled,
        )


@dataclass(frozen=True)
class Prompts:
    """The rows that a detector is fitted, learns and is calibrated with."""

    unsafe: list[Row] | None
    safe: list[Row] | None
    benign: list[Row] | None
    harmful: list[Row] | None
    labelled: list[Row] | None = None


def prepare(
    options: FitOptions,
    config: DetectorConfig,
    prompts: Prompts,
    model: Any,
    tokenizer: Any,
    *,
    batch_tokens: int,
    progress: bool,
    say: Callable[[str], None],
) -> detection.Detector:
    """Fits or loads a detector, lets it learn, and calibrates it.

    Args:
        options: What to do.
        config: Configuration of a detector that is fitted.
        prompts: The rows of the files of `options`.
        model: The model.
        tokenizer: Its tokenizer.
        batch_tokens: Padded tokens per batch.
        progress: Show a progress bar while calibrating.
        say: Takes notes for the user: coverage, learning and calibration.
    """
    if options.detector:
        detector = detection.Detector.load(options.detector, model, tokenizer)
    else:
        chosen = as_options(config)
        _check_encoding([*(prompts.unsafe or ()), *(prompts.safe or ())], chosen, model, tokenizer)
        detector = detection.Detector.fit(
            model,
            tokenizer,
            unsafe=prompts_of(prompts.unsafe),
            safe=prompts_of(prompts.safe),
            batch_tokens=batch_tokens,
            progress=False,
            **chosen,
        )
    say(f"{detector.config.method}: {detector.coverage}")
    if prompts.labelled is not None:
        rows = prompts.labelled
        learning = detector.learn(
            detector.encode(prompts_of(rows), [row.where for row in rows]),
            labels_of(rows) or (),
            features=options.learn_features,
            layer=options.learn_layer,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        say(str(learning))
    if prompts.benign is not None:
        benign, harmful = (
            None if rows is None else detector.encode(prompts_of(rows), [row.where for row in rows])
            for rows in (prompts.benign, prompts.harmful)
        )
        assert benign is not None
        detector.calibrate(
            benign,
            max_fpr=options.max_fpr,
            batch_tokens=batch_tokens,
            progress=progress,
            unsafe_prompts=harmful,
        )
    if detector.band:
        say(f"cascade: {detector.band}")
    if detector.calibration:
        say(f"calibrated: {detector.calibration}")
    return detector


def share(
    processes: Processes, detector: detection.Detector | None, model: Any, tokenizer: Any
) -> detection.Detector:
    """Sends the first process's detector to the others, bit for bit."""
    if processes.count == 1:
        assert detector is not None
        return detector
    from gradsafe.detection.detector import pack, unpack

    mine, facts = pack(detector) if detector is not None else ({}, {})
    metadata = processes.share("detector", facts)
    tensors = processes.share_tensors("references", mine, model.device)
    if detector is not None:
        return detector
    return unpack("the detector of process 0", tensors, metadata, model, tokenizer)


def settings_hash(
    options: FitOptions, config: DetectorConfig, prompts: Prompts, model: Any, tokenizer: Any
) -> str:
    """Hash of everything that scores and flags depend on, so that no output mixes two settings."""
    from gradsafe._io.fingerprints import model_fingerprint, tokenizer_fingerprint

    calibration = [prompts.benign, options.max_fpr if prompts.benign else None, prompts.harmful]
    settings = {
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "detector": read_manifest(options.detector) if options.detector else plain(config),
        "references": [prompts.unsafe, prompts.safe],
        "learning": [prompts.labelled, options.learn_features, options.learn_layer],
        "calibration": calibration,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_agreement(processes: Processes, facts: Any, device: Any) -> None:
    """Raises ValueError if this process has other inputs than the first, or another device type."""
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    first = processes.share("job", [digest, device.type])
    if first[0] != digest:
        raise ValueError(
            f"process {processes.rank} has other inputs, settings or another model than process "
            "0: all machines need the same files"
        )
    if first[1] != device.type:
        raise ValueError(
            f"process {processes.rank} computes on {device.type} and process 0 on {first[1]}: "
            "give --device cpu or --device cuda"
        )


def _check_encoding(
    rows: Sequence[Row], config: dict[str, Any], model: Any, tokenizer: Any
) -> None:
    """Encodes a few rows to name the file and line of one that cannot be encoded."""
    from gradsafe.models import context_length
    from gradsafe.models.encode import Encoder

    length = context_length(model, tokenizer) if config["overflow"] == "error" else None
    encoder = Encoder(
        tokenizer,
        config["response"],
        template=config["template"],
        system=config["system"],
        append_eos=DetectorConfig(**config).eos,
        max_length=length,
        split_special_tokens=config["split_special_tokens"],
    )
    for row in rows:
        with located(row.where):
            encoder(prompt_of(row, row.where))
