"""Threads: passes that change a model's flags run one at a time, and hooks see their own thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gradsafe.models.inspection import unwrapped

Hook = TypeVar("Hook", bound=Callable[..., Any])

_KEY = "gradsafe.thread"
_locks: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread changes this model, whatever wraps it; re-entrant.

    Held for one batch or one call. It covers flags and hooks, not plain forward passes, which may
    run at any time.
    """
    with _guard:
        lock = _locks.setdefault(unwrapped(model), threading.RLock())
    with lock:
        yield


def current_thread() -> int:
    """Identity of this thread; inside a backward pass, of the thread that called `backward`.

    Autograd runs the backward pass of CUDA devices in threads of its own, which all callers share.
    A checkpoint recomputes its forward pass there, and its hooks have to act. So the identity lies
    in torch's own thread-local storage, which autograd carries over from the calling thread (as it
    does grad mode and autocast) for this one backward pass. In threads that do not call autograd
    but run parts of a forward pass (`nn.DataParallel`), hooks do not act.
    """
    if torch._C._is_key_in_tls(_KEY):
        return int(torch._C._get_obj_in_tls(_KEY))
    return threading.get_ident()


def _name_thread() -> None:
    """Put this thread's identity into torch's storage, once in the life of the thread.

    Torch 2.10 to 2.12 store the object without a reference of their own and release one when the
    thread ends. The reference that is added here, and never released, makes up for it.
    """
    if not torch._C._is_key_in_tls(_KEY):
        thread = threading.get_ident()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thread))
        torch._C._stash_obj_in_tls(_KEY, thread)


def own(hook: Hook) -> Hook:
    """The hook of a forward pass, in passes that this thread starts; others see no hook.

    Hooks of the backward pass need no check: they belong to a graph, and so to one pass.
    """
    _name_thread()
    thread = current_thread()

    # Any arguments: torch registers a hook, and only then that it takes keyword arguments.
    def act(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if current_thread() == thread else None

    return act  # type: ignore[return-value]
