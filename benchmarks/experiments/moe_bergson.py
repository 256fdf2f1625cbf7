"""Compares scoring of fused experts with bergson, which stores per-example gradients of experts.

    python -m benchmarks.experiments.moe_bergson      CSV in benchmarks/results

Needs `pip install bergson`. Both score the experts of the first block of a random Qwen3-MoE, on one
batch, with copies of one model and the same two references. The second block is dense, so that
every token has a gradient. Gradients from bergson are scored in its hook in a few eager passes and
then released. "passes" is the forward and backward pass alone, "gradients" is bergson without
scoring.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.detection_models import TEMPLATE, make_tokenizer
from benchmarks.table import write_csv
from benchmarks.timing import compare
from gradsafe import Detector
from gradsafe.models import capture, collate, encode, response_nll

RESULT = Path(__file__).resolve().parents[1] / "results" / "moe_bergson_cpu.csv"
CASE = "Qwen3-MoE block: E 32, top 4, H 1024, I 384; 4 prompts of 64 tokens, fp32"
MODULE, WEIGHTS = "model.layers.0.mlp.experts", ("gate_up_proj", "down_proj")
CONFIG = Qwen3MoeConfig(
    vocab_size=512, hidden_size=1024, moe_intermediate_size=384, num_experts=32,
    num_experts_per_tok=4, num_hidden_layers=2, mlp_only_layers=[1], intermediate_size=384,
    num_attention_heads=16, num_key_value_heads=4, head_dim=64,
)  # fmt: skip
OPTIONS: dict[str, Any] = {
    "response": "w2", "template": TEMPLATE, "layers": (0,), "modules": "mlp",
    "reference_dtype": "float32", "progress": False,
}  # fmt: skip
TOLERANCE = 1e-3


def bergson_collector(model: Any, refs: dict[str, Tensor]) -> Any:
    """Its collector for the experts of `MODULE`, whose `rows[weight]` are `[B, 4]` per expert."""
    from bergson import expand_moe
    from bergson.collector.collector import HookCollectorBase

    class Collector(HookCollectorBase):  # type: ignore[misc, unused-ignore]
        def setup(self) -> None:
            self.rows: dict[str, list[Tensor]] = defaultdict(list)
            self.stage: Literal["passes", "gradients", "scores"] = "scores"

        def teardown(self) -> None: ...

        def process_batch(self, indices: list[int], **kwargs: Any) -> None: ...

        def backward_hook(self, module: Any, g: Tensor) -> None:
            if self.stage == "passes":
                return
            grad = self._compute_gradient(module, g)  # [B, O * I]
            if self.stage == "scores":
                moments = [grad.sum(1), torch.linalg.vector_norm(grad, dim=1).square()]
                dots = grad.abs_() @ refs[module.weight_name][module.expert_idx].T
                self.rows[module.weight_name].append(torch.stack([*moments, *dots.T], 1))

    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # as bergson's worker does
    return Collector(model=model, target_modules=set(expand_moe(model, MODULE)))


def main() -> int:
    """Checks that both sides find the same products, times them in turns, writes the row."""
    try:
        from bergson import IndexConfig
        from bergson.collector.collector import fwd_bwd_factory
    except ImportError as error:
        print(f"skipped: bergson cannot be imported ({error}); pip install bergson")
        return 0
    warnings.simplefilter("ignore")  # a random model does not refuse: fit warns
    torch.manual_seed(0)
    model, tokenizer = Qwen3MoeForCausalLM(CONFIG).eval(), make_tokenizer()
    texts = [" ".join(f"w{i}" for i in row) for row in torch.randint(2, 512, (8, 64)).tolist()]
    prompts, groups = texts[:4], (texts[4:6], texts[6:])
    detector = Detector.fit(model, tokenizer, *groups, **OPTIONS)
    method: Any = detector.method
    refs = {
        name: torch.stack([r.weights[f"{MODULE}.{name}"] for r in (method.unsafe, method.safe)], 1)
        for name in WEIGHTS
    }  # [E, 2, O, I]
    collector = bergson_collector(
        copy.deepcopy(model), {name: stack.flatten(2) for name, stack in refs.items()}
    )
    forward_backward = fwd_bwd_factory(IndexConfig(run_path="unused"))
    ids = torch.tensor([tokenizer(f"{prompt} w2").input_ids for prompt in prompts])
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]

    def bergson(stage: str) -> None:
        collector.stage = stage
        collector.rows.clear()
        with collector.with_batch(torch.ones_like(ids, dtype=torch.bool)):
            forward_backward(collector.model, ids, labels, {})

    def passes() -> None:
        items = [encode(tokenizer, prompt, "w2", template=TEMPLATE) for prompt in prompts]
        with capture(model, detector.layers, lambda *_: None):
            response_nll(model, collate(items, 0)).sum().backward()

    bergson("scores")
    # Components are <n(G), n(R)> / n with the unsafe reference here, shares in `detector`.
    unsafe = Detector.fit(model, tokenizer, *groups, relative="unsafe", **OPTIONS)
    found = [d.score(prompts, progress=False).components for d in (unsafe, detector)]
    error = 0.0
    for name in WEIGHTS:
        column, n = detector.components.index(f"{MODULE}.{name}"), refs[name][:, 0].numel()
        total, squares, *dots = torch.stack(collector.rows[name]).double().sum(0).T
        std = (squares / n - (total / n).square()).sqrt()
        a, b = (
            dot * r.scales[f"{MODULE}.{name}"] / (std * r.std[column] * n)
            for dot, r in zip(dots, (method.unsafe, method.safe), strict=True)
        )
        for ours, theirs in zip(found, (a, a / (a + b)), strict=True):
            error = max(error, float((ours[:, column] / theirs - 1).abs().max()))
    if not error < TOLERANCE:
        raise RuntimeError(f"products differ by {error:.1e} relative, expected below {TOLERANCE}")
    calls = {
        "gradsafe": lambda: detector.score(prompts, progress=False),
        "gradsafe_passes": passes,
        "bergson": lambda: bergson("scores"),
        "bergson_gradients": lambda: bergson("gradients"),
        "bergson_passes": lambda: bergson("passes"),
    }
    times = compare(calls, "cpu", rounds=15, warm_up=2, seconds=40)
    result: dict[str, Any] = {"case": CASE, "error": f"{error:.1e}"}
    for name, t in times.items():
        result |= {f"{name}_{q}_ms": round(getattr(t, q) / 1e3, 1) for q in ("p20", "p50", "p80")}
    result["x_bergson"] = round(times["bergson"].p50 / times["gradsafe"].p50, 2)
    result |= {f"{name}_version": version(name) for name in ("bergson", "transformers")}
    write_csv(RESULT, [result])
    print(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
