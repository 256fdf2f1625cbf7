"""The options of tracing: importable without torch, complete, checked."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from gradsafe import TraceIndex
from gradsafe.models import Encoding
from gradsafe.tracing import QueryConfig, TraceConfig


def test_the_options_need_no_torch():
    code = "import sys, gradsafe.tracing.config; print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("config", [TraceConfig, QueryConfig])
def test_every_field_is_explained(config):
    explained = re.findall(r"^    (\w+): ", inspect.getdoc(config), re.MULTILINE)
    assert explained[: len(fields(config))] == [field.name for field in fields(config)]


def test_the_options_are_those_of_the_methods():
    given = inspect.signature(TraceIndex.query).parameters
    assert {f.name: f.default for f in fields(QueryConfig)}.items() <= {
        name: parameter.default for name, parameter in given.items()
    }.items()
    assert {field.name for field in fields(Encoding)} < {f.name for f in fields(TraceConfig)}
    assert TraceConfig(system="s", max_length=9).encoding == Encoding(system="s", max_length=9)


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        (TraceConfig, {"layer": "first"}, ValueError, "expected layer to be a whole .* last, auto"),
        (TraceConfig, {"layer": True}, TypeError, "expected layer"),
        (
            TraceConfig,
            {"part_norm": "l2"},
            ValueError,
            "part_norm to be one of none, unit",
        ),
        (TraceConfig, {"shard_samples": 0}, ValueError, "shard_samples to be at least 1, got 0"),
        (TraceConfig, {"shard_samples": 1.5}, TypeError, "shard_samples to be a whole number"),
        (TraceConfig, {"template": 3}, TypeError, "expected template to be text"),
        (TraceConfig, {"append_eos": 1}, TypeError, "append_eos to be true or false, got 1"),
        (
            TraceConfig,
            {"overflow": "cut"},
            ValueError,
            "overflow to be one of error, window",
        ),
        (TraceConfig, {"max_length": 1}, ValueError, "max_length"),
        (QueryConfig, {"k": True}, TypeError, "expected k to be a whole number, got True"),
        (QueryConfig, {"k": 0}, ValueError, "k to be at least 1, got 0"),
        (QueryConfig, {"gradient_weight": "1"}, TypeError, "to be a number or None, got '1'"),
        (QueryConfig, {"gradient_weight": 1.5}, ValueError, "between 0 and 1, got 1.5"),
        (QueryConfig, {"part_norm": "none", "gradient_weight": 0}, ValueError, "needs part_norm"),
        (QueryConfig, {"approximate": "yes"}, TypeError, "approximate to be true or false"),
    ],
)
def test_values_that_do_not_fit_are_refused(config, options, error, message):
    with pytest.raises(error, match=message):
        config(**options)
