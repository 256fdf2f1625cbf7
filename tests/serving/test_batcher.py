"""The batcher: who shares a batch, who waits how long, and who fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks import testbed
from gradsafe import Detector
from gradsafe.detection import NonFiniteGradientError
from gradsafe.serving.batching import Batcher, QueueFullError, UnscorableError


class Watched:
    """A detector whose calls of `score` are recorded, may wait, and may fail."""

    def __init__(self, detector: Detector) -> None:
        self.detector, self.encode = detector, detector.encode
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.failing: dict[int, Exception] = {}  # by the number of tokens of a prompt

    def score(self, encoded: Any, *arguments: Any, **options: Any) -> Any:
        self.sizes.append(len(encoded))
        self.go.wait()
        for item in encoded.items:
            if len(item) in self.failing:
                raise self.failing[len(item)]
        return self.detector.score(encoded, *arguments, **options)

    def tokens(self, prompt: str) -> int:
        return len(self.detector.encode([prompt]).items[0])


@pytest.fixture
def watched(detector: Detector) -> Watched:
    return Watched(detector)


@contextmanager
def batching(watched: Watched, **options: Any) -> Iterator[Batcher]:
    given = {"batch_tokens": 4096, "max_wait": 0.05, "max_queue": 1000, **options}
    batcher = Batcher(watched, **given)  # type: ignore[arg-type]
    try:
        yield batcher
    finally:
        watched.go.set()
        batcher.close()
        assert not batcher.alive


async def ask(batcher: Batcher, prompts: list[str]) -> list[Any]:
    """Every prompt as a request of its own."""
    return [
        r for found in await asyncio.gather(*(batcher.score([p]) for p in prompts)) for r in found
    ]


def test_concurrent_requests_share_a_batch_and_keep_their_order(
    watched: Watched, prompts: list[str]
) -> None:
    with batching(watched, max_wait=2.0) as batcher:
        found = asyncio.run(ask(batcher, prompts[:30]))
    assert watched.sizes == [30]
    expected = watched.detector.score(prompts[:30], progress=False).values.tolist()
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_full_batch_does_not_wait(watched: Watched, prompts: list[str]) -> None:
    wide = max(watched.tokens(prompt) for prompt in prompts[:8])
    with batching(watched, max_wait=60.0, batch_tokens=4 * wide) as batcher:
        start = time.monotonic()
        asyncio.run(asyncio.wait_for(ask_and_close(batcher, prompts[:8]), 50))
        assert time.monotonic() - start < 50
    assert sum(watched.sizes) == 8
    assert watched.sizes[0] >= 4
    assert len(watched.sizes) >= 2


async def ask_and_close(batcher: Batcher, prompts: list[str]) -> list[Any]:
    """Asks; closing ends the wait of the last batch, which is not full."""
    tasks = asyncio.gather(*(batcher.score([p]) for p in prompts))
    await asyncio.sleep(1)
    await asyncio.get_running_loop().run_in_executor(None, batcher.close)
    return await tasks


def test_a_lone_prompt_waits_no_longer_than_asked(watched: Watched) -> None:
    watched.detector.score(["hello"], progress=False)
    with batching(watched, max_wait=0.2) as batcher:
        start = time.monotonic()
        asyncio.run(ask(batcher, ["hello"]))
        assert 0.2 <= time.monotonic() - start < 5


def test_prompts_that_arrive_while_the_model_is_busy_share_the_next_batch(
    watched: Watched, prompts: list[str]
) -> None:
    async def run(batcher: Batcher) -> None:
        watched.go.clear()
        first = asyncio.create_task(batcher.score(["hello"]))
        while not watched.sizes:
            await asyncio.sleep(0.01)
        others = asyncio.gather(*(batcher.score([p]) for p in prompts[:10]))
        while batcher.waiting < 10:
            await asyncio.sleep(0.01)
        watched.go.set()
        await asyncio.gather(first, others)

    with batching(watched, max_wait=0.0) as batcher:
        asyncio.run(run(batcher))
    assert watched.sizes == [1, 10]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NonFiniteGradientError("NaN in a layer"), UnscorableError),
        (torch.OutOfMemoryError("too much"), torch.OutOfMemoryError),
    ],
)
def test_a_prompt_that_fails_fails_alone(
    watched: Watched, prompts: list[str], error: Exception, kind: type
) -> None:
    bad = "one two three " * 9
    watched.failing = {watched.tokens(bad): error}
    asked = [*prompts[:6], bad, *prompts[6:11]]
    with batching(watched, max_wait=2.0) as batcher:
        found = asyncio.run(ask(batcher, asked))
    assert isinstance(found.pop(6), kind)
    expected = watched.detector.score(prompts[:11], progress=False).values.tolist()
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_nan_score_is_no_score(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = detector.model, detector.tokenizer
    nll = Watched(Detector.fit(model, tokenizer, method="nll", progress=False))
    scores = nll.detector.score(["hello", "there"], progress=False)
    scores.values[1] = torch.nan
    monkeypatch.setattr(nll, "score", lambda *_, **__: scores)
    with batching(nll) as batcher:
        first, second = asyncio.run(batcher.score(["hello", "there"]))
    assert isinstance(first, float)
    assert isinstance(second, UnscorableError)


def test_more_than_the_queue_holds_is_refused_and_nothing_stays_taken(watched: Watched) -> None:
    async def run(batcher: Batcher) -> list[Any]:
        return await asyncio.gather(
            *(batcher.score(["hello", "there"]) for _ in range(3)), return_exceptions=True
        )

    with batching(watched, max_queue=5) as batcher:
        *answered, refused = asyncio.run(run(batcher))
        assert all(isinstance(found, list) and len(found) == 2 for found in answered)
        assert isinstance(refused, QueueFullError)
        assert batcher.accepted == 0
        assert len(asyncio.run(batcher.score(["hello"] * 5))) == 5


def test_a_request_that_is_given_up_frees_its_place(watched: Watched) -> None:
    async def run(batcher: Batcher) -> None:
        watched.go.clear()
        tasks = [asyncio.create_task(batcher.score(["hello"] * 2)) for _ in range(3)]
        while batcher.waiting < 4 or not watched.sizes:  # two are in a batch
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert batcher.accepted == 0
        watched.go.set()
        assert len(await batcher.score(["hello"])) == 1

    # One request fills a batch.
    with batching(watched, max_wait=0.0, batch_tokens=2 * watched.tokens("hello")) as batcher:
        asyncio.run(run(batcher))
    assert watched.sizes == [2, 1]


def test_close_answers_what_is_waiting(watched: Watched, prompts: list[str]) -> None:
    with batching(watched, max_wait=60.0) as batcher:
        found = asyncio.run(ask_and_close(batcher, prompts[:5]))
    assert [type(item) for (item,) in found] == [float] * 5


def test_other_methods_are_served_as_they_are(detector: Detector, prompts: list[str]) -> None:
    model, tokenizer = detector.model, detector.tokenizer
    references = testbed.references(2)
    for options in ({"method": "cascade"}, {"method": "nll"}, {"overflow": "window"}):
        uses = options.get("method") != "nll"
        found = Detector.fit(
            model, tokenizer, *(references if uses else ()), progress=False, **options
        )
        if options.get("method") == "cascade":
            benign, unsafe = testbed.calibration_prompts(), testbed.calibration_prompts("unsafe")
            found.calibrate(
                benign[:60], 0.1, progress=False, unsafe_prompts=unsafe[:20], max_fnr=0.1
            )
        asked = [*prompts[:12], "a long prompt " * 100] if "overflow" in options else prompts[:12]
        with batching(Watched(found), max_wait=1.0) as batcher:
            served = asyncio.run(ask(batcher, asked))
        expected = found.score(asked, progress=False).values.tolist()
        assert served == pytest.approx(expected, abs=1e-6)
