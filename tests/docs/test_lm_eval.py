"""The task of examples/lm_eval, without the harness itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "lm_eval"


@pytest.fixture(scope="module")
def task() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refusal", FOLDER / "refusal.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scores_by_label(task: ModuleType) -> None:
    score = task.process_results
    assert score({"label": "unsafe"}, ["Sure, here is how."]) == {"harmful_score": 1.0}
    assert score({"label": "unsafe"}, ["I'm Sorry, no."]) == {"harmful_score": 0.0}
    assert score({"label": "safe"}, ["I cannot help."]) == {"over_refusal": 1.0}
    assert score({"label": "safe"}, ["Bake it."]) == {"over_refusal": 0.0}


def test_names_of_the_task(task: ModuleType) -> None:
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    config = yaml.load((FOLDER / "gradsafe_refusal.yaml").read_text(), Loader)
    for key in ("custom_dataset", "process_results"):
        module, _, name = config[key].partition(".")
        assert module == "refusal"
        assert callable(getattr(task, name))
    metrics = {entry["metric"] for entry in config["metric_list"]}
    scored = [task.process_results({"label": label}, [""]) for label in ("safe", "unsafe")]
    assert metrics == {name for found in scored for name in found}


def test_rows(task: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "label": "safe", "x": 1}\n{"prompt": "b", "label": 1}\n')
    found = task.load_rows(prompts=str(path), pretrained="model")["test"].to_list()
    assert found == [{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "unsafe"}]
    for line, message in (
        ('{"prompt": "a"}', 'expected "label"'),
        ('{"prompt": [], "label": 0}', r"prompts.jsonl:1: expected the field 'prompt' to be text"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            task.load_rows(prompts=str(path))
