"""`gradsafe`, but the process that is to score a certain prompt or sample dies of it.

python failing_gradsafe.py HOW WHICH detect ...; HOW is kill, interrupt or error; WHICH is
the place of a prompt or sample in its file.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from gradsafe import Detector
from gradsafe._cli import main
from gradsafe.tracing import fill
from gradsafe.tracing.signature import check_finite

how, fatal = sys.argv[1:3]
score = Detector.score


def die() -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)  # torchrun, as Ctrl-C in the terminal does
        time.sleep(60)
    raise ValueError("the gradient holds NaN")


def failing(self: Detector, prompts: Any, *args: Any, **options: Any) -> Any:
    if fatal in prompts.names:
        die()
    return score(self, prompts, *args, **options)


def failing_check(values: Any, names: list[str]) -> None:
    if fatal in names:
        die()
    check_finite(values, names)


Detector.score = failing  # type: ignore[method-assign]
fill.check_finite = failing_check
sys.exit(main(sys.argv[3:]))
