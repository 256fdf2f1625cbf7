"""Processes that share one job under torchrun: distribute items, share values, end together."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # a process alone never imports torch.distributed
    import torch
    from torch import Tensor

POLL = 0.05  # seconds between two looks at the store
GRACE = 10.0  # seconds that torchrun has to end the processes that do not report
_LAST_WORD = "last word"

T = TypeVar("T")


class Stopped(Exception):
    """Another process failed; its reason is the message. This process should end, too."""


class Processes:
    """The processes of one job; this one has number `rank`.

    Control messages go through torchrun's key-value store, tensors through torch.distributed (NCCL
    between CUDA devices, gloo between CPUs). The store is polled in Python rather than waited on
    in C++: Ctrl-C and the failure of another process end every wait at once, and no wait has a
    timeout. torchrun itself watches for processes that die.

    All processes must make the same calls of `next_job`, `wait`, `share` and `share_tensors`. With
    one process every method is trivial, so that callers need no second code path.

    Attributes:
        rank: Number of this process.
        count: Number of processes.
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
        """Reads RANK, WORLD_SIZE and LOCAL_RANK; without all three there is one process."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(name in os.environ for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    @classmethod
    def of_group(cls) -> Processes:
        """The processes of torch's default process group; one process without a group.

        A collective call: the first process opens a store of its own and sends its address.
        """
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        rank, size = distributed.get_rank(), distributed.get_world_size()
        found = cls(rank, size, int(os.environ.get("LOCAL_RANK", 0)))
        if size > 1:
            host = os.environ.get("MASTER_ADDR", "localhost")
            address: list[Any] = [None]
            if found.first:
                found._store = distributed.TCPStore(
                    host, 0, size, is_master=True, wait_for_workers=False
                )
                address = [(host, found._store.port)]
            distributed.broadcast_object_list(address)
            if not found.first:
                host, port = address[0]
                found._store = distributed.TCPStore(host, port, size, is_master=False)
        return found

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def next_job(self) -> None:
        """Starts a new job: sums start at zero, and all names of values can be used again.

        Failures and claims stay, since they concern the processes as a whole.
        """
        self._job += 1
        self._totals.clear()
        self._told.clear()
        self._heard = 0

    def join(self) -> None:
        """Connects to the store now; this imports torch."""
        if self.count > 1:
            self._store  # noqa: B018

    def close(self) -> None:
        """Destroys the process group that `share_tensors` created."""
        if self._group:
            from torch import distributed

            distributed.destroy_process_group()
            self._group = False

    def claim(self, name: str) -> bool:
        """Whether this process was the first to claim this name."""
        if self.count == 1 or name in self._claimed:
            return True
        mine: bool = self._store.add(f"claim/{name}", 1) == 1
        if mine:
            self._claimed.add(name)
        return mine

    def claim_last_word(self) -> bool:
        """Whether this process reports why the job ends: the first one to fail does."""
        try:
            return self.claim(_LAST_WORD)
        except (RuntimeError, ValueError):  # the store is gone: every process reports
            return True

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Ends the other processes, with the reason, if the block fails in this one."""
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            if self.count > 1:
                reason = f"process {self.rank} failed: {type(error).__name__}: {error}"
                with suppress(RuntimeError, ValueError):  # the store is gone
                    self._store.set("reason", reason)
                self.claim_last_word()
            raise

    def linger(self) -> None:
        """Waits for torchrun to end this process.

        torchrun kills all processes as soon as one has failed; the process that reports the failure
        must be able to finish its message first.
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
        """Waits until all processes have made this call.

        Args:
            name: Of the call; each is used once in a job.
            tick: Called at each look at the store.

        Raises:
            Stopped: Another process failed.
        """
        if self.count > 1:
            self.total(f"wait/{name}", 1)
            self._poll(lambda: self.total(f"wait/{name}") >= self.count, tick)

    def leave(self, name: str) -> None:
        """Ends common work: the first process waits for the others, which do not wait.

        It leaves last because it may hold what they need, such as the store.

        Raises:
            Stopped: Another process failed.
        """
        if not self.first:
            self.total(f"leave/{name}", 1)
        elif self.count > 1:
            self._poll(lambda: self.total(f"leave/{name}") >= self.count - 1)

    def total(self, name: str, amount: int = 0) -> int:
        """Adds to a sum over all processes and returns it."""
        if self.count == 1:
            self._totals[name] += amount
            return self._totals[name]
        total: int = self._store.add(self._key("total", name), amount)
        return total

    def deal(self, items: Sequence[T]) -> Iterator[T]:
        """Yields items that no other process gets; the next one when this process asks for it.

        Args:
            items: The same in all processes; distributed once in a job.

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
        """Returns the first process's value in all processes.

        Args:
            name: Of the value; each is used once in a job.
            value: JSON; ignored in the other processes.

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
        """Sends JSON to the first process, see `heard`."""
        if self.count == 1:
            self._told.append(value)
            return
        self._store.set(self._key("told", str(self.total("told", 1))), json.dumps(value))

    def heard(self) -> list[Any]:
        """Values sent by `tell` since the last call, in the first process."""
        if self.count == 1:
            told, self._told = self._told, []
            return told
        told = []
        # A number may be taken before its value is set: it is read at the next call.
        while self._store.check([key := self._key("told", str(self._heard + 1))]):
            told.append(json.loads(self._store.get(key)))
            self._heard += 1
        return told

    def share_tensors(
        self, name: str, tensors: Mapping[str, Tensor], device: torch.device
    ) -> Mapping[str, Tensor]:
        """Returns the first process's tensors in all processes, bit for bit.

        Args:
            name: Of the tensors; each is used once in a job.
            tensors: Name to tensor; ignored in the other processes.
            device: Device of this process, of the same type in all. Tensors that are on the CPU in
                the first process arrive on the CPU.

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
        self.wait(name)  # torch's process groups have a timeout
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


class SharedProgress:
    """Moves a progress bar by the work of all processes.

    Args:
        bar: A bar of tqdm.
        processes: The processes.
        name: Of their common sum, see `Processes.total`.
    """

    def __init__(self, bar: Any, processes: Processes, name: str) -> None:
        self._bar = bar
        self._processes = processes
        self._name = name
        self._shown = 0

    def __call__(self, done: int = 0) -> None:
        """Adds what this process did since its last call, and shows the sum of all."""
        total = self._processes.total(self._name, done)
        self._bar.update(total - self._shown)
        self._shown = total
