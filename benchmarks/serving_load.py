"""Throughput, latency and memory of `gradsafe serve`, against the same server without batches.

    python -m benchmarks.serving_load                     the testbed's model (minutes)
    python -m benchmarks.serving_load --model smollm2     SmolLM2-135M-Instruct (ten minutes)

Two servers on the loopback interface, one with batches and one that scores prompt by prompt, take
turns, so that a busy machine slows both. Clients keep their connection and ask again as soon as
they have an answer. `--tables` only writes the tables of the docs from the CSV files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import testbed
from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.table import markdown, read_csv, write_csv

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONCURRENCY = (1, 8, 32)
ROUNDS = {"testbed": 3, "smollm2": 2}
REQUESTS = {"testbed": 128, "smollm2": 8}  # of one measurement, or one per client if more
SERVERS: dict[str, tuple[str, ...]] = {
    "batches": (),
    "one by one": ("--batch-tokens", "1", "--max-wait-ms", "0"),
}
MEMORY_AFTER = (0, 1000, 2500, 5000, 7500, 10_000)  # requests
MEMORY_CLIENTS = 32


def prepare(name: str, folder: Path) -> tuple[str, list[str]]:
    """Saves a calibrated detector; returns the model's name and prompts that are not in it."""
    from gradsafe import Detector

    if name == "testbed":
        model, tokenizer = testbed.load()
        benign = testbed.calibration_prompts()[:200]
        prompts, path = [row["prompt"] for row in testbed.prompts("heldout")], testbed.folder()
    else:
        from benchmarks import smollm2

        model, tokenizer = smollm2.load("base", progress=False)
        text = (ROOT / "benchmarks/data/xstest/prompts.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        benign = [row["prompt"] for row in rows if row["label"] == "safe"][:50]
        prompts, path = [row["prompt"] for row in rows if row["prompt"] not in benign], name
    detector = Detector.fit(model, tokenizer, *testbed.references(4), progress=False)
    detector.calibrate(benign, max_fpr=0.05, progress=False)
    detector.save(folder)
    return str(path), prompts


@contextmanager
def serving(model: str, folder: Path, options: Sequence[str]) -> Iterator[tuple[int, str]]:
    """A server: its process id and its URL; it must end with status 0."""
    command = [sys.executable, "-m", "gradsafe", "serve", str(folder), "--model", model]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--port", "0", *options], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving .* at (http://\S+)", line):
                break
        else:
            raise RuntimeError("".join(lines))
        yield process.pid, found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


async def client(url: str, bodies: Iterator[bytes], seconds: list[float]) -> None:
    """Sends requests over one connection until there are none left."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    for body in bodies:
        start = time.perf_counter()
        head = "POST /v1/moderations HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer.lower())
        assert length, answer
        content = await reader.readexactly(int(length[1]))
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{answer!r} {content!r}")
        seconds.append(time.perf_counter() - start)
    writer.close()


def load(
    url: str, prompts: Sequence[str], clients: int, requests: int
) -> tuple[float, list[float]]:
    """Requests per second, and the time of each."""
    bodies = (
        json.dumps({"input": prompts[index % len(prompts)]}).encode() for index in range(requests)
    )
    seconds: list[float] = []

    async def run() -> None:
        await asyncio.gather(*(client(url, bodies, seconds) for _ in range(clients)))

    start = time.perf_counter()
    asyncio.run(run())
    return requests / (time.perf_counter() - start), seconds


def throughput(name: str, model: str, folder: Path, prompts: list[str]) -> list[dict[str, Any]]:
    """One row per number of clients and server: medians over the rounds."""
    rates: dict[tuple[int, str], list[float]] = {}
    times: dict[tuple[int, str], list[float]] = {}
    with (
        serving(model, folder, SERVERS["batches"]) as (_, batches),
        serving(model, folder, SERVERS["one by one"]) as (_, single),
    ):
        urls = {"batches": batches, "one by one": single}
        for url in urls.values():
            load(url, prompts, 4, 8)
        for number in range(ROUNDS[name]):
            for clients in CONCURRENCY:
                for kind, url in urls.items():
                    requests = max(REQUESTS[name], clients)
                    rate, seconds = load(url, prompts, clients, requests)
                    rates.setdefault((clients, kind), []).append(rate)
                    times.setdefault((clients, kind), []).extend(seconds)
                    print(
                        f"round {number + 1}, {clients} clients, {kind}: {rate:.1f}/s", flush=True
                    )
    rows = []
    for (clients, kind), found in rates.items():
        single_rates = rates[clients, "one by one"]
        cuts = statistics.quantiles(times[clients, kind], n=20, method="inclusive")
        ratios = [a / b for a, b in zip(found, single_rates, strict=True)]
        rows.append(
            {
                "model": name,
                "clients": clients,
                "server": kind,
                "requests per second": f"{statistics.median(found):.1f}",
                "least": f"{min(found):.1f}",
                "most": f"{max(found):.1f}",
                "times one by one": f"{statistics.median(ratios):.2f}",
                "p50 ms": f"{cuts[9] * 1e3:.0f}",
                "p95 ms": f"{cuts[18] * 1e3:.0f}",
                "rounds": ROUNDS[name],
                "requests": max(REQUESTS[name], clients),
            }
        )
    return rows


def memory(model: str, folder: Path, prompts: list[str]) -> list[dict[str, Any]]:
    """Resident memory of the server after so many requests."""
    rows, sent = [], 0
    with serving(model, folder, SERVERS["batches"]) as (process, url):
        for count in MEMORY_AFTER:
            if count > sent:
                load(url, prompts, MEMORY_CLIENTS, count - sent)
            sent = count
            rows.append({"requests": count, "MB": f"{resident(process) / 1e6:.1f}"})
            print(rows[-1], flush=True)
    return rows


def resident(process: int) -> int:
    """Bytes of a process in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tables() -> None:
    """Writes the tables of docs/serving.md that there are results for."""
    page = DOCS / "serving.md"
    columns = (
        *("clients", "server", "requests per second", "least", "most", "times one by one"),
        *("p50 ms", "p95 ms"),
    )
    for name in REQUESTS:
        if rows := read_csv(RESULTS / f"serving_load_{name}.csv"):
            table = markdown(rows, [(column, column) for column in columns])
            replace_block(page, f"load {name}", f"{table}\n{measured_note(rows[0])}\n")
    if rows := read_csv(RESULTS / "serving_memory.csv"):
        table = markdown(rows, [("requests", "requests"), ("MB", "MB in memory")])
        replace_block(page, "memory", f"{table}\n{measured_note(rows[0])}\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=tuple(REQUESTS), default="testbed")
    parser.add_argument("--tables", action="store_true", help="only write the tables of the docs")
    options = parser.parse_args()
    if not options.tables:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "detector"
            model, prompts = prepare(options.model, folder)
            rows = throughput(options.model, model, folder, prompts)
            write_csv(RESULTS / f"serving_load_{options.model}.csv", rows)
            if options.model == "testbed":
                write_csv(RESULTS / "serving_memory.csv", memory(model, folder, prompts))
    tables()


if __name__ == "__main__":
    main()
