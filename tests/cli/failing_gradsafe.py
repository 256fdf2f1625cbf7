"""`gradsafe`, but the process that is to score a certain prompt dies of it.

python failing_gradsafe.py HOW PROMPT detect ...; HOW is kill, interrupt or error.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from gradsafe import Detector, cli

how, fatal = sys.argv[1:3]
score = Detector.score


def failing(self: Detector, prompts: list[str], *args: Any, **options: Any) -> Any:
    if fatal not in prompts:
        return score(self, prompts, *args, **options)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)  # torchrun, as Ctrl-C in the terminal does
        time.sleep(60)
    raise ValueError("the gradient holds NaN")


Detector.score = failing  # type: ignore[method-assign]
sys.exit(cli.main(sys.argv[3:]))
