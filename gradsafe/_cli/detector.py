"""Loads or fits the detector that a command names, and calibrates it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from gradsafe._cli.files import References, located, texts
from gradsafe._cli.options import WITHOUT_REFERENCES, fit_options
from gradsafe.detection import Detector, DetectorConfig
from gradsafe.models import context_length
from gradsafe.models.encode import Encoder

NamedPrompt = tuple[str, str]  # where it stands, for error messages; its text


def prepare_detector(
    args: argparse.Namespace,
    references: References,
    prompts: Sequence[NamedPrompt],
    model: Any,
    tokenizer: Any,
    *,
    progress: bool,
) -> Detector:
    """Loads or fits the detector, and calibrates it as asked.

    Args:
        args: Options of `options.add_model_arguments` and `add_detector_arguments`.
        references: What their files say.
        prompts: What will be scored: looked at now, so that one beyond the context is found with
            its place, and not hours into the work.
        model: The model.
        tokenizer: Its tokenizer.
        progress: Show a progress bar while calibrating.

    Returns:
        The detector.
    """
    if args.detector:
        detector = Detector.load(args.detector, model, tokenizer)
        _check_lengths(args, references, prompts, detector.config, model, tokenizer)
    else:
        options = fit_options(args)
        _check_lengths(args, references, prompts, DetectorConfig(**options), model, tokenizer)
        unsafe, safe = texts(references.unsafe), texts(references.safe)
        if unsafe is None and args.method not in WITHOUT_REFERENCES:
            from benchmarks import testbed

            unsafe, safe = testbed.references()
        options |= {"batch_tokens": args.batch_tokens, "progress": False}
        detector = Detector.fit(model, tokenizer, unsafe=unsafe, safe=safe, **options)
    _say(args, f"{detector.config.method}: {detector.coverage}")
    if references.benign is not None:
        detector.calibrate(
            texts(references.benign) or [],
            max_fpr=args.max_fpr,
            batch_tokens=args.batch_tokens,
            progress=progress,
            unsafe_prompts=texts(references.harmful),
        )
    if detector.band:
        _say(args, f"cascade: {detector.band}")
    if detector.calibration:
        _say(args, f"calibrated: {detector.calibration}")
    return detector


def _check_lengths(
    args: argparse.Namespace,
    references: References,
    prompts: Sequence[NamedPrompt],
    config: DetectorConfig,
    model: Any,
    tokenizer: Any,
) -> None:
    if config.overflow != "error":
        return
    encoder = Encoder(
        tokenizer,
        config.response,
        template=config.template,
        system=config.system,
        append_eos=config.eos,
        max_length=context_length(model, tokenizer),
    )
    named = [
        (f"{path}:{row.line}", row["prompt"])
        for path, rows in (
            (args.unsafe, references.unsafe),
            (args.safe, references.safe),
            (args.calibrate, references.benign),
            (args.calibrate_unsafe, references.harmful),
        )
        for row in rows or ()
    ]
    for where, prompt in (*named, *prompts):
        with located(where):
            encoder(prompt)


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.no_progress:
        print(f"gradsafe: {text}", file=sys.stderr)
