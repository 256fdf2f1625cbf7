"""`gradsafe trace`: index the training samples once, then ask which of them a behavior is from."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gradsafe._cli.files import write_text
from gradsafe._cli.options import add_model_arguments, positive_integer
from gradsafe._cli.processes import load_in_each
from gradsafe._io.records import read_jsonl

if TYPE_CHECKING:
    from gradsafe.tracing import Hits, TraceIndex

RULES = ("last", "auto", "auto-lower", "auto-single")
PART_NORMS = ("none", "unit", "zscore")
SAMPLES = 10  # per query, unless -k says otherwise
TOKEN_RANKS = 3  # how many hits of a page are shown token by token
FIELDS = ("prompt", "response")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the commands and their options."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = commands.add_parser(
        "build",
        help="compute the signatures of the training samples",
        description="Compute the signatures of the training samples. The same command goes on "
        "with a build that was stopped, and torchrun shares it among processes.",
        allow_abbrev=False,
    )
    build.add_argument(
        "examples", metavar="EXAMPLES", help='JSON Lines with "prompt", "response" (and "id")'
    )
    _index_arguments(build)
    build.add_argument(
        "--layer",
        type=layer,
        default="last",
        metavar="L",
        help="last, an index into hidden_states, or a rule: auto (phase transition), auto-lower, "
        "auto-single (default: %(default)s)",
    )
    build.add_argument(
        "--part-norm",
        choices=PART_NORMS,
        help="of queries (default: zscore, or that of the index that is there)",
    )
    build.add_argument(
        "--template",
        metavar="TEXT",
        help=r"prompt template with {prompt}, \n for a line end (default: the tokenizer's)",
    )
    build.add_argument(
        "--shard-samples",
        type=positive_integer,
        metavar="N",
        help="samples per file, and per turn of a process under torchrun (default: 1024, or those "
        "of the index that is there)",
    )
    build.add_argument("--append-eos", action="store_true", help="close responses with EOS")
    build.add_argument(
        "--overflow",
        choices=("error", "window"),
        default="error",
        help="samples beyond the context: an error, or overlapping windows (default: error)",
    )
    build.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                       help="show the traceback of an error")  # fmt: skip
    build.set_defaults(run=run_build, parser=build, in_several_processes=True)

    query = commands.add_parser(
        "query",
        help="find the samples that a behavior comes from",
        description="Find the samples that a behavior comes from.",
        allow_abbrev=False,
    )
    query.add_argument(
        "queries", metavar="QUERIES", help='JSON Lines with "prompt" and the observed "response"'
    )
    _index_arguments(query)
    query.add_argument(
        "-k", type=positive_integer, help=f"samples per query (default: at most {SAMPLES})"
    )
    query.add_argument("--part-norm", choices=PART_NORMS, help="default: the index's own")
    query.add_argument(
        "--gradient-weight", type=float, metavar="W", help="share of the gradient part, 0 to 1"
    )
    query.add_argument(
        "--approximate",
        action="store_true",
        help="search with FAISS (extra faiss), built anew by every call; may miss a sample",
    )
    query.add_argument(
        "--tokens",
        type=positive_integer,
        metavar="N",
        help="show the tokens of the first N samples of each query "
        f"(default: none, with --html {TOKEN_RANKS})",
    )
    query.add_argument("--html", metavar="DIR", help="write one page per query to this folder")
    query.add_argument("--overwrite", action="store_true", help="replace pages that exist")
    query.add_argument("--json", action="store_true", help="one line of JSON per query")
    query.add_argument(
        "--show-text", action="store_true", help="show prompts, responses and token texts"
    )
    query.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                       help="show the traceback of an error")  # fmt: skip
    query.set_defaults(run=run_query, parser=query)

    repair = commands.add_parser(
        "repair",
        help="drop the damaged shards of an index",
        description="Drop the damaged shards of an index, and an extension that stopped before any "
        "of its shards was complete. The same build or extend computes them again.",
        allow_abbrev=False,
    )
    repair.add_argument("index", metavar="DIR", help="folder of the index")
    repair.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                        help="show the traceback of an error")  # fmt: skip
    repair.set_defaults(run=run_repair, parser=repair)


def layer(text: str) -> int | str:
    """Parses a layer: a rule or an index."""
    if text in RULES:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be {', '.join(RULES)} or an integer, got {text}"
        ) from None


def run_build(args: argparse.Namespace) -> int:
    """Runs `trace build`; raises what `cli.main` turns into one line."""
    if not read_jsonl(args.examples, FIELDS):
        raise ValueError(f"{args.examples}: no samples in this file")

    # From here on torch is needed, which takes seconds to import.
    from gradsafe.tracing import TraceIndex
    from gradsafe.tracing.build import check_place

    check_place(Path(args.index), resume=True)
    model, tokenizer = load_in_each(args, args.processes)
    template = args.template and args.template.replace("\\n", "\n")
    try:
        index = TraceIndex.build(
            model,
            tokenizer,
            args.examples,
            args.index,
            layer=args.layer,
            part_norm=args.part_norm,
            batch_tokens=args.batch_tokens,
            progress=_progress(args),
            shard_samples=args.shard_samples,
            processes=args.processes,
            template=template,
            append_eos=args.append_eos,
            overflow=args.overflow,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from there") from None
    if args.processes.first:
        print(f"{len(index)} samples at layer {index.layer} in {args.index}")
    return 0


def run_query(args: argparse.Namespace) -> int:
    """Runs `trace query`; raises what `cli.main` turns into one line."""
    queries = read_jsonl(args.queries, FIELDS)
    if not queries:
        raise ValueError(f"{args.queries}: no queries in this file")
    pages = _pages(args, len(queries))

    from gradsafe._cli.model import load_model
    from gradsafe._cli.trace_html import page
    from gradsafe._cli.trace_text import report
    from gradsafe._cli.trace_view import view
    from gradsafe.tracing import TraceIndex
    from gradsafe.tracing.approximate import load_faiss
    from gradsafe.tracing.folder import IndexFolder
    from gradsafe.tracing.matching import Metric

    # What needs no model is refused before one is loaded.
    folder = IndexFolder.open(Path(args.index))
    Metric(args.part_norm or folder.metadata["part_norm"], args.gradient_weight)
    if args.approximate:
        load_faiss()
    model, tokenizer = load_model(args.model, args.dtype, args.device, not args.no_progress)
    index = TraceIndex.load(args.index, model, tokenizer)
    hits = _search(args, index)
    ranks = min(args.tokens or (TOKEN_RANKS if args.html else 0), hits.scores.shape[1])
    for number, query in enumerate(queries):
        shown = view(index, hits, number, query, ranks, texts=args.show_text, curve=bool(args.html))
        if pages:
            Path(args.html).mkdir(exist_ok=True)
            write_text(str(pages[number]), page(shown))
        if args.json:
            print(json.dumps(shown.to_json(), allow_nan=False), flush=True)
        else:
            print(report(shown), end="\n\n" if number + 1 < len(queries) else "\n", flush=True)
    return 0


def run_repair(args: argparse.Namespace) -> int:
    """Runs `trace repair`; raises what `cli.main` turns into one line."""
    from gradsafe.tracing import TraceIndex

    dropped = TraceIndex.repair(args.index)
    for name in dropped:
        print(f"dropped {name}")
    if not dropped:
        print("nothing to drop")
    return 0


def _search(args: argparse.Namespace, index: TraceIndex) -> Hits:
    return index.query(
        args.queries,
        args.k or min(SAMPLES, len(index)),
        part_norm=args.part_norm,
        gradient_weight=args.gradient_weight,
        approximate=args.approximate,
        batch_tokens=args.batch_tokens,
        progress=_progress(args),
    )


def _pages(args: argparse.Namespace, count: int) -> list[Path]:
    """The pages to write; refuses now what would only fail after the long work."""
    if not args.html:
        if args.overwrite:
            raise ValueError("--overwrite needs --html DIR")
        return []
    folder = Path(args.html)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--html {folder}: it is not a folder")
    if not folder.resolve().parent.is_dir():
        raise FileNotFoundError(f"--html {folder}: no such folder {folder.parent}")
    digits = int(math.log10(max(1, count - 1))) + 1
    pages = [folder / f"query-{number:0{digits}d}.html" for number in range(count)]
    for path in pages:
        if path.exists() and not args.overwrite:
            raise FileExistsError(f"{path} exists: choose --overwrite or another folder")
    return pages


def _index_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--index", required=True, metavar="DIR", help="folder of the index")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _progress(args: argparse.Namespace) -> bool:
    return not args.no_progress and sys.stderr.isatty()
