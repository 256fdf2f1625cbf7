"""The routes: OpenAI's moderation endpoint, LiteLLM's generic guardrail, health and metrics."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from gradsafe.detection.calibration import FLOAT32_MAX
from gradsafe.detection.detector import Detector
from gradsafe.models.encode import ContextOverflowError
from gradsafe.serving.access import CALLER, ApiError, Gate, Keys, TokenBucket
from gradsafe.serving.batching import Batcher, Outcome, QueueFullError, UnscorableError
from gradsafe.serving.config import MOST, ServeConfig
from gradsafe.serving.guard import DriftMonitor
from gradsafe.serving.metrics import Measured, Metrics

CATEGORY = "unsafe"
BLOCKED_REASON = "The request was flagged as unsafe."  # without the score: attackers would climb it

log = logging.getLogger("gradsafe.serve")


Texts = Annotated[list[str], Field(max_length=MOST)]


class Part(BaseModel):
    """A part of an input of several types; only text is scored."""

    type: str
    text: str | None = None


class ModerationRequest(BaseModel):
    """The body of `POST /v1/moderations`: a text, several texts, or the parts of one input."""

    input: str | Texts | Annotated[list[Part], Field(max_length=MOST)]
    model: str | None = None


class GuardrailRequest(BaseModel):
    """What gradsafe reads of a request of LiteLLM's generic guardrail."""

    input_type: Literal["request", "response"]
    texts: Texts | None = None
    images: Texts | None = None


class Service:
    """Scores the prompts of requests against the detector's threshold."""

    def __init__(self, detector: Detector, config: ServeConfig, keys: Keys) -> None:
        calibration = detector.calibration
        if calibration is None or not calibration.quantiles:
            raise ValueError("gradsafe.serve: expected a calibrated detector")
        self.config, self.threshold = config, calibration.threshold
        self.metrics = Metrics()
        self.drift = DriftMonitor(calibration, config.drift_scores)
        self.batcher = Batcher(
            detector,
            batch_tokens=config.batch_tokens,
            max_wait=config.max_wait_ms / 1000,
            max_queue=config.max_queue,
            observe=self.metrics.batches.observe,
        )
        self.metrics.watch(self.batcher, self.drift)
        self.buckets: list[TokenBucket] = []
        if config.rate is not None:
            burst = config.burst or max(round(config.rate), config.max_prompts)
            self.buckets = [TokenBucket(config.rate, burst) for _ in range(max(1, len(keys)))]

    async def scores(self, request: Request, prompts: Sequence[str]) -> list[float]:
        """The scores of the prompts of one request.

        Raises:
            ApiError: Too many or too long prompts, one that has no score, a spent bucket, a full
                queue, or a failure of the model.
        """
        self._check(prompts)
        if self.buckets and (seconds := self.buckets[request.scope[CALLER]].spend(len(prompts))):
            text = f"more than {self.config.rate:g} prompts per second"
            raise ApiError(429, text, "rate_limit_exceeded", retry_after=seconds)
        try:
            found = await self.batcher.score(prompts)
        except QueueFullError as error:
            raise ApiError(503, "the queue is full", "overloaded", retry_after=1) from error
        scores = [item for item in found if not isinstance(item, Exception)]
        flagged = sum(score > self.threshold for score in scores)
        self.drift.add(scores)
        counts = {"flagged": flagged, "passed": len(scores) - flagged}
        for outcome, count in (*counts.items(), ("failed", len(found) - len(scores))):
            self.metrics.prompts.labels(outcome).inc(count)
        self._log(request, prompts, found)
        for index, item in enumerate(found):
            if isinstance(item, Exception):
                raise _refusal(item, index)
        return scores

    def _check(self, prompts: Sequence[str]) -> None:
        limits = self.config
        if not 1 <= len(prompts) <= limits.max_prompts:
            text = f"expected 1 to {limits.max_prompts} prompts, got {len(prompts)}"
            raise ApiError(400, text, "invalid_input", param="input")
        for index, prompt in enumerate(prompts):
            if len(prompt) > limits.max_chars:
                text = f"input[{index}] has {len(prompt)} characters, at most {limits.max_chars}"
                raise ApiError(400, text, "string_above_max_length", param=f"input[{index}]")

    def _log(self, request: Request, prompts: Sequence[str], found: Sequence[Outcome]) -> None:
        if self.config.log_prompts:
            rows = [
                {"prompt": prompt, "score": None if isinstance(item, Exception) else item}
                for prompt, item in zip(prompts, found, strict=True)
            ]
            log.info("%s %s", request.url.path, json.dumps(rows))
        for item in found:
            # Only the class: the message of an unknown error could quote a prompt.
            if isinstance(item, Exception) and not isinstance(item, (TypeError, ValueError)):
                log.error("%s: the model failed: %s", request.url.path, type(item).__name__)


def create_app(detector: Detector, config: ServeConfig, keys: Sequence[str] = ()) -> FastAPI:
    """Makes the ASGI application of one detector.

    Args:
        detector: Calibrated.
        config: Its limits.
        keys: API keys; none accepts every request.

    Raises:
        ValueError: The detector is not calibrated.
    """
    accepted = Keys(keys)
    service = Service(detector, config, accepted)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.batcher.close()

    app = FastAPI(title="gradsafe", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, keys=accepted, config=config)
    app.add_middleware(Measured, metrics=service.metrics)  # the last one is the outermost

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()  # the "input" of one would be the prompt
        first = next((e for e in errors if e["type"] == "too_long"), errors[0])
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not valid JSON", "invalid_json").response()
        name, *tried = first["loc"][1:] or ("body",)  # the types of an input
        text = f"{name}: {first['msg']}"
        if name == "input" and tried and first["type"] != "too_long":
            text = "input: expected a text, a list of texts, or a list of parts with text"
        if name == "body" and "json" not in request.headers.get("content-type", ""):
            text = "the body must be a JSON object, sent with Content-Type: application/json"
        param = None if name == "body" else str(name)
        return ApiError(400, text, "invalid_request", param=param).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return ApiError(error.status_code, str(error.detail), code).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error", "internal_error").response()

    @app.post("/v1/moderations")
    async def moderations(body: ModerationRequest, request: Request) -> dict[str, Any]:
        if body.model not in (None, config.name):
            text = f"no model of this name; this server has {config.name!r}"
            raise ApiError(404, text, "model_not_found", param="model")
        scores = await service.scores(request, _inputs(body.input))
        return {
            "id": f"modr-{secrets.token_hex(12)}",
            "model": config.name,
            "results": [_result(score, service.threshold) for score in scores],
        }

    @app.post("/beta/litellm_basic_guardrail_api")
    async def guardrail(body: GuardrailRequest, request: Request) -> dict[str, Any]:
        if body.input_type == "response":
            text = "this guardrail scores prompts, not responses: use mode pre_call or during_call"
            raise ApiError(400, text, "unsupported_input_type", param="input_type")
        if body.images:
            text = "this guardrail scores text and cannot pass images"
            raise ApiError(400, text, "unsupported_input", param="images")
        texts = [text for text in body.texts or () if text]
        scores = await service.scores(request, texts) if texts else []
        if any(score > service.threshold for score in scores):
            return {"action": "BLOCKED", "blocked_reason": BLOCKED_REASON}
        return {"action": "NONE"}

    @app.get("/health")
    async def health() -> Response:
        ready = service.batcher.alive
        return JSONResponse({"live": True, "ready": ready}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _inputs(given: str | list[str] | list[Part]) -> list[str]:
    """The prompts of a moderation request; parts are one prompt."""
    if isinstance(given, str):
        return [given]
    texts = [item for item in given if isinstance(item, str)]
    parts = [item for item in given if isinstance(item, Part)]
    if not parts:
        return texts
    for index, part in enumerate(parts):
        if part.type != "text" or part.text is None:
            text = f"input[{index}]: only parts of type 'text' can be scored, with a text"
            raise ApiError(400, text, "unsupported_input", param=f"input[{index}]")
    return ["\n".join(part.text or "" for part in parts)]


def _result(score: float, threshold: float) -> dict[str, Any]:
    finite = max(-FLOAT32_MAX, min(FLOAT32_MAX, score))  # JSON has no infinity
    return {
        "flagged": score > threshold,
        "categories": {CATEGORY: score > threshold},
        "category_scores": {CATEGORY: finite},
        "category_applied_input_types": {CATEGORY: ["text"]},
    }


def _refusal(error: Exception, index: int) -> ApiError:
    """The answer for a prompt that has no score."""
    param = f"input[{index}]"
    if isinstance(error, ContextOverflowError):
        return ApiError(400, str(error), "context_length_exceeded", param=param)
    if isinstance(error, UnscorableError):
        return ApiError(422, f"{param} cannot be scored: {error}", "unscorable", param=param)
    if isinstance(error, (TypeError, ValueError)):
        return ApiError(400, str(error), "invalid_input", param=param)
    return ApiError(500, "the model failed on this request", "model_failed")
