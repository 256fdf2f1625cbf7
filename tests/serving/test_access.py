"""Keys and token buckets."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="part of the extra `serve`")

from gradsafe._jobs.serve import api_keys
from gradsafe.serving.access import ApiError, Keys, TokenBucket
from gradsafe.serving.config import ServeConfig


def test_a_key_is_found_in_both_headers_and_nowhere_else() -> None:
    keys = Keys(["first", "second"])
    assert keys.caller([(b"authorization", b"Bearer first")]) == 0
    assert keys.caller([(b"authorization", b"bearer  second")]) == 1
    assert keys.caller([(b"x-api-key", b"second")]) == 1
    for headers in (
        [],
        [(b"authorization", b"Basic first")],
        [(b"authorization", b"first")],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"firs")],
        [(b"x-api-key", b"first,second")],
        [(b"cookie", b"first")],
    ):
        with pytest.raises(ApiError) as caught:
            keys.caller(headers)
        assert caught.value.status == 401
        assert "first" not in str(caught.value.body)
    assert Keys([]).caller([]) == 0


def test_a_bucket_holds_the_burst_and_fills_at_the_rate() -> None:
    now = 100.0
    bucket = TokenBucket(2.0, 5, clock=lambda: now)
    assert bucket.spend(5) == 0
    assert bucket.spend(3) == 1.5
    now += 1.0
    assert bucket.spend(3) == 0.5  # a refusal costs nothing
    now += 0.5
    assert bucket.spend(3) == 0
    now += 1000
    assert bucket.spend(5) == 0
    assert bucket.spend(1) == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", []), (" ", []), ("one", ["one"]), (" one , two", ["one", "two"])],
)
def test_keys_of_the_environment(text: str, expected: list[str]) -> None:
    assert api_keys(text) == expected


@pytest.mark.parametrize("text", ["one,", ",", "one,one", "a b", "schlüssel", "a\x00b"])
def test_bad_keys_are_refused_without_showing_them(text: str) -> None:
    with pytest.raises(ValueError, match="GRADSAFE_API_KEYS: ") as caught:
        api_keys(text)
    shown = str(caught.value)
    assert "one" not in shown
    assert "schl" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_wait_ms": -1.0}, "max_wait_ms"),
        ({"timeout": 0.0}, "timeout > 0"),
        ({"max_queue": 10}, "max_prompts <= max_queue"),
        ({"rate": 0.0}, "rate > 0"),
        ({"burst": 100}, "with rate"),
        ({"rate": 1.0, "burst": 2}, "burst >= max_prompts"),
        ({"name": ""}, "a name"),
        ({"rate": float("nan")}, "finite"),
    ],
)
def test_limits_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig(**options)  # type: ignore[arg-type]
