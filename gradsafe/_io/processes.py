"""Processes that share one job, as torchrun starts them: deal, share, wait, end together."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import count as numbers
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # a process alone never imports torch.distributed
    import torch
    from torch import Tensor

POLL = 0.05  # seconds between two looks at the store
GRACE = 10.0  # seconds in which torchrun ends the processes that have nothing to say
_LAST_WORD = "last word"
_calls = numbers()  # one group serves several calls, each with names of its own

T = TypeVar("T")


class Stopped(Exception):
    """Another process failed and says why; this one should end too, and a command in silence."""


class Processes:
    """The processes of one job, of which this is number `rank`.

    Small things pass through torchrun's key-value store. It is polled and never waited on inside
    C++, so that Ctrl-C and the failure of another process end a wait at once, and no wait runs
    into a time limit. A process that dies needs no watching: torchrun then ends the others.
    Tensors go by torch.distributed: NCCL between CUDA devices, gloo between CPUs.

    Every process must make the same calls of `next_job`, `wait`, `share` and `share_tensors`. In a
    process alone all methods are trivial, so callers need no second code path.

    Attributes:
        rank: Number of this process.
        count: How many there are.
        local_rank: Number of this process on its machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.count = count
        self.local_rank = local_rank
        self._job = 0
        self._totals: Counter[str] = Counter()
        self._claimed: set[str] = set()
        self._told: list[Any] = []
        self._heard = 0
        self._group = False

    @classmethod
    def from_environment(cls) -> Processes:
        """Reads RANK, WORLD_SIZE and LOCAL_RANK; a process without all three is alone."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(name in os.environ for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    @classmethod
    def of_group(cls) -> Processes:
        """Those of torch's default process group; a process without one is alone.

        All of them must call this equally often.
        """
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        store = distributed.distributed_c10d._get_default_store()
        rank, size = distributed.get_rank(), distributed.get_world_size()
        found = cls(rank, size, int(os.environ.get("LOCAL_RANK", 0)))
        found._store = distributed.PrefixStore(f"gradsafe/{next(_calls)}", store)
        return found

    @property
    def first(self) -> bool:
        """Whether this is the process that does what only one may do."""
        return self.rank == 0

    def next_job(self) -> None:
        """Starts a job of its own: its sums begin at zero, and all its names are free again.

        A failure and what was claimed stay: they end, or concern, the processes as a whole.
        """
        self._job += 1
        self._totals.clear()
        self._told.clear()
        self._heard = 0

    def join(self) -> None:
        """Connects to the store, which imports torch; any later call would do so too."""
        if self.count > 1:
            self._store  # noqa: B018

    def close(self) -> None:
        """Ends what `share_tensors` began."""
        if self._group:
            from torch import distributed

            distributed.destroy_process_group()
            self._group = False

    def claim(self, name: str) -> bool:
        """Whether this process was the first of all to claim this name."""
        if self.count == 1 or name in self._claimed:
            return True
        mine: bool = self._store.add(f"claim/{name}", 1) == 1
        if mine:
            self._claimed.add(name)
        return mine

    def claim_last_word(self) -> bool:
        """Whether this process says why the job ends: the first one to fail does."""
        try:
            return self.claim(_LAST_WORD)
        except (RuntimeError, ValueError):  # no store, or none any more: several messages or none
            return True

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Ends the other processes with the reason where the block fails in this one."""
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            if self.count > 1:
                reason = f"process {self.rank} failed: {type(error).__name__}: {error}"
                with suppress(RuntimeError, ValueError):  # no store, or none any more
                    self._store.set("reason", reason)
                self.claim_last_word()
            raise

    def linger(self) -> None:
        """Waits for torchrun to end this process, so that the message of another comes through.

        torchrun kills all processes as soon as one has failed, in the middle of a line if need be.
        """
        try:
            time.sleep(GRACE)
        except KeyboardInterrupt:
            return

    def check(self) -> None:
        """Raises Stopped if another process has failed."""
        if self.count > 1 and self._store.check([f"claim/{_LAST_WORD}"]):
            known = self._store.check(["reason"])
            raise Stopped(self._store.get("reason").decode() if known else "")

    def wait(self, name: str, tick: Callable[[], None] | None = None) -> None:
        """Waits until all processes have come here.

        Args:
            name: Of the place; each is passed once in a job.
            tick: Called now and then.

        Raises:
            Stopped: Another process failed.
        """
        if self.count > 1:
            self.total(f"wait/{name}", 1)
            self._poll(lambda: self.total(f"wait/{name}") >= self.count, tick)

    def leave(self, name: str) -> None:
        """Ends common work: the first process waits for the others, who do not wait for it.

        It leaves last because it may hold what they need, as the store.

        Raises:
            Stopped: Another process failed.
        """
        if not self.first:
            self.total(f"leave/{name}", 1)
        elif self.count > 1:
            self._poll(lambda: self.total(f"leave/{name}") >= self.count - 1)

    @contextmanager
    def first_of_machine_first(self, name: str) -> Iterator[None]:
        """Lets the first process of each machine through the block before its others."""
        if self.local_rank:
            self.wait(name)
        yield
        if not self.local_rank:
            self.wait(name)

    def total(self, name: str, amount: int = 0) -> int:
        """Adds to a sum over all processes and returns it."""
        if self.count == 1:
            self._totals[name] += amount
            return self._totals[name]
        total: int = self._store.add(self._key("total", name), amount)
        return total

    def deal(self, items: Sequence[T]) -> Iterator[T]:
        """Yields items that no other process gets, the next one as soon as this one asks for it.

        Args:
            items: The same in all processes, and dealt out once in a job.

        Raises:
            Stopped: Another process failed.
        """
        if self.count == 1:
            yield from items
            return
        while (turn := self.total("dealt", 1)) <= len(items):
            self.check()
            yield items[turn - 1]

    def share(self, name: str, value: Any) -> Any:
        """Returns the first process's value in all of them; the other values are ignored.

        Args:
            name: Of the value; each is shared once in a job.
            value: Any JSON, in the first process.

        Raises:
            Stopped: Another process failed.
        """
        if self.count == 1:
            return value
        key = self._key("share", name)
        if self.first:
            self._store.set(key, json.dumps(value))
            return value
        self._poll(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def tell(self, value: Any) -> None:
        """Passes any JSON to the first process, see `heard`."""
        if self.count == 1:
            self._told.append(value)
            return
        self._store.set(self._key("told", str(self.total("told", 1))), json.dumps(value))

    def heard(self) -> list[Any]:
        """What processes told since the last call, in the first process."""
        if self.count == 1:
            told, self._told = self._told, []
            return told
        told = []
        # A number that is taken may have no value yet: it is heard at the next call.
        while self._store.check([key := self._key("told", str(self._heard + 1))]):
            told.append(json.loads(self._store.get(key)))
            self._heard += 1
        return told

    def share_tensors(
        self, name: str, tensors: Mapping[str, Tensor], device: torch.device
    ) -> Mapping[str, Tensor]:
        """Returns the first process's tensors in all of them, bit for bit.

        Args:
            name: Of the tensors; each is shared once in a job.
            tensors: Name to tensor in the first process, ignored in the others.
            device: That of this process, of the same type in all. Tensors that the first process
                keeps on the CPU arrive on the CPU.

        Raises:
            Stopped: Another process failed.
        """
        if self.count == 1:
            return tensors
        import torch
        from torch import distributed

        mine = {
            key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.device.type]
            for key, tensor in tensors.items()
        }
        layout = self.share(name, mine)
        self.wait(name)  # the group's own waiting has a time limit
        if not self._group:
            distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=distributed.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.count,
            )
            self._group = True
        received: dict[str, Tensor] = {}
        for key, (shape, dtype, home) in layout.items():
            if self.first:
                tensor = tensors[key].detach().to(device).contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            if tensor.numel():  # as bytes: not every backend knows every dtype
                distributed.broadcast(tensor.reshape(-1).view(torch.uint8), src=0)
            received[key] = tensor if home == device.type else tensor.to(home)
        return tensors if self.first else received

    def _poll(self, done: Callable[[], bool], tick: Callable[[], None] | None = None) -> None:
        while not done():
            self.check()
            if tick is not None:
                tick()
            time.sleep(POLL)

    def _key(self, kind: str, name: str) -> str:
        return f"{kind}/{self._job}/{name}"

    @cached_property
    def _store(self) -> Any:
        from torch import distributed

        store, _, _ = next(distributed.rendezvous("env://"))
        return distributed.PrefixStore("gradsafe", store)
