"""Options of `gradsafe detect`, those it shares, and which of them belong together."""

from __future__ import annotations

import argparse
from typing import Any

TESTBED = "testbed"
METHODS = ("gradcoo", "gradsafe", "cascade", "nll", "gradnorm")
GRANULARITIES = ("tensor", "row", "column", "row+column", "head", "layer", "expert")
RELATIVES = ("share", "ratio", "logratio", "difference", "unsafe")
DTYPES = ("float32", "bfloat16", "float16")
REFERENCE_DTYPES = (*DTYPES, "float8")
WITHOUT_REFERENCES = ("nll", "gradnorm")
FIT_OPTIONS = (
    *("method", "response", "granularity", "relative", "template", "layers"),
    *("row_fraction", "reference_dtype", "overflow"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `gradsafe detect`."""
    parser.usage = (
        "gradsafe detect --model DIR --unsafe FILE --safe FILE [-o FILE] [options] PROMPTS"
    )
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help='JSON Lines with "prompt" (and "label": safe or unsafe, and "source_id", if known), '
        "or a .txt file with one prompt per line",
    )
    add_model_arguments(parser)
    detector = add_detector_arguments(parser)
    detector.add_argument("--save-detector", metavar="DIR", help="save the detector")
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    existing = output.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with an interrupted -o FILE")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing -o FILE")
    output.add_argument(
        "--limit", type=positive_integer, metavar="N", help="only the first N prompts"
    )
    output.add_argument("--no-progress", action="store_true", help="no progress bar")
    output.add_argument("--show-text", action="store_true", help="put prompts into the output")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which model runs, and how."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="DIR", help='model folder, or "testbed"')
    model.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    model.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    model.add_argument(
        "--batch-tokens",
        type=positive_integer,
        default=4096,
        metavar="N",
        help="padded tokens per batch (default: %(default)s); results do not depend on it",
    )


def add_detector_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declares those of the fit, without defaults: the detector's own count."""
    fit = parser.add_argument_group("detector")
    fit.add_argument("--unsafe", metavar="FILE", help="unsafe reference prompts")
    fit.add_argument("--safe", metavar="FILE", help="safe reference prompts")
    fit.add_argument("--method", choices=METHODS, help="default: gradcoo")
    fit.add_argument("--response", metavar="TEXT", help="compliance response (default: Sure)")
    fit.add_argument("--granularity", choices=GRANULARITIES, help="default: tensor")
    fit.add_argument("--relative", choices=RELATIVES, help="default: share")
    fit.add_argument(
        "--template",
        metavar="TEXT",
        help=r"prompt template with {prompt}, \n for a line end (default: the tokenizer's)",
    )
    fit.add_argument("--layers", type=positive_integer, metavar="N", help="only the last N blocks")
    fit.add_argument(
        "--row-fraction",
        type=fraction,
        metavar="F",
        help="score only this part of the rows of every weight (default: 1)",
    )
    fit.add_argument("--reference-dtype", choices=REFERENCE_DTYPES, help="default: bfloat16")
    fit.add_argument(
        "--overflow",
        choices=("error", "window"),
        help="prompts beyond the context: an error, or overlapping windows (default: error)",
    )
    fit.add_argument(
        "--calibrate", metavar="FILE", help="harmless prompts that set the threshold for flags"
    )
    fit.add_argument(
        "--calibrate-unsafe",
        metavar="FILE",
        help="unsafe prompts; with --calibrate they set which prompts --method cascade decides "
        "without gradients",
    )
    fit.add_argument(
        "--max-fpr",
        type=share,
        default=0.01,
        metavar="P",
        help="false positive rate to calibrate for (default: %(default)s)",
    )
    fit.add_argument("--detector", metavar="DIR", help="use a saved detector, fit none")
    return fit


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError where options contradict each other or one is missing."""
    check_detector_options(args)
    if (args.resume or args.overwrite) and not args.output:
        raise ValueError("--resume and --overwrite need -o FILE")


def check_detector_options(args: argparse.Namespace) -> None:
    """`check_options` for those of `add_detector_arguments`."""
    given = [name for name in (*FIT_OPTIONS, "unsafe", "safe") if getattr(args, name) is not None]
    if args.detector and given:
        option = "--" + given[0].replace("_", "-")
        raise ValueError(f"--detector {args.detector} was fitted already: leave out {option}")
    is_cascade = None if args.detector else args.method == "cascade"
    if args.calibrate_unsafe and (is_cascade is False or not args.calibrate):
        raise ValueError("--calibrate-unsafe needs --method cascade and --calibrate FILE")
    if is_cascade and args.calibrate and not args.calibrate_unsafe:
        raise ValueError("--method cascade with --calibrate needs --calibrate-unsafe FILE too")
    needs_references = not args.detector and args.method not in WITHOUT_REFERENCES
    if (args.unsafe is None) != (args.safe is None):
        raise ValueError("--unsafe and --safe belong together: give both files")
    if needs_references and args.unsafe is None and args.model != TESTBED:
        raise ValueError(
            "--unsafe FILE and --safe FILE are needed: a few reference prompts of each kind, in "
            'the style of your traffic (only "--model testbed" brings its own)'
        )


def fit_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that were given, as `Detector.fit` takes them."""
    options = {name: getattr(args, name) for name in FIT_OPTIONS}
    if options["template"] is not None:
        options["template"] = options["template"].replace("\\n", "\n")
    return {name: value for name, value in options.items() if value is not None}


def positive_integer(text: str) -> int:
    """Parses a count of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def fraction(text: str) -> float:
    """Parses a number above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def share(text: str) -> float:
    """Parses a number between 0 and 1, both excluded."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None
