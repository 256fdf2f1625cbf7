"""Command-line arguments and YAML files from dataclasses: names, types, defaults and help texts."""

from __future__ import annotations

import difflib
import re
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import ArgumentParser

from gradsafe._checks import in_words

T = TypeVar("T")

LISTED = 10  # names in an error message
DEPTH = 20  # of nested values in a YAML file


class UsageError(ValueError):
    """The arguments do not fit the command."""


class Command:
    """Builds the configuration of one job from arguments and YAML files.

    Args:
        name: As typed, for example "trace build".
        kind: The configuration, a dataclass. A field that is a dataclass is a section with its name
            as prefix, or, if its metadata has `flat`, part of the whole. `POSITIONAL` names the
            field that needs no option name; `SHORT` maps short options to fields.
    """

    def __init__(self, name: str, kind: type) -> None:
        self.name = name
        self.kind = kind
        self.positional: str | None = getattr(kind, "POSITIONAL", None)
        usage = f"gradsafe {name} [options]"
        if self.positional:
            usage += f" {self.positional.upper()}"
        self._parser = ArgumentParser(
            prog=f"gradsafe {name}",
            usage=usage,
            description=(kind.__doc__ or "").split("\n    Attributes:")[0].strip(),
            exit_on_error=False,
            allow_abbrev=False,
        )
        self._parser.add_argument("--config", action="config", help="YAML file with these options")
        self._parser.add_argument(
            "--debug", action="store_true", default=SUPPRESS, help="show tracebacks of errors"
        )
        if self.positional:
            self._parser.add_argument(
                "positional",
                nargs="?",
                default=SUPPRESS,
                metavar=self.positional.upper(),
                help=f"the same as --{self.positional}",
            )
        nested = {item.name for item, inner in _sections(kind)}
        self._parser.add_class_arguments(kind, skip=nested, as_group=False)
        for item, inner in _sections(kind):
            self._parser.add_class_arguments(
                inner, None if item.metadata.get("flat") else item.name
            )
        self._types = dict(_types(kind))
        self.files = _Files([])

    def parse(self, argv: Sequence[str]) -> Any:
        """Returns the configuration.

        Raises:
            UsageError: An argument or a key of a YAML file is unknown, or a value does not fit.
            SystemExit: After `--help` and `--print_config`.
        """
        arguments = self._normalised(argv)
        self.files = files = _Files([Path(path) for path in _values_of("--config", arguments)])
        files.check_keys(self._types)
        try:
            found = self._parser.parse_args(arguments)
        except Exception as error:  # of several kinds, by the version of jsonargparse
            raise UsageError(files.located(self._explained(str(error)))) from None
        if self.positional and "positional" in found:
            found[self.positional] = found.positional
        try:
            return self._build(self.kind, found)
        except (TypeError, ValueError) as error:
            raise UsageError(files.located(str(error))) from error

    def _build(self, kind: type[T], values: Any) -> T:
        sections = {item.name: (item, inner) for item, inner in _sections(kind)}
        given = {}
        for item in fields(kind):  # type: ignore[arg-type]
            if item.name not in sections:
                given[item.name] = values[item.name]
                continue
            flat = sections[item.name][0].metadata.get("flat")
            given[item.name] = self._build(
                sections[item.name][1], values if flat else values[item.name]
            )
        return kind(**given)

    def _normalised(self, argv: Sequence[str]) -> list[str]:
        """Accepts dashes for underscores, `-o` for `--output`, `--flag` and `--no-flag`."""
        short = getattr(self.kind, "SHORT", {})
        result: list[str] = []
        for index, argument in enumerate(argv):
            name, equals, value = argument.partition("=")
            if name in short:
                name = f"--{short[name]}"
            elif name.startswith("--"):
                name = "--" + name[2:].replace("-", "_")
            else:
                result.append(argument)
                continue
            following = argv[index + 1] if index + 1 < len(argv) else ""
            key = name[2:]
            if key.startswith("no_") and self._types.get(key[3:]) is bool and not equals:
                name, equals, value = f"--{key[3:]}", "=", "false"
            elif self._types.get(key) is bool and not equals and following not in ("true", "false"):
                equals, value = "=", "true"
            result.append(name + equals + value)
        return result

    def _explained(self, text: str) -> str:
        """An error of the library in the words of this command line."""
        text = " ".join(text.split())
        if text.startswith("Problems parsing config"):
            return f"--config: not valid YAML: {text.partition(': ')[2]}"
        if match := re.search(r"unrecognized arguments: (\S+)", text):
            given = match[1].partition("=")[0]
            if not given.startswith("-"):
                return f"unexpected argument {given!r}"
            names = [f"--{name}" for name in (*self._types, "config")]
            return f"unknown option {given}, {nearest(given, names)}"
        if match := re.match(r'Parser key "([\w.]+)": (.*)', text):
            kind = self._types.get(match[1])
            got = re.findall(r"(?:Got value|Given value): (.*?)(?= - Expected|$)", match[2])
            if kind is not None and got:
                words, do = in_words(kind), ""
                if words.startswith("a list"):
                    choices = get_args(get_args(kind)[0])
                    do = f": write [{got[-1]}]"
                    if choices and got[-1] not in choices:
                        do = f": the values are {', '.join(choices)}"
                return f"{match[1]} must be {words}, got {got[-1]}{do}"
            return f"{match[1]}: {match[2]}"
        return text


class _Files:
    """The YAML files of a command, with the line of every key."""

    def __init__(self, paths: list[Path]) -> None:
        self._lines: dict[str, str] = {}  # key to file:line
        for path in paths:
            self._lines |= dict(_keys(path))

    def check_keys(self, types: dict[str, Any]) -> None:
        for key, where in self._lines.items():
            section = key.rpartition(".")[0]
            if key in types or isinstance(types.get(section), dict) or types.get(section) is dict:
                continue
            if any(name.startswith(f"{key}.") for name in types):
                continue
            if section and _is_mapping(types.get(section)):
                continue
            names = [
                name.rpartition(".")[2] for name in types if name.rpartition(".")[0] == section
            ]
            if not names:
                raise UsageError(f"{where}: {section} must be {in_words(types[section])}, got keys")
            prefix = f"{section}: " * bool(section)
            unknown = key.rpartition(".")[2]
            raise UsageError(f"{where}: {prefix}unknown key {unknown!r}, {nearest(unknown, names)}")

    def located(self, text: str, *, begins: bool = False) -> str:
        """The error with the place of the key that it names, if a file gives that key.

        Args:
            text: The error.
            begins: Only a key that the error begins with.
        """
        if begins:
            first = re.match(r"[\w.]+", text)
            where = self._lines.get(first[0].rstrip(".")) if first else None
            return f"{where}: {text}" if where else text
        named = [key for key in self._lines if _mentions(text, key)]
        named = named or [k for k in self._lines if _mentions(text, k.rpartition(".")[2])]
        return f"{self._lines[max(named, key=len)]}: {text}" if named else text


def _keys(path: Path) -> Iterator[tuple[str, str]]:
    """Every key of a YAML file, with its sections, and its place."""
    import yaml

    if not path.is_file():
        raise UsageError(f"--config {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        _check_events(path, yaml.parse(text, Loader=yaml.SafeLoader))
        top = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from error
    except yaml.reader.ReaderError as error:
        raise UsageError(
            f"{path}: not valid YAML: {error.reason} at character {error.position}"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    if not isinstance(top, yaml.MappingNode):
        raise UsageError(f"{path}:1: expected keys and values, such as `model: FOLDER`")
    yield from _walk(path, top, "")


def _check_events(path: Path, events: Iterator[Any]) -> None:
    """Refuses what no configuration needs: tags, anchors, and nesting without an end."""
    depth = 0
    for event in events:
        where = f"{path}:{event.start_mark.line + 1}"
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if depth > DEPTH:
            raise UsageError(f"{where}: values are nested more than {DEPTH} times")
        if getattr(event, "anchor", None) is not None:
            raise UsageError(f"{where}: anchors and aliases are not supported: write the value")
        if getattr(event, "tag", None) is not None:
            raise UsageError(f"{where}: the tag {event.tag} is not supported: write a plain value")


def _walk(path: Path, node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key_node.id != "scalar":
            raise UsageError(f"{path}:{line}: expected a name as key")
        if key in seen:
            raise UsageError(f"{path}:{line}: {key!r} is given twice, first in line {seen[key]}")
        seen[key] = line
        yield prefix + key, f"{path}:{line}"
        if hasattr(value_node, "flow_style") and value_node.id == "mapping":
            yield from _walk(path, value_node, f"{prefix}{key}.")


def _sections(kind: type) -> Iterator[tuple[Any, type]]:
    """The fields of a dataclass that are dataclasses themselves, with their types."""
    hints = get_type_hints(kind)
    for item in fields(kind):  # type: ignore[arg-type]
        if is_dataclass(hints[item.name]):
            yield item, hints[item.name]


def _types(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option with its type."""
    hints, sections = get_type_hints(kind), {item.name: item for item, _ in _sections(kind)}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name not in sections:
            yield prefix + item.name, hints[item.name]
        elif item.metadata.get("flat"):
            yield from _types(hints[item.name], prefix)
        else:
            yield from _types(hints[item.name], f"{prefix}{item.name}.")


def _is_mapping(kind: Any) -> bool:
    return getattr(kind, "__origin__", kind) is dict


def _values_of(option: str, arguments: Sequence[str]) -> Iterator[str]:
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option and (equals or index + 1 < len(arguments)):
            yield value if equals else arguments[index + 1]


def nearest(name: str, names: Sequence[str]) -> str:
    """The most similar names, for error messages."""
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]}?"
    if len(names) <= LISTED:
        return f"expected one of {', '.join(sorted(names))}"
    closest = difflib.get_close_matches(name, names, n=LISTED, cutoff=0.0)
    return f"expected one of {len(names)} names, the nearest are {', '.join(sorted(closest))}"


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", text) is not None
