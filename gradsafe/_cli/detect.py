"""`gradsafe detect`: one line of JSON per prompt, in slices, so that a killed run can go on."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gradsafe._cli.files import Inputs, check_destinations, located, read_inputs
from gradsafe._cli.options import check_options, fit_options
from gradsafe._cli.output import Output, Record, open_output
from gradsafe._cli.processes import check_agreement, hand_over, load_in_each
from gradsafe._io.processes import Processes
from gradsafe._io.processes import SharedProgress
from gradsafe._io.records import Row, record_key

if TYPE_CHECKING:
    from gradsafe.detection import Detector

SLICE = 64  # prompts per call of the detector: what an interruption loses at most
FLOAT32_MAX = 3.4028234663852886e38


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises what `cli.main` turns into one line."""
    processes: Processes = args.processes
    check_options(args)
    if processes.count > 1 and not args.output:
        raise ValueError("-o FILE is needed under torchrun: each process writes a part of it")
    inputs = read_inputs(args)
    if processes.first:
        check_destinations(args)

    # From here on torch is needed, which takes seconds to import.
    model, tokenizer = load_in_each(args, processes)
    keys: list[dict[str, Any]] = []
    if args.output:
        settings = _settings(args, inputs, model, tokenizer)
        keys = [record_key(i, row["prompt"], run=settings) for i, row in enumerate(inputs.rows)]
    check_agreement(processes, keys, model.device)
    output = open_output(args, keys, processes)
    try:
        found = output.found() if processes.first else set()
        pending = processes.share("pending slices", _unfinished(found, len(inputs.rows)))
        prepared = _prepare(args, inputs, model, tokenizer) if processes.first else None
        detector = hand_over(processes, prepared, model, tokenizer)
        output.begin()
        processes.wait("all are ready to score")
        _score_all(args, inputs, detector, output, pending)
        if not processes.first:
            return 0
        records = output.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(args, output)) from None
    except Exception:
        if (hint := _how_to_resume(args, output)) and processes.claim_last_word():
            print(f"gradsafe: {hint}", file=sys.stderr)
        raise
    finally:
        output.close()
    _summarise(args, inputs, detector, records)
    return 0


def _unfinished(found: set[int], total: int) -> list[int]:
    """Starts of the slices that lack a record.

    A slice that was cut short is scored again as a whole: in the batches of an unbroken run, the
    last bits of its scores are those of an unbroken run.
    """
    return [
        start
        for start in range(0, total, SLICE)
        if not found.issuperset(range(start, min(start + SLICE, total)))
    ]


def _summarise(
    args: argparse.Namespace, inputs: Inputs, detector: Detector, records: Sequence[Record]
) -> None:
    from gradsafe._cli.report import detection_summary

    # A score that is no number counts as the highest, as its flag does.
    scores = [FLOAT32_MAX if r["score"] is None else float(r["score"]) for r in records]
    flags = [bool(record["flag"]) for record in records] if detector.calibration else None
    summary = detection_summary(detector.config.method, scores, inputs.labels, flags)
    print(summary, file=sys.stdout if args.output else sys.stderr)


def _settings(args: argparse.Namespace, inputs: Inputs, model: Any, tokenizer: Any) -> str:
    """Hashes all that scores and flags depend on, so that no file ever mixes two settings."""
    from gradsafe._io.artifacts import read_manifest
    from gradsafe._io.fingerprints import model_fingerprint, tokenizer_fingerprint

    settings = {
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "detector": read_manifest(args.detector) if args.detector else fit_options(args),
        "references": [inputs.unsafe, inputs.safe],
        "calibration": [inputs.benign, args.max_fpr if inputs.benign else None, inputs.harmful],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _prepare(args: argparse.Namespace, inputs: Inputs, model: Any, tokenizer: Any) -> Detector:
    """Loads or fits the detector, then calibrates and saves it as asked."""
    from gradsafe._cli.detector import prepare_detector

    named = [(f"{args.prompts}:{row.line}", row["prompt"]) for row in inputs.rows]
    hidden = _bar_hidden(args)
    detector = prepare_detector(args, inputs, named, model, tokenizer, progress=not hidden)
    if args.save_detector:
        detector.save(args.save_detector)
    return detector


def _how_to_resume(args: argparse.Namespace, output: Output) -> str:
    if not (saved := output.saved()):
        return ""
    return (
        f"{saved}; the same command with --resume{' in place of --overwrite' * args.overwrite} "
        "goes on from there"
    )


def _score_all(
    args: argparse.Namespace,
    inputs: Inputs,
    detector: Detector,
    output: Output,
    pending: list[int],
) -> None:
    """Scores slices as long as there are any; returns when all processes have."""
    from tqdm import tqdm

    processes: Processes = args.processes
    left = sum(len(inputs.rows[start : start + SLICE]) for start in pending)
    with tqdm(
        total=len(inputs.rows),
        initial=len(inputs.rows) - left,
        desc="scoring",
        unit="prompt",
        file=sys.stderr,
        disable=_bar_hidden(args),
    ) as bar:
        show = SharedProgress(bar, processes, "scored")
        for start in processes.deal(pending):
            rows = inputs.rows[start : start + SLICE]
            scores = _scores(args, detector, rows)
            for index, (row, score) in enumerate(zip(rows, scores, strict=True), start):
                output.write(index, _record(args, row, score, detector.threshold))
            show(len(rows))
        processes.wait("all are scored", show)
        show()


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
        with located(f"{args.prompts}:{row.line}"):
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
    hidden = args.no_progress or not args.processes.first
    return hidden or lines_in_sight or not sys.stderr.isatty()
