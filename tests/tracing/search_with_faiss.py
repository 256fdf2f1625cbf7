"""One approximate search, killed at a step if one is named: search_with_faiss.py FOLDER [STEP]."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from gradsafe._io.artifacts import read_manifest
from gradsafe.tracing import approximate
from gradsafe.tracing.folder import KIND, IndexFolder
from gradsafe.tracing.matching import Metric
from gradsafe.tracing.search import Search


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


folder, step = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
if step == "file":
    approximate.file_record = die
elif step == "record":
    approximate.write_tensors = die
elif step == "rename of the record":
    replace = Path.replace
    Path.replace = lambda self, target: (
        die() if target.suffix == ".safetensors" else replace(self, target)
    )
manifest = read_manifest(folder, KIND)
search = Search(IndexFolder(folder, manifest["metadata"], manifest["files"]))
queries = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
found = search.best_rows(queries, 10, Metric("unit"), approximate=True)
print(found.scores.tolist())
