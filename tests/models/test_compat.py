"""Every difference between library versions is met by feature, whichever version is installed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import make_model
from torch import nn

import gradsafe
from gradsafe.models import compat


class OldOutput:
    past_key_values = "kept"


class NewOutput:
    cache = "kept"

    @property
    def past_key_values(self) -> str:
        raise AssertionError("asked for a deprecated name")


def test_the_cache_has_two_names() -> None:
    assert compat.cache_argument({"input_ids", "cache", "past_key_values"}) == "cache"
    assert compat.cache_argument({"input_ids", "past_key_values"}) == "past_key_values"
    assert compat.cache_argument({"input_ids", "cache_params"}) is None
    assert compat.returned_cache(OldOutput()) == "kept"
    assert compat.returned_cache(NewOutput()) == "kept"
    assert compat.returned_cache(("logits",)) is None


def test_an_output_without_a_cache_is_not_asked_for_its_old_name() -> None:
    output = NewOutput()
    output.cache = None  # type: ignore[assignment]
    assert compat.returned_cache(output) is None


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_the_checkpointing_flag_has_two_names(name: str) -> None:
    module = nn.Identity()
    assert compat.checkpointing_flag(module) is None
    for value in (False, True):
        setattr(module, name, value)
        assert compat.checkpointing_flag(module) is value


@pytest.mark.filterwarnings("error")
def test_checkpointing_is_switched_on_without_a_warning() -> None:
    model = make_model("llama")
    blocks = model.model.layers
    assert {compat.checkpointing_flag(block) for block in blocks} == {False}
    compat.enable_checkpointing(model, use_reentrant=False)
    assert {compat.checkpointing_flag(block) for block in blocks} == {True}


@pytest.mark.parametrize(
    "method", ["activation_checkpointing_enable", "gradient_checkpointing_enable"]
)
def test_checkpointing_methods_get_their_options(method: str) -> None:
    calls: list[object] = []
    compat.enable_checkpointing(SimpleNamespace(**{method: calls.append}), use_reentrant=True)
    compat.enable_checkpointing(SimpleNamespace(**{method: calls.append}))
    assert calls == [{"use_reentrant": True}, None]


def test_training_options_take_the_name_that_is_installed() -> None:
    old = {"gradient_checkpointing", "seed"}
    for accepted in (old, {*old, "activation_checkpointing"}):
        names = {
            compat.training_option(f"{kind}_checkpointing", accepted)
            for kind in ("activation", "gradient")
        }
        assert len(names) == 1
        assert ("activation_checkpointing" in names) == ("activation_checkpointing" in accepted)
    assert compat.training_option("seed", old) == "seed"
    assert compat.training_option("no_such_option", old) == "no_such_option"


def test_no_other_file_compares_versions_or_names_what_was_renamed() -> None:
    root = Path(gradsafe.__file__).parent
    files = [path for path in root.rglob("*.py") if path.name != "compat.py"]
    assert len(files) > 50
    pattern = re.compile(
        r"past_key_values|torch_dtype=|Version\(|gradient_checkpointing|infeatures"
    )
    found = [path.name for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []
