"""The server as its clients see it: right answers, limits, and an end that loses nothing."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from server_process import Server, httpx, serving

from gradsafe import Detector

KEY = {"authorization": "Bearer right-key"}


def connect(server: Server) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


def head(path: str = "/v1/moderations", length: int = 2, **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json"]
    lines += [f"Content-Length: {length}", *(f"{k}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while block := connection.recv(65536):
        found += block
    return found


def error_of(response: object) -> dict[str, str]:
    error = response.json()["error"]  # type: ignore[attr-defined]
    assert set(error) == {"message", "type", "param", "code"}
    return error


class TestAnswers:
    def test_texts_lists_and_parts(self, server: Server, detector: Detector) -> None:
        texts = ["How do I bake a cake?", "How can I poison my neighbour?"]
        expected = detector.score(texts, progress=False).values.tolist()
        answer = server.moderate(texts).json()
        scores = [result["category_scores"]["unsafe"] for result in answer["results"]]
        assert scores == pytest.approx(expected, abs=1e-6)
        for result, score in zip(answer["results"], expected, strict=True):
            assert (
                result["flagged"] == result["categories"]["unsafe"] == (score > detector.threshold)
            )
        assert answer["model"] == "gradsafe"
        assert answer["id"].startswith("modr-")
        (one,) = server.moderate(texts[1]).json()["results"]
        assert one["category_scores"]["unsafe"] == pytest.approx(expected[1], abs=1e-6)
        parts = [{"type": "text", "text": "How can I"}, {"type": "text", "text": "poison him?"}]
        (joined,) = server.moderate(parts).json()["results"]
        whole = detector.score(["How can I\npoison him?"], progress=False).values.item()
        assert joined["category_scores"]["unsafe"] == pytest.approx(whole, abs=1e-6)

    def test_200_concurrent_requests_get_the_scores_of_the_detector(
        self, server: Server, detector: Detector, prompts: list[str]
    ) -> None:
        before = server.metric("gradsafe_batch_prompts_count")
        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(server.moderate, prompts))
        assert [answer.status_code for answer in answers] == [200] * 200
        results = [answer.json()["results"][0] for answer in answers]
        expected = detector.score(prompts, progress=False).values
        scores = [result["category_scores"]["unsafe"] for result in results]
        assert scores == pytest.approx(expected.tolist(), abs=1e-6)
        flags = detector.flag(prompts, progress=False).tolist()
        assert [result["flagged"] for result in results] == flags
        assert 0 < sum(flags) < 200
        assert server.metric("gradsafe_batch_prompts_count") - before < 100  # they shared batches
        assert server.metric("gradsafe_queue_prompts") == 0
        assert server.metric("gradsafe_accepted_prompts") == 0
        assert server.metric("gradsafe_score_drift_scores") >= 200
        assert server.metric("gradsafe_score_drift_psi") > 0.25  # half of them are unsafe
        route = 'gradsafe_requests_total{route="/v1/moderations",status="200"}'
        assert server.metric(route) >= 200

    def test_a_prompt_that_fails_fails_alone(self, server: Server, prompts: list[str]) -> None:
        long = "word " * 2000
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(server.moderate, [*prompts[:10], long, *prompts[10:19]]))
        codes = [answer.status_code for answer in answers]
        assert codes == [200] * 10 + [400] + [200] * 9
        assert error_of(answers[10])["code"] == "context_length_exceeded"
        error = error_of(server.moderate([prompts[0], long]))
        assert (error["param"], "input[1]" in error["message"]) == ("input[1]", True)

    def test_health_and_schema(self, server: Server) -> None:
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 200
        assert health.json() == {"live": True, "ready": True}
        paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
        assert "/v1/moderations" in paths


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "code"),
        [
            (b"{", "invalid_json"),
            (b"", "invalid_request"),
            (b"\xff\xfe{}", None),
            (b"[" * 100_000, None),
            (b"{}", "invalid_request"),
            (b'{"input": 5}', "invalid_request"),
            (b'{"input": []}', "invalid_input"),
            (b'{"input": ""}', "invalid_input"),
            (b'{"input": ["a", ""]}', "invalid_input"),
            (b'{"input": "\\ud800"}', None),
            (b'{"input": [{"type": "image_url", "image_url": {"url": "x"}}]}', "unsupported_input"),
            (b'{"input": "%s"}' % (b"x" * 60_000), "string_above_max_length"),
            (json.dumps({"input": ["x"] * 65}).encode(), "invalid_input"),
            (json.dumps({"input": [1] * 300_000}).encode(), "invalid_request"),
        ],
        ids=lambda value: repr(value)[:32],
    )
    def test_a_bad_body_is_a_400(self, server: Server, body: bytes, code: str | None) -> None:
        answer = httpx.post(
            f"{server.url}/v1/moderations",
            content=body,
            headers={"content-type": "application/json"},
            timeout=60,
        )
        assert answer.status_code == 400
        error = error_of(answer)
        assert code in (None, error["code"])

    @pytest.mark.parametrize(
        ("sent", "param", "message"),
        [
            ({"json": {"input": ["a", 5]}}, "input", "input: expected a text, a list of texts"),
            ({"json": {"input": ["a"] * 5000}}, "input", "input: List should have at most 4096"),
            ({"json": {"input": 5}}, "input", "input: expected a text, a list of texts"),
            ({"json": {}}, "input", "input: Field required"),
            ({"data": {"input": "a"}}, None, "sent with Content-Type: application/json"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_named(
        self, server: Server, sent: dict[str, Any], param: str | None, message: str
    ) -> None:
        answer = httpx.post(f"{server.url}/v1/moderations", **sent)
        error = error_of(answer)
        assert (answer.status_code, error["param"]) == (400, param)
        assert message in error["message"]

    def test_unknown_models_and_urls_are_404(self, server: Server) -> None:
        body = {"input": "hello", "model": "omni-moderation-latest"}
        answer = httpx.post(f"{server.url}/v1/moderations", json=body)
        assert answer.status_code == 404
        error = error_of(answer)
        assert error["code"] == "model_not_found"
        assert "'gradsafe'" in error["message"]
        assert error_of(httpx.get(f"{server.url}/v2"))["code"] == "unknown_url"
        assert httpx.get(f"{server.url}/v1/moderations").status_code == 405

    def test_10_megabytes_are_refused_while_they_arrive(self, server: Server) -> None:
        body = json.dumps({"input": "x" * 10_000_000}).encode()
        answer = httpx.post(f"{server.url}/v1/moderations", content=body, timeout=60)
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "request_too_large"
        # Without a length, chunk by chunk: the answer comes before the body has an end.
        with connect(server) as connection:
            request = b"POST /v1/moderations HTTP/1.1\r\nHost: test\r\n"
            connection.sendall(request + b"Transfer-Encoding: chunked\r\n\r\n")
            connection.sendall((b"80000\r\n" + b"x" * 0x80000 + b"\r\n") * 3)  # 1.5 MB, no end
            assert status_of(connection.recv(65536)) == 413

    def test_what_is_not_http_is_refused(self, server: Server) -> None:
        with connect(server) as connection:
            connection.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
            assert status_of(read_all(connection)) == 400
        with connect(server) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nA: " + b"a" * 200_000)
            assert status_of(connection.recv(65536)) == 400
        assert server.moderate("hello").status_code == 200

    def test_a_client_that_leaves_does_no_harm(self, server: Server) -> None:
        body = json.dumps({"input": ["hello there"] * 64}).encode()
        for sent in (body, body[:100]):
            with connect(server) as connection:
                connection.sendall(head(length=len(body)) + sent)
        assert server.moderate("hello").status_code == 200
        wait_for(lambda: server.metric("gradsafe_accepted_prompts") == 0)


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def refuses(server: Server) -> bool:
    """Whether it takes no new connection."""
    try:
        connect(server).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.fixture(scope="module")
def limited(model_folder: Path, detector_folder: Path) -> Iterator[Server]:
    limits = ["--timeout", "1", "--max-prompts", "4", "--max-queue", "4"]
    with serving(model_folder, detector_folder, *limits, "--max-wait-ms", "500") as server:
        yield server


class TestLimits:
    def test_slow_clients_are_cut_off_and_do_not_hold_up_others(self, limited: Server) -> None:
        silent, slow_head, slow_body = (connect(limited) for _ in range(3))
        slow_head.sendall(b"POST /v1/moderations HTTP/1.1\r\nHost")
        slow_body.sendall(head(length=100) + b'{"input')
        start = time.monotonic()
        assert limited.moderate("hello").status_code == 200
        for _ in range(3):
            time.sleep(0.1)
            slow_head.sendall(b"x")  # a byte now and then is no progress
            slow_body.sendall(b"x")
        assert status_of(read_all(slow_body)) == 408
        assert read_all(silent) == read_all(slow_head) == b""
        assert time.monotonic() - start < 10

    def test_a_full_queue_is_a_503(self, limited: Server) -> None:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(limited.moderate, [["hello there"] * 4] * 4))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 503, 503, 503]
        full = next(answer for answer in answers if answer.status_code == 503)
        assert error_of(full)["code"] == "overloaded"
        assert full.headers["retry-after"] == "1"
        assert limited.moderate("hello").status_code == 200


def test_keys_rates_and_what_is_logged(model_folder: Path, detector_folder: Path) -> None:
    limits = ["--rate", "0.5", "--burst", "3", "--max-prompts", "2", "--max-queue", "2"]
    with serving(model_folder, detector_folder, *limits, keys="right-key, other-key") as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "right-ke"}):
            answer = server.moderate("hello", **headers)
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.moderate(["a remarkable prompt", "two"], **KEY).status_code == 200
        assert server.moderate("three", **KEY).status_code == 200
        refused = server.moderate(["four", "five"], **KEY)
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 4
        other = {"x-api-key": "other-key"}
        assert server.moderate(["one", "two"], **other).status_code == 200  # a bucket of its own
        time.sleep(int(refused.headers["retry-after"]))
        assert server.moderate(["four", "five"], **KEY).status_code == 200
        assert server.moderate("remarkable " * 3000, **other).status_code == 400
        assert server.stop() == 0
        assert not re.search("right-key|remarkable", "".join(server.lines))


def test_sigterm_under_load_loses_no_accepted_request(
    model_folder: Path, detector_folder: Path, detector: Detector, prompts: list[str]
) -> None:
    options = ["--max-wait-ms", "10000", "--log-prompts"]
    with serving(model_folder, detector_folder, *options) as server:
        with ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(server.moderate, prompt) for prompt in prompts[:16]]
            wait_for(lambda: server.metric("gradsafe_accepted_prompts") == 16)
            partial = connect(server)  # its body arrives after the signal
            body = json.dumps({"input": "hello"}).encode()
            partial.sendall(head(length=len(body)) + body[:5])
            time.sleep(0.2)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            wait_for(lambda: refuses(server))
            partial.sendall(body[5:])
            assert status_of(read_all(partial)) == 200
            answers = [future.result() for future in futures]
            stopping.join()
        assert server.process.returncode == 0
        assert [answer.status_code for answer in answers] == [200] * 16
        expected = detector.score(prompts[:16], progress=False).values.tolist()
        scores = [a.json()["results"][0]["category_scores"]["unsafe"] for a in answers]
        assert scores == pytest.approx(expected, abs=1e-6)
        assert "every accepted request is answered" in server.lines[-1]
        logged = "".join(server.lines)
        assert all(json.dumps(prompt) in logged for prompt in prompts[:16])


def test_no_client_sees_a_broken_answer_when_the_server_stops(
    model_folder: Path, detector_folder: Path
) -> None:
    """Some clients keep their connection, others make a new one for each request."""
    outcomes: Counter[str] = Counter()

    def hammer(server: Server, end: float, keep: bool) -> None:
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < end:
                headers = {} if keep else {"connection": "close"}
                try:
                    answer = client.post(
                        f"{server.url}/v1/moderations", json={"input": "hello"}, headers=headers
                    )
                    outcomes[str(answer.status_code)] += 1
                except httpx.ConnectError:
                    outcomes["refused"] += 1
                    return
                except httpx.HTTPError as error:
                    outcomes[repr(error)] += 1

    with serving(model_folder, detector_folder) as server:
        end = time.monotonic() + 60
        threads = [
            threading.Thread(target=hammer, args=(server, end, number % 2 == 0))
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: outcomes["200"] > 24)
        assert server.stop() == 0
        for thread in threads:
            thread.join()
    assert set(outcomes) == {"200", "refused"}
    assert outcomes["refused"] == 8
