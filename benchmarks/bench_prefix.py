"""Time per prompt with a long system prompt that all prompts share, and peak memory.

python -m benchmarks.bench_prefix                  60M parameters, 500 shared tokens, batches of 16
python -m benchmarks.bench_prefix --size 100M

"nll, not shared" runs the opening once per prompt, as a loop over prompts would.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.detection_models import SIZES, make_model, make_prompts, make_tokenizer
from benchmarks.table import markdown, write_csv
from gradsafe import Detector
from gradsafe.detection import gradients

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 3
CASES: dict[str, tuple[dict[str, Any], bool]] = {  # options, and whether forward passes share
    "gradcoo, exact": ({}, True),
    "gradcoo, cut": ({"prefix": "cut"}, True),
    "nll, not shared": ({"method": "nll"}, False),
    "nll, shared": ({"method": "nll"}, True),
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="60M")
    parser.add_argument("--shared", type=int, default=500, help="tokens of the system prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = make_model(arguments.size, getattr(torch, arguments.dtype), arguments.device)
    tokenizer = make_tokenizer()
    system = make_prompts(1, arguments.shared)[0]
    prompts = make_prompts(arguments.batch, arguments.tokens)
    unsafe, safe = prompts[:2], prompts[2:4]
    batch_tokens = (arguments.shared + arguments.tokens + 8) * arguments.batch
    detectors, times, scores = {}, {name: [] for name in CASES}, {}
    for name, (options, _) in CASES.items():
        references = () if options.get("method") == "nll" else (unsafe, safe)
        detectors[name] = Detector.fit(
            *(model, tokenizer, *references),
            template="{system} {prompt}", system=system, progress=False, **options,
        )  # fmt: skip
    shared_from = gradients.SHARED_FROM
    for _ in range(ROUNDS):  # in turns: the machine may be shared
        for name, (_, share) in CASES.items():
            gradients.SHARED_FROM = shared_from if share else 10**9
            start = time.perf_counter()
            found = detectors[name].score(prompts, batch_tokens, progress=False, components=False)
            times[name].append((time.perf_counter() - start) / len(prompts))
            scores[name] = found
    gradients.SHARED_FROM = shared_from
    rows = []
    for name in CASES:
        base = "nll, not shared" if name.startswith("nll") else "gradcoo, exact"
        median = sorted(times[name])[ROUNDS // 2]
        nll = (scores[name].nll / scores[base].nll - 1).abs().max()
        difference = (scores[name].values - scores[base].values).abs().max()
        rows.append({
            "size": arguments.size, "dtype": arguments.dtype, "shared": arguments.shared,
            "tokens": arguments.tokens, "batch": arguments.batch, "case": name,
            "ms_per_prompt": round(1e3 * median, 1),
            "times_faster": round(sorted(times[base])[ROUNDS // 2] / median, 2),
            "largest_relative_difference_of_nll": f"{float(nll):.1e}",
            "largest_difference_of_scores": f"{float(difference):.1e}",
        })  # fmt: skip
    write_csv(arguments.out / f"prefix_{arguments.device}.csv", rows)
    print(markdown(rows, [(key, key.replace("_", " ")) for key in rows[0]]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
