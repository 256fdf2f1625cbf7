"""Imports point downwards, without cycles, and the parts that must start fast import little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradsafe

ROOT = Path(gradsafe.__file__).parent
LAYERS = [
    {"_version", "_lazy", "_checks", "_fallback"},
    {"_io"},
    {"device_code"},
    {"_backend"},
    {"ops"},
    {"models"},
    {"detection", "tracing", "finetuning"},
    {"screening", "serving"},
    {"doctor_cases"},
    {"doctor"},
    {"_jobs"},
    {"_cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The names that the package itself offers, as in `from gradsafe import Detector`.
FACE = {"Detector": "detection", "GradientSurgery": "finetuning", "TraceIndex": "tracing"}


def modules() -> dict[str, Path]:
    """Dotted name below the package to file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # the package itself is only a list of names
            found[name] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Dotted names below the package that a file imports anywhere, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "gradsafe":
                yield from (FACE.get(alias.name, alias.name) for alias in node.names)
            elif node.module.startswith("gradsafe."):
                base = node.module.removeprefix("gradsafe.")
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield inner if inner in modules() else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("gradsafe."):
                    yield alias.name.removeprefix("gradsafe.")


def graph() -> dict[str, set[str]]:
    known = modules()
    edges = {name: {t for t in imported(path) if t in known} for name, path in known.items()}
    # A lazy package imports nothing by itself.
    return {
        name: targets - {name}
        for name, targets in edges.items()
        if known[name].name != "__init__.py" or "lazy_names" not in known[name].read_text()
    }


def test_every_module_has_a_layer() -> None:
    assert {name.partition(".")[0] for name in modules()} <= LEVEL.keys() | {"_C"}


def test_no_import_points_upwards() -> None:
    wrong = []
    for name, targets in graph().items():
        top = name.partition(".")[0]
        for target in targets:
            other = target.partition(".")[0]
            if other != top and LEVEL[other] >= LEVEL[top]:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_no_cycles() -> None:
    edges = graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize(
    "module",
    [
        *("detection.config", "tracing.config", "finetuning.config", "serving.config"),
        *("screening.config", "_jobs.screen"),
        *("_jobs.detect", "_jobs.repair", "_jobs.serve", "_jobs.calibrate"),
    ],
)
def test_configurations_need_no_torch(module: str) -> None:
    code = f"import sys, gradsafe.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
