"""The YAML file of `gradsafe finetune`: every key checked, errors with file and line."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

FILES = ("model", "train", "alignment", "output")
LORA = {"r": int, "alpha": int, "dropout": float, "targets": list[str]}
LORA_DEFAULTS = {"r": 8, "alpha": 16, "dropout": 0.1, "targets": ["q_proj", "k_proj", "v_proj"]}
TRAINING_DEFAULTS = {
    "per_device_train_batch_size": 10,
    "learning_rate": 1e-5,
    "num_train_epochs": 10.0,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}
SET_ELSEWHERE = {
    "output_dir": "the key `output`",
    "resume_from_checkpoint": "--resume",
    "disable_tqdm": "--no-progress",
    "use_cpu": "the key `device`",
}
_LISTED = 10  # names in an error message


@dataclass
class Section:
    """A mapping of the file that knows its lines.

    Attributes:
        path: The file.
        name: Where it is in the file: "" for the whole, else "lora: " and the like.
        values: Key to plain value.
        lines: Key to line, from 1.
        line: Of the section itself.
    """

    path: str
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    line: int = 1

    def error(self, text: str, key: str | None = None) -> ValueError:
        """An error at a key, or at the section."""
        line = self.line if key is None else self.lines.get(key, self.line)
        return ValueError(f"{self.path}:{line}: {self.name}{text}")

    def check_keys(self, allowed: Iterable[str]) -> None:
        """Refuses other keys, with the most similar one that exists, or ten at most."""
        known = set(allowed)
        names = sorted(known - set(SET_ELSEWHERE))  # those are refused by themselves
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else _choice_of(key, names)
                raise self.error(f"unknown key {key!r}, {hint}", key)

    def renamed(self, rename: Callable[[str], str]) -> Section:
        """The section with other names for its keys, which keep their lines."""
        names = {key: rename(key) for key in self.values}
        for key, name in names.items():
            if key != name and name in self.values:
                raise self.error(f"{key!r} is the same as {name!r}, leave one of them out", key)
        values = {names[key]: value for key, value in self.values.items()}
        lines = {names[key]: line for key, line in self.lines.items()}
        return replace(self, values=values, lines=lines)

    def check_types(self, hints: Mapping[str, Any]) -> None:
        """Refuses values of another type than the hint says, where it says something simple."""
        for key, value in self.values.items():
            if not _fits(value, hints[key]):
                raise self.error(f"{key} must be {_words(hints[key])}, got {value!r}", key)

    def blame(self, error: Exception) -> ValueError:
        """The error of whoever took the values, at the line of the key that it names."""
        text = " ".join(str(error).split())
        named = [key for key in self.values if _mentions(text, key)]
        named = named or [key for key, value in self.values.items() if _mentions(text, value)]
        return self.error(text, max(named, key=len, default=None))


@dataclass(frozen=True)
class Settings:
    """What the file says; the sections hold only what it gives."""

    model: str
    train: str
    alignment: str
    output: str
    dtype: str
    device: str
    lora: Section | None
    safegrad: Section
    training: Section


def read_settings(path: str) -> Settings:
    """Reads and checks the file, except for what only the training itself can check.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is not YAML, a key is unknown or missing, or a value has another type.
    """
    top = _read(path)
    top.check_keys([*FILES, "dtype", "device", "lora", "safegrad", "training"])
    for key in FILES:
        if key not in top.values:
            raise top.error(f"the key {key!r} is missing")
    text = dict.fromkeys(FILES, str)
    sections = ("lora", "safegrad", "training")
    top.check_types(
        {
            **text,
            "dtype": Literal["float32", "bfloat16", "float16"],
            "device": Literal["auto", "cpu", "cuda"],
            **dict.fromkeys(sections, Any),
        }
    )
    parts = {name: _section(top, name) for name in sections}
    lora = parts["lora"]
    if lora is not None:
        lora.check_keys(LORA)
        lora.check_types(LORA)
    safegrad, training = parts["safegrad"], parts["training"]
    assert safegrad is not None
    assert training is not None
    of_start = safegrad.values.get("reference", "adapter_off") in ("adapter_off", "cached")
    if lora is None and of_start and safegrad.values.get("loss", "kl") == "kl":
        raise top.error(
            "lora: false needs reference: a model folder (the start model itself), or loss: sft, "
            "in the section safegrad",
            "lora",
        )
    for key, place in SET_ELSEWHERE.items():
        if key in training.values:
            raise training.error(f"{key} is set by {place}, leave it out here", key)
    values = {key: top.values[key] for key in FILES}
    dtype, device = top.values.get("dtype", "float32"), top.values.get("device", "auto")
    return Settings(**values, dtype=dtype, device=device, lora=lora, safegrad=safegrad,
                    training=training)  # fmt: skip


def _read(path: str) -> Section:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-5 as a number, as YAML 1.2 does."""

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        loader = Loader(Path(path).read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}:1: expected keys and values, such as `model: DIR`")
        top = Section(path, "")
        _fill(top, node, loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"{path}: not valid YAML: {error.reason} at character {error.position}"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    return top


def _fill(section: Section, node: Any, loader: Any) -> None:
    import yaml

    section.line = node.start_mark.line + 1
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        line = key_node.start_mark.line + 1
        if key in section.values:
            first = section.lines[key]
            raise ValueError(f"{section.path}:{line}: {section.name}{key!r} is given twice, first "
                             f"in line {first}")  # fmt: skip
        section.lines[key] = line
        if isinstance(value_node, yaml.MappingNode) and not section.name:
            inner = Section(section.path, f"{key}: ")
            _fill(inner, value_node, loader)
            inner.line = line
            section.values[key] = inner
        else:
            section.values[key] = loader.construct_object(value_node, deep=True)


def _section(top: Section, name: str) -> Section | None:
    value = top.values.get(name)
    if name == "lora" and value is False:
        return None
    if value is None:
        return Section(top.path, f"{name}: ", line=top.lines.get(name, 1))
    if not isinstance(value, Section):
        raise top.error(f"{name} must be a section of keys and values", name)
    return value


def _choice_of(key: str, names: list[str]) -> str:
    if len(names) <= _LISTED:
        return f"expected one of {names}"
    near = difflib.get_close_matches(key, names, n=_LISTED, cutoff=0.0)
    return f"expected one of {len(names)} names, the nearest are {sorted(near)}"


def _mentions(text: str, thing: Any) -> bool:
    return re.search(rf"(?<!\w){re.escape(str(thing))}(?!\w)", text) is not None


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if hint is type(None):
        return value is None
    return True


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is list:
        return f"a list of {_words(get_args(hint)[0])}"
    options = [option for option in get_args(hint) if option is not type(None)]
    return " or ".join(map(_words, options)) or str(hint)
