"""`gradsafe serve` in a process of its own, on a free port of the loopback interface."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="the client of these tests")
for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="part of the extra `serve`")

START_SECONDS = 120
STOP_SECONDS = 120


class Server:
    """A running server; `lines` is what it has written to its standard error."""

    def __init__(self, *arguments: str, keys: str = "") -> None:
        environment = {**os.environ, "GRADSAFE_API_KEYS": keys, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gradsafe", "serve", *arguments, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self._urls: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving .* at (http://\S+)", line):
                self._urls.put(found[1])
        self._urls.put(None)

    def wait(self) -> str:
        """The URL, as soon as it serves."""
        url = self._urls.get(timeout=START_SECONDS)
        assert url, "".join(self.lines)
        self.url = url
        httpx.get(f"{url}/health", timeout=START_SECONDS).raise_for_status()
        return url

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOP_SECONDS)
        self._reader.join(STOP_SECONDS)
        return status

    def metric(self, name: str, **headers: str) -> float:
        """One value of /metrics, for example `gradsafe_prompts_total{outcome="failed"}`."""
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=60).text
        return next(float(v) for v in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.M))

    def moderate(self, given: Any, **headers: str) -> httpx.Response:
        """Asks for a moderation."""
        return httpx.post(
            f"{self.url}/v1/moderations", json={"input": given}, headers=headers, timeout=120
        )


@contextmanager
def serving(model: Path, detector: Path, *options: str, keys: str = "") -> Iterator[Server]:
    """A server that is killed at the end, unless it was stopped."""
    server = Server(
        *("--detector", str(detector), "--model", str(model), "--device", "cpu", *options),
        keys=keys,
    )
    try:
        server.wait()
        yield server
    finally:
        server.process.kill()
        server.process.wait()
