"""Runs one command. `--help` answers at once: a command is imported when it is run."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gradsafe._io.processes import Processes, Stopped
from gradsafe._version import __version__

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Entry(NamedTuple):
    """One command.

    Attributes:
        module: Module of its job.
        config: Name of the job's configuration there.
        summary: One line for the list of commands.
        several: Whether it runs in several processes.
    """

    module: str
    config: str
    summary: str
    several: bool = False


COMMANDS = {
    "detect": Entry("detect", "Detect", "score prompts: how unsafe is each?", several=True),
    "explain": Entry("explain", "Explain", "show which tokens a score comes from"),
    "calibrate": Entry("calibrate", "Calibrate", "set the threshold of a saved detector"),
    "serve": Entry("serve", "Serve", "serve a calibrated detector over HTTP"),
    "screen": Entry("screen", "Screen", "score training rows before any training", several=True),
    "trace build": Entry("trace", "Build", "compute the signatures of training samples", True),
    "trace query": Entry("trace", "Query", "find the samples that a behavior comes from"),
    "trace repair": Entry("trace", "Repair", "drop the damaged shards of an index"),
    "finetune": Entry("finetune", "Finetune", "fine-tune without losing alignment", several=True),
    "repair": Entry("repair", "Repair", "drop or unlearn traced rows", several=True),
    "audit": Entry("audit", "Audit", "screen, fine-tune, test, trace, repair, report"),
    "doctor": Entry("doctor", "Doctor", "show versions and devices, test the operators"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0, 1 (a self-test failed, every step of a training was skipped, the reader of
        the output is gone, or another process failed), 2 (an error that the user can fix) or 130
        (interrupted).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = next((n for n in COMMANDS if arguments[: n.count(" ") + 1] == n.split()), None)
    processes = Processes.from_environment()
    debug = "--debug" in arguments
    with warnings.catch_warnings(), contextlib.closing(processes):
        try:
            if name is None:
                return _without_command(arguments, processes)
            command, config = _parse(name, arguments[name.count(" ") + 1 :], processes)
            processes.join()
            warnings.showwarning = _warnings_once(processes)
            if processes.count > 1 and not COMMANDS[name].several:
                raise ValueError("this command runs in one process: start it without torchrun")
            try:
                result = config.run(processes)
            except ValueError as error:
                if (text := command.files.located(str(error), begins=True)) == str(error):
                    raise
                raise ValueError(text) from error
            status = 0
            if processes.first:
                from gradsafe._cli import show

                status = show.show(config, result)
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
            return FAILED
        except Exception as error:
            if not processes.claim_last_word():
                processes.linger()
                return FAILED
            advice = _advice(error, name)
            if debug or advice is None:
                raise
            print(f"gradsafe: error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
            return USAGE_ERROR


def load(name: str) -> type:
    """The configuration of a command."""
    entry = COMMANDS[name]
    kind: type = getattr(importlib.import_module(f"gradsafe._jobs.{entry.module}"), entry.config)
    return kind


def _parse(name: str, arguments: Sequence[str], processes: Processes) -> tuple[Any, Any]:
    """Returns the command and its configuration; one of several processes prints the help."""
    from gradsafe._cli.parser import Command

    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            command = Command(name, load(name))
            return command, command.parse(arguments)
    except SystemExit:
        if processes.claim_last_word():
            sys.stdout.write(out.getvalue())
        raise


def _without_command(arguments: list[str], processes: Processes) -> int:
    if "--version" in arguments:
        text = f"gradsafe {__version__}"
    elif not arguments or {"-h", "--help"} & set(arguments) or arguments[0] == "trace":
        chosen = [n for n in COMMANDS if arguments[:1] != ["trace"] or n.startswith("trace")]
        wide = max(map(len, chosen))
        text = "\n".join(
            [
                "usage: gradsafe COMMAND [options]",
                "",
                "Safety tools from the gradients of language models.",
                "",
                *(f"  {n:<{wide}}  {COMMANDS[n].summary}" for n in chosen),
                "",
                "gradsafe COMMAND --help lists its options; --config FILE.yaml reads them.",
            ]
        )
        if arguments and not {"-h", "--help"} & set(arguments):
            raise ValueError(f"choose one of {', '.join(chosen)}")
    else:
        from gradsafe._cli.parser import nearest

        raise ValueError(f"unknown command {arguments[0]!r}, {nearest(arguments[0], [*COMMANDS])}")
    if processes.claim_last_word():
        print(text)
    return 0 if arguments else USAGE_ERROR


def _advice(error: Exception, name: str | None) -> str | None:
    """What to add to the message of an error; None for a bug, which keeps its traceback."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return ""  # their messages say what to do
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"; lower {getattr(load(name or 'detect'), 'MEMORY', '--batch_tokens')}"
    return None


def _warnings_once(processes: Processes) -> Callable[..., None]:
    def show(message: Warning | str, *_: object, **__: object) -> None:
        line = f"gradsafe: warning: {' '.join(str(message).split())}"
        if processes.claim(line):
            print(line, file=sys.stderr)

    return show
