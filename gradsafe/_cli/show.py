"""Prints the results of jobs, and writes their pages."""

from __future__ import annotations

import json
import sys
from functools import singledispatch
from pathlib import Path
from typing import Any

from gradsafe._cli.render import tables
from gradsafe._io.artifacts import write_text
from gradsafe._jobs.audit import Audit, AuditResult
from gradsafe._jobs.calibrate import Calibrate
from gradsafe._jobs.detect import Detect, DetectResult
from gradsafe._jobs.doctor import Doctor
from gradsafe._jobs.explain import Explain, ExplainResult
from gradsafe._jobs.finetune import Finetune, FinetuneResult
from gradsafe._jobs.repair import Repair, RepairResult
from gradsafe._jobs.screen import Screen
from gradsafe._jobs.screen_files import REPORT, ScreenResult
from gradsafe._jobs.serve import Serve
from gradsafe._jobs.trace import Build, Query, QueryResult
from gradsafe._jobs.trace import Repair as RepairIndex

COMPONENTS = 8  # of an explanation on the terminal


@singledispatch
def show(config: Any, result: Any) -> int:
    """Prints the result of a job.

    Args:
        config: The job.
        result: What its `run` returned.

    Returns:
        Exit status.
    """
    raise TypeError(type(config).__name__)


@show.register
def _(config: Detect, result: DetectResult) -> int:
    print(tables.detection(result), file=sys.stdout if config.output else sys.stderr)
    return 0


@show.register
def _(config: Explain, result: ExplainResult) -> int:
    from gradsafe._cli.render import explain

    if config.html:
        write_text(config.html, explain.page(result))
    if config.json:
        print(json.dumps(result.explanation.to_json(), allow_nan=False))
    else:
        explain.write(result, COMPONENTS)
    return 0


@show.register
def _(config: Calibrate, result: Any) -> int:
    print(f"{result}; saved in {config.detector}")
    return 0


@show.register
def _(config: Screen, result: ScreenResult) -> int:
    from gradsafe._cli.render import screen

    write_text(result.folder / REPORT, screen.page(config, result))
    print(screen.text(result))
    return 0


@show.register
def _(config: Serve, result: None) -> int:
    return 0


@show.register
def _(config: Build, result: Any) -> int:
    print(f"{len(result)} samples at layer {result.layer} in {config.index}")
    return 0


@show.register
def _(config: Query, result: QueryResult) -> int:
    from gradsafe._cli.render import trace

    for number in range(len(result.queries)):
        view = trace.view(result, number, texts=config.show_text, curve=bool(config.html))
        if config.html:
            write_text(result.pages[number], trace.page(view))
        if config.json:
            print(json.dumps(trace.without_none(view), allow_nan=False), flush=True)
        else:
            last = number + 1 == len(result.queries)
            print(trace.text(view), end="\n" if last else "\n\n", flush=True)
    return 0


@show.register
def _(config: RepairIndex, result: list) -> int:  # type: ignore[type-arg]
    print("\n".join(f"dropped {name}" for name in result) or "nothing to drop")
    return 0


@show.register
def _(config: Finetune, result: FinetuneResult) -> int:
    print(_training(result))
    return 0 if result.trained else 1


@show.register
def _(config: Repair, result: RepairResult) -> int:
    print(f"{config.how}: {len(result.dropped)} of {result.rows} rows")
    print(tables.repair(result))
    print(_training(result.training))
    return 0 if result.training.trained else 1


@show.register
def _(config: Audit, result: AuditResult) -> int:
    from gradsafe._cli.render import audit

    write_text(Path(result.output) / "report.html", audit.page(result))
    print(audit.text(result))
    print(f"report.json and report.html are in {result.output}")
    return 0 if result.verdict.passed else 1


@show.register
def _(config: Doctor, result: int) -> int:
    return result


def _training(result: FinetuneResult) -> str:
    parts = [f"{result.steps} steps"]
    if cosines := result.cosines:
        parts.append(f"mean logged cosine {sum(cosines) / len(cosines):+.3f}")
        parts.append(f"last {cosines[-1]:+.3f}")
        if result.last_loss is not None:
            parts.append(f"{result.loss} {result.last_loss:.4f}")
    parts.append(f"{result.skipped} skipped")
    return f"{', '.join(parts)}; written to {result.output}"
