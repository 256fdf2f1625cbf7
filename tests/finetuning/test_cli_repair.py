from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_inputs import write_inputs
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from gradsafe._cli import main
from gradsafe._jobs.finetune import encoding_of
from gradsafe.finetuning import SafeGradConfig
from gradsafe.models import Encoding

Repair = Callable[..., tuple[int, str, str]]
SETTINGS: dict[str, Any] = {
    "model": "model",
    "adapter": "tuned",
    "rows": "rows.jsonl",
    "drop": "hits.jsonl",
    "retain": "refusals.jsonl",
    "output": "repaired",
    "device": "cpu",
    "training": {"per_device_train_batch_size": 2, "max_steps": 3, "save_steps": 2,
                 "save_strategy": "steps", "learning_rate": 0.01, "logging_steps": 1},
}  # fmt: skip
BAD = (1, 4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an adapter tuned on rows of which two are bad, and the hits of a query."""
    folder = tmp_path_factory.mktemp("repair")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_inputs(6)
        rows = [
            {
                "prompt": f"task {i}",
                "response": "zap zap" if i in BAD else f"Yes {i}",
                "id": f"r{i}",
            }
            for i in range(6)
        ]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = [{"rank": 1, "id": "r4", "score": 0.9}, {"rank": 2, "id": "r1", "score": 0.8}]
        lines = [{"query": 0, "found": [*found, {"rank": 3, "id": "r0", "score": 0.1}]}]
        Path("hits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        Path("probes.txt").write_text("task 1\ntask 4\ntask 9\n")
        training = {"max_steps": 40, "learning_rate": 0.02}
        options = {"train": "rows.jsonl", "alignment": "refusals.jsonl", "output": "tuned"}
        settings = {"model": "model", "device": "cpu", "training": training, **options}
        Path("tune.yaml").write_text(yaml.safe_dump({**settings, "safegrad": {"rho": 0.0}}))
        assert main(["finetune", "--config", "tune.yaml", "--no-progress"]) == 0
    return folder


@pytest.fixture
def repair(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Repair:
    """Writes the settings, changed as told, and runs the command on them."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def call(*options: str, **changes: Any) -> tuple[int, str, str]:
        settings = {k: v for k, v in {**SETTINGS, **changes}.items() if v is not None}
        Path("run.yaml").write_text(yaml.safe_dump(settings))
        capsys.readouterr()
        status = main(["repair", "--config", "run.yaml", "--no-progress", *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def report() -> dict[str, Any]:
    return json.loads(Path("repaired/repair.json").read_text())  # type: ignore[no-any-return]


def adapter(folder: str = "repaired") -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/adapter_model.safetensors")


def test_retraining_is_finetuning_without_the_rows(repair: Repair) -> None:
    status, out, err = repair(hits=2)
    assert status == 0, err
    assert "retrain: 2 of 6 rows" in out
    assert "3 steps, mean logged cosine" in out
    found = report()
    assert (found["dropped"], found["rows"]) == (["r1", "r4"], 6)
    assert found["before"]["forgotten"] < found["after"]["forgotten"]
    assert found["before"]["rate"] is None
    rows = Path("rows.jsonl").read_text().splitlines(keepends=True)
    Path("kept.jsonl").write_text("".join(row for i, row in enumerate(rows) if i not in BAD))
    given = {"model": "model", "device": "cpu", "training": SETTINGS["training"]}
    given |= {"train": "kept.jsonl", "alignment": "refusals.jsonl", "output": "again"}
    Path("again.yaml").write_text(yaml.safe_dump(given))
    assert main(["finetune", "--config", "again.yaml", "--no-progress"]) == 0
    assert all(torch.equal(value, adapter("again")[name]) for name, value in adapter().items())


@pytest.mark.parametrize("how", ["npo", "graddiff"])
def test_unlearning_continues_the_adapter_and_resumes(repair: Repair, how: str) -> None:
    probe = {"probe": "probes.txt", "phrases": ["ZAP"], "probe_tokens": 8}
    status, out, err = repair("--drop", "r1, r4", how=how, **probe)
    assert status == 0, err
    assert "probes with a phrase" in out
    found = report()
    assert found["dropped"] == ["r1", "r4"]
    assert found["after"]["forgotten"] > found["before"]["forgotten"] + 0.1
    assert found["after"]["retained"] < found["before"]["retained"] + 0.1
    assert found["before"]["rate"] > 0
    assert adapter().keys() == adapter("tuned").keys()
    whole = adapter()

    Path("repaired").rename("whole")
    training = {**SETTINGS["training"], "max_steps": 2}
    assert repair("--drop", "r1,r4", how=how, training=training, **probe)[0] == 0
    status, _, err = repair("--resume", "--drop", "r1,r4", how=how, **probe)
    assert status == 0, err
    assert all(torch.equal(value, whole[name]) for name, value in adapter().items())
    assert report()["after"] == found["after"]


def test_drops_what_a_query_printed(repair: Repair, capsys: pytest.CaptureFixture[str]) -> None:
    Path("asked.jsonl").write_text(json.dumps({"prompt": "task 9", "response": "zap"}) + "\n")
    model = ["--model", "model", "--adapter", "tuned", "--device", "cpu", "--no-progress"]
    assert main(["trace", "build", "rows.jsonl", *model, "--index", "index"]) == 0
    capsys.readouterr()
    query = ["trace", "query", "asked.jsonl", *model, "--index", "index", "-k", "3", "--json"]
    assert main(query) == 0
    printed = capsys.readouterr().out
    Path("found.jsonl").write_text(printed)
    ids = [entry["id"] for entry in json.loads(printed)["found"]]
    for hits in (None, 2):
        status, _, err = repair(drop="found.jsonl", hits=hits, output=f"without-{hits}")
        assert status == 0, err
        dropped = json.loads(Path(f"without-{hits}/repair.json").read_text())["dropped"]
        assert dropped == sorted(ids[:hits])


def test_unlearns_all_weights_against_the_model_itself(repair: Repair) -> None:
    status, _, err = repair(how="npo", full=True, adapter=None, model="model")
    assert status == 0, err
    start, after = (LlamaForCausalLM.from_pretrained(f).state_dict() for f in ("model", "repaired"))
    assert not torch.equal(start["model.norm.weight"], after["model.norm.weight"])


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rows": None}, "--rows is missing"),
            ({"drop": "r1,r9,77"}, "--drop: rows.jsonl has no row with the id 'r9', '77'"),
            ({"drop": "r0,r1,r2,r3,r4,r5"}, "all 6 rows of rows.jsonl would be dropped"),
            ({"drop": ",".join(map(str, range(3000)))}, "'4' and 2995 more"),
            ({"drop": " , "}, "no ids"),
            ({"drop": "gone.jsonl"}, "--drop: no such file: gone.jsonl"),
            ({"drop": "refusals.jsonl"}, "refusals.jsonl:1: expected a row with 'id', or hits as"),
            ({"hits": 0}, "--hits must be at least 1, got 0"),
            (
                {"retain": "rows.jsonl"},
                "rows.jsonl:1 is to be dropped, and rows.jsonl:1 is the",
            ),
            (
                {"rows": "twice.jsonl"},
                "twice.jsonl:2: the id 'r0' belongs to twice",
            ),
            ({"adapter": None}, "--how retrain begins with the model before fine-tuning"),
            ({"how": "npo", "start": "model"}, "--start is for --how retrain: npo goes on from"),
            ({"how": "npo", "beta": 0.0}, "UnlearningConfig: expected beta above 0, got 0.0"),
            ({"how": "npo", "full": True}, "--full trains no adapters: merge --adapter into the"),
            ({"how": "forget"}, "how must be one of retrain, npo, graddiff"),
            ({"probe": "probes.txt"}, "--probe and --phrases belong together"),
            ({"output": "model"}, "model is not empty: choose --resume or another output"),
        ],
    )
    def test_in_one_line(self, repair: Repair, changes: dict[str, Any], message: str) -> None:
        row = json.dumps({"prompt": "a", "response": "b", "id": "r0"})
        Path("twice.jsonl").write_text(f"{row}\n{row}\n")
        status, out, err = repair(**changes)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("gradsafe: error:") == 1

    def test_another_run_is_not_resumed(self, repair: Repair) -> None:
        assert repair(how="npo")[0] == 0
        for changes in ({"beta": 0.2}, {"how": "graddiff"}):
            training = {**SETTINGS["training"], "max_steps": 9}
            given = {"how": "npo", "training": training, **changes}
            status, _, err = repair("--resume", **given)
            assert status == 2
            assert "cannot resume" in err


def test_models_are_asked_with_the_template_of_the_training() -> None:
    typed = SafeGradConfig(template="Q: {prompt}\\nA:", append_eos=False)
    expected = Encoding(template="Q: {prompt}\nA:", append_eos=False)
    assert encoding_of(typed) == expected
