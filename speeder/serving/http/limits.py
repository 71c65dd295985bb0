"""The limits of a server: sizes of requests, batches and queues, and times."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from speeder.errors import SpeederError


@dataclass(frozen=True)
class Limits:
    """Limits of one server. All are at least 1, except `batch_wait_ms` and `drain_s`, which may be 0.

    Attributes:
        max_history: items of a posted history; the model reads the newest `config.max_history` of them.
        max_filter: ids in each of a request's `allow` and `deny`, and values of a column in `where`.
        max_k: items recommended per request.
        max_explained: items explained per request.
        max_query: characters of a search query.
        max_results: hits of a search.
        max_body_bytes: bytes of a request's body.
        max_batch: histories per batch.
        batch_wait_ms: milliseconds that the first request of a batch waits for others while the model is idle.
        max_queue: waiting requests for recommendations; further ones get 503.
        max_explain_queue: the same for explanations, which cost as much as a history has items.
        deadline_s: seconds after which a request gets 504. Its head (from its first byte, or from the start of the
            connection) and its body must also arrive within that time. A client that reads nothing of an answer for
            that long is disconnected.
        max_connections: open connections; further ones get 503.
        drain_s: seconds after SIGTERM in which requests are still accepted, while /readyz answers 503.
        stuck_s: seconds that one batch may take before /healthz answers 503.
    """

    max_history: int = 1000
    max_filter: int = 1000
    max_k: int = 100
    max_explained: int = 24
    max_query: int = 200
    max_results: int = 50
    max_body_bytes: int = 64 * 1024
    max_batch: int = 64
    batch_wait_ms: float = 2.0
    max_queue: int = 512
    max_explain_queue: int = 32
    deadline_s: float = 10.0
    max_connections: int = 1000
    drain_s: float = 0.0
    stuck_s: float = 120.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("batch_wait_ms", "drain_s") else 1
            if field.name in ("deadline_s", "stuck_s"):
                least = 0.001
            if not value >= least:
                raise SpeederError(f"{field.name}: expected at least {least:g}, got {value!r}")
            if math.isinf(value):
                raise SpeederError(f"{field.name}: expected a finite number, got {value!r}")
