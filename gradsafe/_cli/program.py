"""The command line. Commands import what they need when they run, so `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from gradsafe._cli import detect, explain, finetune, options, trace
from gradsafe._io.processes import Processes, Stopped
from gradsafe._version import __version__

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0, 1 (a self-test failed, or the reader of the output went away, or another
        process failed), 2 (an error that the user can fix) or 130 (interrupted).
    """
    processes = Processes.from_environment()
    args = _arguments(argv, processes)
    debug = getattr(args, "debug", False)
    with warnings.catch_warnings(), contextlib.closing(processes):
        try:
            processes.join()
            warnings.showwarning = _warnings_once(processes)
            if processes.count > 1 and not args.in_several_processes:
                raise ValueError("this command runs in one process: start it without torchrun")
            args.processes = processes
            status: int = args.run(args)
            sys.stdout.flush()
            return status
        except Stopped:
            processes.linger()
            return FAILED
        except KeyboardInterrupt as error:
            if not processes.claim_last_word():
                return INTERRUPTED
            if debug:
                raise
            hint = f": {error}" if str(error) else ""
            print(f"\ngradsafe: interrupted{hint}", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # The reader is gone (`| head`); Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if not processes.claim_last_word():
                processes.linger()
                return FAILED
            advice = _advice(error, args)
            if debug or advice is None:
                raise
            print(f"gradsafe: error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
            return USAGE_ERROR


def _advice(error: Exception, args: argparse.Namespace) -> str | None:
    """What to add where one line says enough; None for a bug, which keeps its traceback."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return ""  # their messages name the fix
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"; lower {getattr(args, 'memory_option', '--batch-tokens')}"
    return None


def _warnings_once(processes: Processes) -> Callable[..., None]:
    def show(message: Warning | str, *_: object, **__: object) -> None:
        line = f"gradsafe: warning: {' '.join(str(message).split())}"
        if processes.claim(line):
            print(line, file=sys.stderr)

    return show


def _arguments(argv: Sequence[str] | None, processes: Processes) -> argparse.Namespace:
    """Parses; of several processes only one prints the help or what is wrong."""
    if processes.count == 1:
        return _parse(argv)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return _parse(argv)
    except SystemExit as stop:
        if processes.claim_last_word():
            sys.stdout.write(out.getvalue())
            sys.stderr.write(err.getvalue())
        elif stop.code:
            processes.linger()
        raise


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:  # argparse itself would show the usage of the program, not of the command
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of an error",
    )
    parser = argparse.ArgumentParser(
        prog="gradsafe",
        description="Safety tools from the gradients of language models.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"gradsafe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary, add_arguments, run in (
        ("detect", "score prompts: how unsafe is each?", options.add_arguments, detect.run),
        (
            "explain",
            "show which tokens and components a score comes from",
            explain.add_arguments,
            explain.run,
        ),
        (
            "trace",
            "find the training samples that a behavior comes from",
            trace.add_arguments,
            None,
        ),
        (
            "finetune",
            "fine-tune on untrusted data without losing alignment",
            finetune.add_arguments,
            finetune.run,
        ),
        ("doctor", "show versions and devices, test the operators", _doctor_arguments, _doctor),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=_sentence(summary),
            parents=[common],
            allow_abbrev=False,
        )
        if run is not None:  # else the command has commands of its own
            command.set_defaults(run=run, parser=command)
        add_arguments(command)
        command.set_defaults(in_several_processes=name in ("detect", "finetune"))
    return parser


def _sentence(summary: str) -> str:
    return summary[0].upper() + summary[1:] + ("" if summary.endswith("?") else ".")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable report")


def _doctor(args: argparse.Namespace) -> int:
    from gradsafe import doctor

    return doctor.run(as_json=args.json)
