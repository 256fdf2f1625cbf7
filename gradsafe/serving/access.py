"""Who may send what: API keys, token buckets, and limits on the size and time of a request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from gradsafe.serving.config import OPEN_ROUTES, ServeConfig

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CALLER = "gradsafe.caller"  # number of the API key in a request's scope


class ApiError(Exception):
    """An answer with an error in OpenAI's format.

    Args:
        status: HTTP status.
        message: For the user; never the text of a prompt.
        code: Short name for programs.
        param: Field of the request.
        retry_after: Seconds until another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {
                "message": message,
                "type": "server_error" if status >= 500 else "invalid_request_error",
                "param": param,
                "code": code,
            }
        }
        self.retry_after = retry_after

    def response(self, *, close: bool = False) -> JSONResponse:
        """The answer; `close` ends the connection, for a request that was not read to its end."""
        headers = {"Connection": "close"} if close else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return JSONResponse(self.body, self.status, headers)


class Keys:
    """API keys, compared in a time that does not tell how much of a key is right.

    Args:
        keys: The keys; without one every request is accepted, as that of one caller.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def caller(self, headers: Sequence[tuple[bytes, bytes]]) -> int:
        """The number of the key in `Authorization: Bearer` or `x-api-key`.

        Raises:
            ApiError: No key, or a wrong one (401).
        """
        if not self._digests:
            return 0
        given = dict(headers)  # names are lower case
        kind, _, bearer = given.get(b"authorization", b"").partition(b" ")
        key = bearer.strip() if kind.lower() == b"bearer" else given.get(b"x-api-key", b"")
        digest, found = _digest(key), None
        for number, known in enumerate(self._digests):  # all of them, whichever is right
            if hmac.compare_digest(digest, known):
                found = number
        if found is None:
            raise ApiError(
                401,
                "no valid API key: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'",
                "invalid_api_key",
            )
        return found


class TokenBucket:
    """Prompts that one caller may spend: `rate` per second, `burst` at once.

    Used by the event loop's thread only.
    """

    def __init__(
        self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate, self.burst, self._clock = rate, burst, clock
        self._left, self._then = float(burst), clock()

    def spend(self, count: int) -> float:
        """Takes `count` tokens; returns 0, or the seconds after which so many will be there."""
        now = self._clock()
        self._left = min(self.burst, self._left + (now - self._then) * self.rate)
        self._then = now
        if count > self._left:
            return (count - self._left) / self.rate
        self._left -= count
        return 0.0


class Gate:
    """Middleware: checks the key, then reads the body within its limits, and passes both on.

    Args:
        app: What answers.
        keys: The API keys.
        config: The limits.
    """

    def __init__(self, app: App, keys: Keys, config: ServeConfig) -> None:
        self.app, self.keys, self.config = app, keys, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if scope["path"] not in OPEN_ROUTES:
                scope[CALLER] = self.keys.caller(scope["headers"])
            body = await self._body(dict(scope["headers"]), receive)
        except ApiError as error:
            await error.response(close=True)(scope, receive, send)
            return
        if body is None:  # the client is gone
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The body; None if the client closed the connection before its end."""
        limit, seconds = self.config.max_body, self.config.timeout
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        body, deadline = bytearray(), time.monotonic() + seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError as error:
                text = f"the body of the request did not arrive within {seconds:g} seconds"
                raise ApiError(408, text, "request_timeout") from error
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
            if not message.get("more_body", False):
                return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body of the request exceeds {limit} bytes", "request_too_large")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
