"""`gradsafe serve`: a saved detector behind the interfaces that guards are plugged into."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from shlex import quote
from typing import ClassVar

from gradsafe._io.processes import Processes
from gradsafe._jobs.options import FLAT, ModelOptions, changed
from gradsafe.serving.config import ServeConfig

KEYS = "GRADSAFE_API_KEYS"  # separated by commas


@dataclass(frozen=True)
class Serve:
    """Serve a calibrated detector over HTTP, until SIGTERM or Ctrl-C.

    API keys are read from the environment variable GRADSAFE_API_KEYS, separated by commas.

    Attributes:
        detector: Folder of a saved detector, calibrated for the model as it runs now.
        model: Model.
        host: Address to listen on; without API keys, one of this machine only.
        port: Port; 0 chooses a free one.
        open: Serve other machines without API keys.
        config: How the server answers.
    """

    detector: str = ""
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    host: str = "127.0.0.1"
    port: int = 8000
    open: bool = False
    config: ServeConfig = field(default_factory=ServeConfig, metadata=FLAT)

    POSITIONAL: ClassVar = "detector"

    def run(self, processes: Processes | None = None) -> None:
        """Serves until a signal ends it; every accepted request is answered first.

        Raises:
            ValueError, OSError: Inputs or options do not fit; the message says what to do.
            ImportError: A package of the extra `serve` is not installed.
            KeyboardInterrupt: Interrupted.
        """
        if not self.detector:
            raise ValueError("--detector is missing: give the folder of a saved detector")
        self.model.check()
        keys = api_keys(os.environ.get(KEYS, ""))
        try:
            from gradsafe.serving import app, server
        except ImportError as error:
            raise ImportError(
                f"gradsafe serve needs fastapi, uvicorn and prometheus-client ({error}): "
                "pip install 'gradsafe[serve]'"
            ) from error
        from gradsafe.serving.guard import check_calibrated, load_current

        options = changed(self.model)
        given = " ".join(
            [
                quote(options.pop("model", "")),
                *(f"--{name} {quote(str(value))}" for name, value in options.items()),
            ]
        )
        check_calibrated(self.detector, given)
        with server.bind(self.host, self.port, public=bool(keys) or self.open) as listening:
            from gradsafe._jobs.model import load_model

            model, tokenizer = load_model(self.model)
            detector = load_current(self.detector, model, tokenizer, given)
            logging.basicConfig(
                stream=sys.stderr, level=logging.WARNING, format="gradsafe: %(message)s"
            )
            app.log.setLevel(logging.INFO)
            served = app.create_app(detector, self.config, keys)
            server.listen(listening)
            _say(f"{detector.config.method}, {detector.calibration}")
            access = f"{len(keys)} API keys" if keys else "no API key needed"
            _say(f"serving {self.config.name!r} at {server.url(listening)} ({access})")
            server.run(
                served,
                listening,
                timeout=self.config.timeout,
                max_connections=self.config.max_connections,
            )
        _say("stopped, every accepted request is answered")


def api_keys(text: str) -> list[str]:
    """The keys of the environment variable.

    Raises:
        ValueError: A key is empty, holds white space or other characters than ASCII's, or is given
            twice; the message does not show it.
    """
    if not text.strip():
        return []
    keys = [key.strip() for key in text.split(",")]
    for number, key in enumerate(keys, 1):
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{KEYS}: key {number} is empty or holds other than plain characters")
    if len(set(keys)) < len(keys):
        raise ValueError(f"{KEYS}: a key is given twice")
    return keys


def _say(text: str) -> None:
    print(f"gradsafe: {text}", file=sys.stderr, flush=True)
