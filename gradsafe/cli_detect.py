"""`gradsafe detect`: one line of JSON per prompt, in slices, so that a killed run can go on."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gradsafe.cli_files import Inputs, check_destinations, read_inputs, texts
from gradsafe.cli_options import WITHOUT_REFERENCES, check_options, fit_options
from gradsafe.jsonl import JsonlWriter, Row, record_key, to_line

if TYPE_CHECKING:
    from gradsafe.detection import Detector, DetectorConfig

SLICE = 64  # prompts per call of the detector: what an interruption loses at most
FLOAT32_MAX = 3.4028234663852886e38


class StandardOutput:
    """Takes records like `JsonlWriter` does, and prints them."""

    def __init__(self) -> None:
        self.existing: list[dict[str, Any]] = []
        self._written = 0

    def __len__(self) -> int:
        return self._written

    def write(self, fields: Mapping[str, Any]) -> None:
        """Prints one record at once."""
        print(to_line({"index": self._written, **fields}), end="", flush=True)
        self._written += 1

    def close(self) -> None:
        """Does nothing: the stream belongs to the process."""


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises what `cli.main` turns into one line."""
    check_options(args)
    inputs = read_inputs(args)
    check_destinations(args)

    # From here on torch is needed, which takes seconds to import.
    from gradsafe.cli_model import load_model
    from gradsafe.cli_report import detection_summary

    model, tokenizer = load_model(args.model, args.dtype, args.device, not args.no_progress)
    output: JsonlWriter | StandardOutput = StandardOutput()
    if args.output:
        settings = _settings(args, inputs, model, tokenizer)
        keys = [record_key(i, row["prompt"], run=settings) for i, row in enumerate(inputs.rows)]
        output = JsonlWriter(args.output, keys, resume=args.resume, overwrite=args.overwrite)
    try:
        detector = _prepare(args, inputs, model, tokenizer)
        records = _score_all(args, inputs, detector, output)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(args, inputs, output)) from None
    except Exception:
        if hint := _how_to_resume(args, inputs, output):
            print(f"gradsafe: {hint}", file=sys.stderr)
        raise
    finally:
        output.close()
    # A score that is no number counts as the highest, as its flag does.
    scores = [FLOAT32_MAX if r["score"] is None else float(r["score"]) for r in records]
    flags = [bool(record["flag"]) for record in records] if detector.calibration else None
    summary = detection_summary(detector.config.method, scores, inputs.labels, flags)
    print(summary, file=sys.stdout if args.output else sys.stderr)
    return 0


def _settings(args: argparse.Namespace, inputs: Inputs, model: Any, tokenizer: Any) -> str:
    """Hashes all that scores and flags depend on, so that no file ever mixes two settings."""
    from gradsafe.storage import model_fingerprint, read_manifest, tokenizer_fingerprint

    settings = {
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "detector": read_manifest(args.detector) if args.detector else fit_options(args),
        "references": [inputs.unsafe, inputs.safe],
        "calibration": [inputs.benign, args.max_fpr if inputs.benign else None],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _prepare(args: argparse.Namespace, inputs: Inputs, model: Any, tokenizer: Any) -> Detector:
    """Loads or fits the detector, then calibrates and saves it as asked."""
    from gradsafe.detection import Detector, DetectorConfig

    if args.detector:
        detector = Detector.load(args.detector, model, tokenizer)
        _check_lengths(args, inputs, detector.config, model, tokenizer)
    else:
        options = fit_options(args)
        _check_lengths(args, inputs, DetectorConfig(**options), model, tokenizer)
        unsafe, safe = texts(inputs.unsafe), texts(inputs.safe)
        if unsafe is None and args.method not in WITHOUT_REFERENCES:
            from gradsafe import testbed

            unsafe, safe = testbed.references()
        options |= {"batch_tokens": args.batch_tokens, "progress": False}
        detector = Detector.fit(model, tokenizer, unsafe=unsafe, safe=safe, **options)
    _say(args, f"{detector.config.method}: {detector.coverage}")
    if inputs.benign is not None:
        detector.calibrate(
            texts(inputs.benign) or [],
            max_fpr=args.max_fpr,
            batch_tokens=args.batch_tokens,
            progress=not _bar_hidden(args),
        )
    if detector.calibration:
        _say(args, f"calibrated: {detector.calibration}")
    if args.save_detector:
        detector.save(args.save_detector)
    return detector


def _check_lengths(
    args: argparse.Namespace, inputs: Inputs, config: DetectorConfig, model: Any, tokenizer: Any
) -> None:
    """Finds a prompt beyond the context now, with its line, and not hours into the scoring."""
    from gradsafe.models.encode import Encoder, context_length

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
    for path, rows in (
        (args.unsafe, inputs.unsafe),
        (args.safe, inputs.safe),
        (args.calibrate, inputs.benign),
        (args.prompts, inputs.rows),
    ):
        for row in rows or ():
            with _named(path, row):
                encoder(row["prompt"])


def _how_to_resume(
    args: argparse.Namespace, inputs: Inputs, output: JsonlWriter | StandardOutput
) -> str:
    if not args.output or not len(output):
        return ""
    return (
        f"{len(output)} of {len(inputs.rows)} scores are in {args.output}; the same command with "
        f"--resume{' in place of --overwrite' * args.overwrite} goes on from there"
    )


@contextmanager
def _named(path: str, row: Row) -> Iterator[None]:
    """Puts file and line before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}:{row.line}: {error}") from error


def _score_all(
    args: argparse.Namespace,
    inputs: Inputs,
    detector: Detector,
    output: JsonlWriter | StandardOutput,
) -> list[dict[str, Any]]:
    """Scores what the output lacks; returns the records of all prompts."""
    from tqdm import tqdm

    records = list(output.existing)
    with tqdm(
        total=len(inputs.rows),
        initial=len(records),
        desc="scoring",
        unit="prompt",
        file=sys.stderr,
        disable=_bar_hidden(args),
    ) as bar:
        for start in range(len(records), len(inputs.rows), SLICE):
            rows = inputs.rows[start : start + SLICE]
            for row, score in zip(rows, _scores(args, detector, rows), strict=True):
                record = _record(args, row, score, detector.threshold)
                output.write(record)
                records.append(record)
                bar.update()
    return records


def _scores(args: argparse.Namespace, detector: Detector, rows: list[Row]) -> Iterator[float]:
    def score(rows: list[Row]) -> list[float]:
        prompts = [row["prompt"] for row in rows]
        return detector.score(prompts, args.batch_tokens, False, components=False).values.tolist()

    try:
        together = score(rows)
    except ValueError:
        together = []
    yield from together
    # One of them is at fault: alone, its line is known, and those before it are not lost.
    for row in rows[len(together) :]:
        with _named(args.prompts, row):
            alone = score([row])
        yield from alone


def _record(
    args: argparse.Namespace, row: Row, score: float, threshold: float | None
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if "source_id" in row:
        record["source_id"] = row["source_id"]
    # JSON knows neither NaN (null) nor Inf (clamped); nine digits restore a float32.
    clamped = max(-FLOAT32_MAX, min(FLOAT32_MAX, score))
    record["score"] = None if math.isnan(score) else float(f"{clamped:.9g}")
    if threshold is not None:
        record["flag"] = score > threshold or math.isnan(score)  # no number is no clearance
    if row.get("label") is not None:
        record["label"] = row["label"]
    if args.show_text:
        record["prompt"] = row["prompt"]
    return record


def _bar_hidden(args: argparse.Namespace) -> bool:
    """Bars only go to a terminal, and not between lines of output on the same one."""
    lines_in_sight = not args.output and sys.stdout.isatty()
    return args.no_progress or lines_in_sight or not sys.stderr.isatty()


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.no_progress:
        print(f"gradsafe: {text}", file=sys.stderr)
