"""Processes that share a job, here as threads around one store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import distributed

from gradsafe._cli import main
from gradsafe._io.processes import Processes, Stopped


def all_of(count: int, store: Any = None) -> list[Processes]:
    store = store or distributed.HashStore()
    processes = [Processes(rank, count, rank) for rank in range(count)]
    for process in processes:
        process.__dict__["_store"] = store
    return processes


def together(processes: list[Processes], work: Callable[[Processes], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(processes)) as pool:
        return [future.result(timeout=20) for future in [pool.submit(work, p) for p in processes]]


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "rendezvous", lambda *_: pytest.fail("asked for a store"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # some schedulers set it for other purposes
    alone = Processes.from_environment()
    assert (alone.rank, alone.count, alone.first) == (0, 1, True)
    alone.join()
    alone.wait("here")
    alone.leave("here")
    alone.check()
    assert alone.claim("a")
    assert alone.claim("a")
    assert alone.share("value", 3) == 3
    tensors = {"a": torch.ones(2)}
    assert alone.share_tensors("tensors", tensors, torch.device("cpu")) is tensors
    assert list(alone.deal("abc")) == ["a", "b", "c"]
    alone.tell(1)
    alone.tell(2)
    assert [alone.heard(), alone.heard()] == [[1, 2], []]
    with pytest.raises(KeyError), alone.ending_together():
        raise KeyError
    alone.close()


def test_one_process_of_torchrun_is_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert Processes.from_environment().count == 1


def test_every_item_goes_to_one_process() -> None:
    dealt = together(all_of(3), lambda process: list(process.deal(range(100))))
    assert sorted(item for items in dealt for item in items) == list(range(100))


@pytest.mark.parametrize("count", [1, 3])
def test_each_job_deals_counts_and_tells_anew(count: int) -> None:
    processes = all_of(count)

    def work(process: Processes) -> tuple[list[int], int]:
        process.next_job()
        process.wait("begun")
        dealt = list(process.deal(range(20)))
        process.total("done", len(dealt))
        process.tell(process.rank)
        process.wait("done")
        told = process.heard() if process.first else [*range(count)]
        assert sorted(told) == [*range(count)]
        return dealt, process.total("done")

    for _ in range(2):
        found = together(processes, work)
        assert sorted(item for items, _ in found for item in items) == list(range(20))
        assert {total for _, total in found} == {20}


def test_one_claims_and_may_claim_again() -> None:
    processes = all_of(4)
    first = together(processes, lambda process: process.claim("it"))
    again = together(processes, lambda process: process.claim("it"))
    assert sum(first) == 1
    assert again == first


def test_sharing_passes_json_on() -> None:
    value = {"threshold": 0.1 + 0.2, "names": ["a"], "nothing": None}
    shared = together(
        all_of(3), lambda process: process.share("v", value if process.first else "ignored")
    )
    assert shared == [value] * 3


def test_the_first_hears_what_all_tell() -> None:
    processes = all_of(3)
    first = processes[0]

    def work(process: Processes) -> list[Any]:
        for number in range(4):
            process.tell([process.rank, number])
        process.wait("told")
        return first.heard() if process.first else []

    heard = together(processes, work)[0]
    assert sorted(heard) == [[rank, number] for rank in range(3) for number in range(4)]
    assert first.heard() == []
    processes[2].tell("more")
    assert first.heard() == ["more"]


def test_a_failing_block_ends_the_others_with_its_reason() -> None:
    failed, waiting = all_of(2)
    with pytest.raises(KeyError), failed.ending_together():
        raise KeyError("it")
    with (
        pytest.raises(Stopped, match=r"^process 0 failed: KeyError: 'it'$"),
        waiting.ending_together(),
    ):
        waiting.wait("never")
    assert failed.claim_last_word()  # and may say so itself
    assert not waiting.claim_last_word()


def test_without_a_group_a_process_is_alone() -> None:
    assert Processes.of_group().count == 1


def test_waiting_ends_when_the_last_has_come() -> None:
    processes = all_of(2)
    arrived = threading.Event()
    ticks: list[int] = []

    def work(process: Processes) -> bool:
        if process.first:
            process.wait("here", lambda: (ticks.append(1), arrived.set())[0])
            return True
        assert arrived.wait(10)
        process.wait("here")
        return True

    assert together(processes, work) == [True, True]
    assert ticks


def test_the_first_leaves_last() -> None:
    first, *others = all_of(3)
    others[0].leave("it")  # waits for nobody
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(first.leave, "it")
        time.sleep(0.2)
        assert not leaving.done()
        others[1].leave("it")
        leaving.result(timeout=20)


@pytest.mark.parametrize(
    "wait",
    [
        lambda process: process.wait("never"),
        lambda process: process.share("never", None),
        lambda process: setattr(process, "rank", 0) or process.leave("never"),
        lambda process: list(process.deal(range(3))),
        lambda process: process.check(),
    ],
)
def test_a_failure_ends_every_wait(wait: Callable[[Processes], Any]) -> None:
    _, failed, waiting = all_of(3)
    assert failed.claim_last_word()
    with pytest.raises(Stopped):
        wait(waiting)
    assert not waiting.claim_last_word()


def test_without_a_store_everyone_speaks() -> None:
    class Gone:
        def add(self, *_: object) -> int:
            raise distributed.DistNetworkError("connection reset")

    assert all_of(2, Gone())[1].claim_last_word()


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def second_of_two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
            monkeypatch.setenv(name, value)
        self.store = distributed.HashStore()
        monkeypatch.setattr(distributed, "rendezvous", lambda *_: iter([(self.store, 1, 2)]))
        monkeypatch.setattr("gradsafe._io.processes.GRACE", 0.0)

    def claimed_before(self) -> None:
        self.store.add("gradsafe/claim/last word", 1)

    def test_needs_a_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        status = main(["detect", "--model", "m", "--method", "nll", "gone.jsonl"])
        assert status == 2
        assert capsys.readouterr().err == (
            "gradsafe: error: -o FILE is needed under torchrun: each process writes a part of it\n"
        )

    def test_half_an_environment_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.undo()
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        assert main(["detect", "--model", "m", "--method", "nll", "gone.jsonl"]) == 2
        err = capsys.readouterr().err
        assert "MASTER_ADDR expected" in err
        assert err.count("\n") == 1

    def test_not_every_command_runs_in_several(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor"]) == 2
        assert "start it without torchrun" in capsys.readouterr().err

    def test_whoever_comes_second_is_silent(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.claimed_before()
        assert main(["detect", "--model", "m", "--method", "nll", "gone.jsonl"]) == 1
        assert main(["detect", "--bad"]) == 1
        with pytest.raises(SystemExit):
            main(["detect", "--help"])
        assert capsys.readouterr() == ("", "")

    def test_usage_and_help_come_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["detect", "--bad"]) == 2
        assert "error:" in capsys.readouterr().err
