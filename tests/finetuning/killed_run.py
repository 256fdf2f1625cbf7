"""Trains, and is killed at once in the fifth step: `python killed_run.py FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tiny_run import make_model, make_trainer
from transformers import TrainerCallback

OPTIONS: dict[str, Any] = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


def build(folder: str, **options: Any) -> Any:
    # Dropout: the state of the random numbers must be resumed as well.
    return make_trainer(folder, make_model(dropout=0.3), **{**OPTIONS, **options})


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    build(sys.argv[1], callbacks=[Kill()]).train()
