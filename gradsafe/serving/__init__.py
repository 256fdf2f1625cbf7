"""A detector as a service: moderation and guardrail routes, batches, limits and metrics."""
