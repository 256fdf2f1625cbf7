"""One round of each method on tiny models; prints the numbers as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import make_model, make_tokenizer

from gradsafe import Detector, GradientSurgery, TraceIndex
from gradsafe._fallback import FallbackWarning


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model("llama", vocab_size=300, max_position_embeddings=96).eval()
    detector = Detector.fit(
        model, tokenizer, ["break it", "steal a car"], ["bake", "plant a tree"], progress=False
    )
    found = {"scores": detector.score(["hello", "SECRET"], progress=False).values.tolist()}
    rows = [{"prompt": f"question {i}", "response": "yes" * (i + 1)} for i in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        index = TraceIndex.build(model, tokenizer, rows, Path(folder) / "index", progress=False)
        hits = index.query(rows[2:3], k=3)
        found |= {"ids": hits.ids, "hits": torch.as_tensor(hits.scores).tolist()}
    weight = torch.nn.Parameter(torch.ones(3, 4))
    surgery = GradientSurgery([weight], rho=0.5)
    (weight * torch.arange(12.0).view(3, 4)).sum().backward()
    surgery.stash()
    (-weight.sum()).backward()
    surgery.merge()
    found["merged"] = weight.grad.tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main()
    texts = [str(w.message) for w in caught if w.category is FallbackWarning]
    print(json.dumps([text for text in texts if "plain PyTorch definitions" in text]))
