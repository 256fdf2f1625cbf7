"""The limits of a server. Needs no torch: the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass

from gradsafe._checks import check_fields, refuse

ROUTES = ("/v1/moderations", "/beta/litellm_basic_guardrail_api", "/health", "/metrics")
MOST = 4096  # entries of a list in a request: longer ones are refused before they are checked
LEAST_SCORES = 100  # for a drift that means something
OPEN_ROUTES = ("/health",)  # need no key


@dataclass(frozen=True)
class ServeConfig:
    """How a server answers.

    Attributes:
        name: Name of the model in requests and answers.
        batch_tokens: Padded tokens per batch.
        max_wait_ms: How long a prompt waits for others to share its batch.
        max_queue: Prompts that are accepted and not yet scored; more are answered with 503.
        max_body: Bytes of a request; longer ones are answered with 413.
        max_prompts: Prompts of a request.
        max_chars: Characters of a prompt.
        max_connections: Connections at a time; more are answered with 503.
        timeout: Seconds that a client has for the headers of a request, and for its body.
        rate: Prompts per second and API key; no limit if not given.
        burst: Prompts that a key may spend at once after a pause; by default those of one second,
            and never less than max_prompts.
        drift_scores: Latest scores that are compared with those of the calibration.
        log_prompts: Write the text of prompts to the log.
    """

    name: str = "gradsafe"
    batch_tokens: int = 4096
    max_wait_ms: float = 5.0
    max_queue: int = 1024
    max_body: int = 1 << 20
    max_prompts: int = 64
    max_chars: int = 50_000
    max_connections: int = 512
    timeout: float = 10.0
    rate: float | None = None
    burst: int | None = None
    drift_scores: int = 1000
    log_prompts: bool = False

    def __post_init__(self) -> None:
        check_fields("serve", self)
        if not self.name:
            refuse("serve", "a name", "name=''")
        positive = ("batch_tokens", "max_queue", "max_body", "max_prompts", "max_chars", "timeout")
        for field in (*positive, "max_connections", "rate", "burst"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                refuse("serve", f"{field} > 0", value)
        if self.drift_scores < LEAST_SCORES:
            refuse("serve", f"drift_scores >= {LEAST_SCORES}", self.drift_scores)
        if not 0 <= self.max_wait_ms <= 60_000:
            refuse("serve", "0 <= max_wait_ms <= 60000", self.max_wait_ms)
        if self.max_prompts > MOST:
            refuse("serve", f"max_prompts <= {MOST}", self.max_prompts)
        if self.max_prompts > self.max_queue:
            refuse("serve", "max_prompts <= max_queue", f"{self.max_prompts} > {self.max_queue}")
        if self.burst is not None and (self.rate is None or self.burst < self.max_prompts):
            refuse("serve", "burst >= max_prompts, with rate", self.burst)
