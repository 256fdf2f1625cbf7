"""Runs an application until SIGTERM or SIGINT; every accepted request is answered first."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 2048  # connections that the system holds until the server takes them
# Requests that are on their way when the server is told to stop are answered: it takes connections
# for some time, and waits some time for requests over those that it has (seconds).
LAST_CONNECTIONS, LAST_REQUESTS = 0.2, 1.0


def bind(host: str, port: int, *, public: bool) -> socket.socket:
    """Binds an address, before the long work of loading a model; `run` listens.

    Args:
        host: Name or address.
        port: Port; 0 for a free one.
        public: Whether addresses that other machines reach are allowed.

    Raises:
        ValueError: There is no such host, the address is in use, is not one of this machine, or
            is reached by others although `public` is false.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host}: no such host ({error})") from error
    family, kind, protocol, _, address = found[0]
    if not public and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ValueError(
            f"--host {host} is reached by other machines: set API keys in the environment variable "
            "GRADSAFE_API_KEYS (separated by commas), or give --open to serve everyone"
        )
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _explained(f"--host {host} --port {port}"):
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    return bound


def url(bound: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(bound: socket.socket) -> None:
    """Accepts connections from now on; they wait until `run`.

    Raises:
        ValueError: Another program took the address since `bind`.
    """
    with _explained(url(bound)):
        bound.listen(BACKLOG)


def run(app: Any, listening: socket.socket, *, timeout: float, max_connections: int) -> None:
    """Serves until SIGTERM, after which it accepts nothing and answers what it has accepted.

    Args:
        app: ASGI application.
        listening: Result of `bind`, after `listen`.
        timeout: Seconds that a client has for the headers of a request.
        max_connections: Connections at a time; more are answered with 503.

    Raises:
        KeyboardInterrupt: After SIGINT, when everything is answered.
    """
    config = uvicorn.Config(
        app,
        http=_protocol(timeout),
        ws="none",
        lifespan="on",
        log_config=None,  # the job's own logging
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=max_connections + 1,  # uvicorn counts the one that asks
        backlog=BACKLOG,
    )
    # uvicorn raises the signal again when it is done: SIGTERM is the usual end, not a failure.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "another program uses this address: choose another --port",
            errno.EADDRNOTAVAIL: "this machine has no such address: choose another --host",
            errno.EACCES: "a port below 1024 needs rights: choose another --port",
        }.get(error.errno or 0, str(error))
        raise ValueError(f"{where}: {reason}") from error


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # The loop takes all connections that the system holds: closing the socket resets them.
        await asyncio.sleep(LAST_CONNECTIONS)
        await super().shutdown(sockets)


def _protocol(timeout: float) -> type[H11Protocol]:
    class TimedHeaders(H11Protocol):
        """Closes connections that do not send the headers of a request in time.

        When the server stops, a connection without a request may still send one: closing at once
        would reset requests that are on their way.
        """

        _expiry: asyncio.TimerHandle | None = None
        _stopping = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._stopping:
                self._make_last()

        def shutdown(self) -> None:
            self._stopping = True
            self._make_last()
            self.loop.call_later(LAST_REQUESTS, self._end)

        def _make_last(self) -> None:
            """The answer tells the client that the connection ends with it."""
            if self.cycle is not None and self.cycle.keep_alive:
                self.cycle.keep_alive = False
                self.headers.append((b"connection", b"close"))  # of the request: uvicorn copies it

        def _end(self) -> None:
            if not self.transport.is_closing():
                super().shutdown()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._cancel()

        def _expect_headers(self) -> None:
            self._cancel()
            self._expiry = self.loop.call_later(timeout, self._expire)

        def _cancel(self) -> None:
            if self._expiry is not None:
                self._expiry.cancel()

        def _expire(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return TimedHeaders
