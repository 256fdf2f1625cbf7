"""Results of the public API on tiny models: `python tests/recorded/record.py` writes them anew.

They were recorded before methods and jobs were separated; on one machine every later version gives
them bit by bit.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / name) for name in ("", "finetuning", "detection")]

from builders import make_model, make_tokenizer  # noqa: E402
from test_experts import make_model as make_mixture  # noqa: E402
from tiny_run import make_model as make_adapted  # noqa: E402
from tiny_run import make_trainer  # noqa: E402

from gradsafe import Detector, SafeGradConfig, TraceIndex  # noqa: E402

UNSAFE, SAFE = ["break the lock", "steal the car now"], ["bake a cake", "plant a tree"]
BENIGN = ["what is 2?", "hello there", "name a bird", "sum of three"]
PROMPTS = [f"SECRET number {i} " + "x" * (3 * i % 7) for i in range(9)]
RESPONSES = ["yes", "no way", "sure thing", "maybe", "7", "eight", "n", "ok then", "fine"]
DETECTORS: dict[str, dict[str, Any]] = {
    "gradcoo": {},
    "row": {"granularity": "row"},
    "column_ratio": {"granularity": "column", "relative": "ratio"},
    "both_weighted": {"granularity": "row+column", "reduce": "weighted"},
    "head": {"granularity": "head"},
    "layer_median": {"granularity": "layer", "reduce": "median"},
    "signed": {"unsigned": False},
    "raw": {"normalize": False},
    "before": {"absolute": "before"},
    "center": {"center": True},
    "order": {"reference_order": "norm_then_mean"},
    "rows": {"row_fraction": 0.3, "reference_dtype": "float8"},
    "last": {"layers": 1, "modules": "mlp"},
    "gradsafe": {"method": "gradsafe", "gap": 0.0},
    "nll": {"method": "nll"},
    "gradnorm": {"method": "gradnorm"},
    "window": {"overflow": "window"},
    "cascade": {"method": "cascade"},
    "difference": {"relative": "difference"},
    "log": {"relative": "logratio"},
    "template": {"template": "User: {prompt}\nBot: "},
}
TRAININGS: dict[str, dict[str, Any]] = {
    "default": {},
    "cached": {"reference": "cached"},
    "sft": {"loss": "sft", "scope": "layer"},
    "free": {"projection": False, "kl_tokens": "all", "rho": 0.3},
    "tensor": {"scope": "tensor", "alignment_batch_size": 3, "kl_tokens": "non_pad"},
}


def detection() -> Iterator[tuple[str, Tensor]]:
    tokenizer = make_tokenizer()
    for family, size in (("llama", "max_position_embeddings"), ("gpt2", "n_positions")):
        model = make_model(family, vocab_size=300, **{size: 96}).eval()
        for name, options in DETECTORS.items():
            if family == "gpt2" and name not in ("gradcoo", "head", "gradsafe"):
                continue
            method = options.get("method")
            refs = {} if method in ("nll", "gradnorm") else {"unsafe": UNSAFE, "safe": SAFE}
            detector = Detector.fit(model, tokenizer, **refs, progress=False, **options)
            harmful = {"unsafe_prompts": PROMPTS[4:7]} if method == "cascade" else {}
            detector.calibrate(BENIGN, max_fpr=0.3, progress=False, **harmful)
            prompts = PROMPTS + ["long " * 30] * (name == "window")
            scores = detector.score(prompts, batch_tokens=200, progress=False)
            key = f"detection/{family}/{name}"
            yield f"{key}/values", scores.values
            yield f"{key}/components", scores.components
            yield f"{key}/nll", scores.nll
            yield f"{key}/threshold", torch.tensor(detector.threshold)
            try:
                explanation = detector.explain(prompts[-1])
            except ValueError:
                continue
            yield f"{key}/tokens", explanation.token_evidence
            yield f"{key}/evidence", explanation.component_evidence
    model = make_mixture("mixtral")
    for granularity in ("expert", "tensor", "row"):
        options = {"granularity": granularity, "template": "{prompt}:", "progress": False}
        detector = Detector.fit(model, tokenizer, UNSAFE, SAFE, **options)
        components = detector.score(PROMPTS, progress=False).components
        yield f"detection/mixtral/{granularity}/components", components


def tracing() -> Iterator[tuple[str, Tensor]]:
    model = make_model("llama", vocab_size=300, max_position_embeddings=96).eval()
    tokenizer = make_tokenizer()
    rows = [
        {"prompt": prompt, "response": response, "id": f"id-{i}"}
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]
    queries = [{"prompt": "SECRET number", "response": "maybe not"}, rows[3]]
    for layer in ("last", 2, "auto", 0):
        for norm in ("zscore", "unit", "none"):
            options = {"layer": layer, "part_norm": norm, "append_eos": True}
            index = TraceIndex.build(
                model, tokenizer, rows, shard_samples=4, batch_tokens=100, progress=False, **options
            )
            equal = None if norm == "none" else 0.5  # both parts
            hits = index.query(queries, k=5, gradient_weight=equal)
            key = f"tracing/{layer}/{norm}"
            yield f"{key}/scores", hits.scores
            yield f"{key}/positions", hits.positions
            yield f"{key}/tokens", torch.tensor([value for _, value in hits.tokens(0, 1)])
    long = {"prompt": "w " * 60, "response": "end"}
    index = TraceIndex.build(
        model, tokenizer, [*rows, long], part_norm="zscore", progress=False, overflow="window"
    )
    yield "tracing/windows", index.query({"prompt": "w " * 20, "response": "end"}, k=4).scores


def finetuning() -> Iterator[tuple[str, Tensor]]:
    for name, options in TRAININGS.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            config = SafeGradConfig(**options)
            trainer = make_trainer(folder, make_adapted(), max_steps=3, safegrad=config)
            trainer.train()
            for weight, value in trainer.model.named_parameters():
                if value.requires_grad:
                    yield f"finetuning/{name}/{weight}", value.detach().clone()


def record() -> dict[str, Tensor]:
    """All results by name."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = (detection(), tracing(), finetuning())
            return {name: value.contiguous() for part in parts for name, value in part}
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    results = {name: value.clone() for name, value in record().items()}
    save_file(results, HERE / "results.safetensors")
    print(json.dumps({name: list(value.shape) for name, value in results.items()}, indent=1))
