"""`gradsafe explain`: one prompt's tokens and components with their evidence."""

from __future__ import annotations

import argparse
import json
import os
import sys

from gradsafe._cli.files import (
    check_new_file,
    check_saved_detector,
    located,
    read_line,
    read_references,
    reference_files,
    write_text,
)
from gradsafe._cli.options import (
    add_detector_arguments,
    add_model_arguments,
    check_detector_options,
    fit_options,
    positive_integer,
)

COMPONENTS = 8  # how many the terminal lists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.usage = "gradsafe explain --model DIR --unsafe FILE --safe FILE [options] PROMPT"
    parser.description = (
        "Show which tokens and components a score comes from. The prompt itself is printed, also "
        "one from a file: its tokens are what the command is about."
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to explain")
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="take it from JSON Lines or a .txt file instead"
    )
    parser.add_argument(
        "--line", type=positive_integer, metavar="N", help="its line in that file (default: 1)"
    )
    add_model_arguments(parser)
    add_detector_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--html", metavar="FILE", help="write a page with a heat map as well")
    output.add_argument("--overwrite", action="store_true", help="replace an existing --html FILE")
    output.add_argument("--json", action="store_true", help="print JSON instead")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises what `cli.main` turns into one line."""
    check_detector_options(args)
    if args.overwrite and not args.html:
        raise ValueError("--overwrite needs --html FILE")
    where, prompt = _read_prompt(args)
    references = read_references(args)
    if args.html:
        inputs = (args.prompt_file, *reference_files(args))
        check_new_file("--html", args.html, inputs, args.overwrite)
    check_saved_detector(args.detector)

    # From here on torch is needed, which takes seconds to import.
    from gradsafe._cli.detector import prepare_detector
    from gradsafe._cli.explain_html import page
    from gradsafe._cli.explain_text import report
    from gradsafe._cli.model import load_model
    from gradsafe.detection import DetectorConfig
    from gradsafe.detection.explanation import check_explainable

    if not args.detector:
        check_explainable(DetectorConfig(**fit_options(args)))
    model, tokenizer = load_model(args.model, args.dtype, args.device, not args.no_progress)
    hidden = args.no_progress or not sys.stderr.isatty()
    detector = prepare_detector(
        args, references, [(where, prompt)], model, tokenizer, progress=not hidden
    )
    with located(where):
        explanation = detector.explain(prompt)
    if args.html:
        write_text(args.html, page(explanation, detector.config.method))
    if args.json:
        print(json.dumps(explanation.to_json(), allow_nan=False))
    else:
        print(report(explanation, detector.config.method, COMPONENTS, color=_color()))
    return 0


def _read_prompt(args: argparse.Namespace) -> tuple[str, str]:
    """Where the prompt stands, for error messages, and its text."""
    if (args.prompt is None) == (args.prompt_file is None):
        raise ValueError("give either PROMPT or --prompt-file FILE")
    if args.prompt_file is not None:
        row = read_line(args.prompt_file, args.line or 1)
        return f"{args.prompt_file}:{row.line}", row["prompt"]
    if args.line is not None:
        raise ValueError("--line needs --prompt-file FILE")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError("PROMPT is not valid text in this terminal's encoding") from error
    return "PROMPT", args.prompt


def _color() -> bool:
    """Whether to color: on a terminal that can, unless NO_COLOR (no-color.org) is set."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not unwanted
