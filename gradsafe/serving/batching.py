"""Prompts of concurrent requests share a backward pass; one thread runs the model."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from gradsafe.detection.detector import Detector
from gradsafe.detection.gradients import EncodedPrompts
from gradsafe.models.encoding import Prompt

ENCODERS = 2  # threads that tokenise while another runs the model

Outcome: TypeAlias = float | Exception  # of a prompt: its score, or why it has none


class QueueFullError(RuntimeError):
    """More prompts are waiting than the server accepts."""


class UnscorableError(ValueError):
    """A prompt has no score: its gradient or its loss is NaN."""


@dataclass
class _Waiting:
    """An encoded prompt."""

    encoded: EncodedPrompts
    future: Future[Outcome] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def widths(self) -> list[int]:
        return [len(item) for item in self.encoded.items]


class Batcher:
    """Scores prompts in batches that fill up while the model is busy, or for `max_wait` seconds.

    Args:
        detector: Scores them; the same scores as `Detector.score`.
        batch_tokens: Padded tokens of a batch.
        max_wait: Seconds that a prompt waits for others at most while the model is idle.
        max_queue: Prompts that are accepted and not yet scored.
        observe: Called with the number of prompts of every batch.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        batch_tokens: int,
        max_wait: float,
        max_queue: int,
        observe: Callable[[int], object] = lambda size: None,
    ) -> None:
        self.detector = detector
        self.batch_tokens = batch_tokens
        self.max_wait = max_wait
        self.max_queue = max_queue
        self.observe = observe
        self.accepted = 0  # prompts without an answer; read and written by the event loop only
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._encoders = ThreadPoolExecutor(ENCODERS, "gradsafe-encode")
        self._worker = threading.Thread(target=self._run, name="gradsafe-score", daemon=True)
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether the thread that runs the model does."""
        return self._worker.is_alive()

    @property
    def waiting(self) -> int:
        """Encoded prompts that no batch has taken yet."""
        return len(self._queue)

    async def score(self, prompts: Sequence[Prompt]) -> list[Outcome]:
        """Scores the prompts of one request; call it from one event loop.

        Returns:
            For each prompt its score, or the error that it alone has: ValueError or TypeError for a
            prompt that cannot be encoded or has no score, others where the model fails.

        Raises:
            QueueFullError: `max_queue` prompts are waiting already.
        """
        with self._place_for(len(prompts)):
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._encoders, self._encode, prompts)
            with self._changed:
                self._queue.extend(item for item in found if isinstance(item, _Waiting))
                self._changed.notify()
            try:
                return [
                    await asyncio.wrap_future(item.future) if isinstance(item, _Waiting) else item
                    for item in found
                ]
            finally:  # a request that was given up leaves none of its prompts in the queue
                for item in found:
                    if isinstance(item, _Waiting):
                        item.future.cancel()

    def close(self) -> None:
        """Scores what is waiting, then ends the threads."""
        self._encoders.shutdown()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    @contextmanager
    def _place_for(self, count: int) -> Iterator[None]:
        if self.accepted + count > self.max_queue:
            raise QueueFullError(f"{self.accepted} prompts are waiting")
        self.accepted += count
        try:
            yield
        finally:
            self.accepted -= count

    def _encode(self, prompts: Sequence[Prompt], first: int = 0) -> list[_Waiting | Exception]:
        names = [f"input[{first + index}]" for index in range(len(prompts))]
        try:
            together = self.detector.encode(prompts, names)
        except Exception as error:
            if len(prompts) == 1:
                return [error]
            return [item for i, prompt in enumerate(prompts) for item in self._encode([prompt], i)]
        return [_Waiting(together[i : i + 1]) for i in range(len(prompts))]

    def _run(self) -> None:
        while batch := self._next_batch():
            batch = [item for item in batch if item.future.set_running_or_notify_cancel()]
            if batch:
                self.observe(len(batch))
                self._answer(batch)

    def _next_batch(self) -> list[_Waiting]:
        """Waits for prompts; none after `close`, when all are scored."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if not self._queue:
                return []
            deadline = self._queue[0].arrived + self.max_wait
            while self._fitting() == len(self._queue) and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return [self._queue.popleft() for _ in range(self._fitting())]

    def _fitting(self) -> int:
        """How many prompts from the front fit a batch, at least one."""
        widest = windows = 0
        for count, item in enumerate(self._queue):
            widths = item.widths
            widest, windows = max(widest, *widths), windows + len(widths)
            if count and widest * windows > self.batch_tokens:
                return count
        return len(self._queue)

    def _answer(self, batch: list[_Waiting]) -> None:
        """Scores a batch; where it fails, its halves, until a prompt fails alone."""
        encoded = EncodedPrompts(
            [name for item in batch for name in item.encoded.names],
            [windows for item in batch for windows in item.encoded.windows],
        )
        try:
            scores = self.detector.score(encoded, self.batch_tokens, False, components=False)
            values = scores.values.tolist()
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_result(_unscorable(error))
                return
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._answer(half)
            return
        for item, value in zip(batch, values, strict=True):
            nan = UnscorableError("the score of the prompt is NaN")
            item.future.set_result(nan if math.isnan(value) else value)


def _unscorable(error: Exception) -> Exception:
    return UnscorableError(str(error)) if isinstance(error, ValueError) else error
