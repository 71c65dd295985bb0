"""A micro-batcher: one thread owns the model and runs waiting requests together.

Requests of one kind form a lane. The thread takes whatever waits in a lane, up to its batch size; where the model is
idle, the first request waits a few milliseconds for others. Lanes take turns, so that a long job of one kind cannot
starve the other. A cancelled request leaves the queue, and a request that fails fails alone.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue has no room for another request.

    Attributes:
        retry_after: seconds (int) after which the queue is likely to have room.
    """

    def __init__(self, lane: str, retry_after: int):
        super().__init__(f"{lane}: the queue is full")
        self.retry_after = retry_after


class Closed(Exception):
    """The batcher is closed and accepts no more requests."""


class Observer(Protocol):
    """Receives the size and the time of every batch."""

    def batch(self, lane: str, size: int, seconds: float) -> None:
        """A batch of this many requests took this many seconds."""


@dataclass
class Lane:
    """One kind of request.

    Attributes:
        name: for messages and metrics.
        run: takes requests and returns as many results, in order; called only in the batcher's thread.
        max_batch: requests per batch.
        capacity: requests that may wait.
        max_wait: seconds that the first request waits for others.
    """

    name: str
    run: Callable[[list[Any]], Sequence[Any]]
    max_batch: int
    capacity: int
    max_wait: float = 0.0
    waiting: deque[_Ticket] = field(default_factory=deque, init=False)
    batch_seconds: float = field(default=0.0, init=False)  # a moving average

    def retry_after(self) -> int:
        """Estimated seconds until the waiting requests have run, rounded up; at least 1."""
        batches = math.ceil(len(self.waiting) / self.max_batch)
        return max(1, math.ceil(batches * self.batch_seconds))


@dataclass(eq=False)
class _Ticket:
    job: Any
    since: float
    future: Future


class Batcher:
    """Runs the requests of several lanes in one thread.

    `submit` may be called from any thread; `start` and `close` are for the owner of the batcher.
    """

    def __init__(self, lanes: Sequence[Lane], observer: Observer | None = None):
        self._lanes = {lane.name: lane for lane in lanes}
        self._turns = deque(lanes)
        self._observer = observer
        self._changed = threading.Condition()
        self._closing = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="speeder-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout: float | None = None) -> bool:
        """Accept no more requests, run the waiting ones, and end the thread; False if that took too long."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def healthy(self, stuck_after: float) -> bool:
        """Whether the thread is alive, and its current batch started at most this many seconds ago."""
        since = self._busy_since
        return self._thread.is_alive() and (since is None or time.monotonic() - since <= stuck_after)

    def depth(self, lane: str) -> int:
        """How many requests wait in a lane."""
        return len(self._lanes[lane].waiting)

    def submit(self, lane: str, job: Any) -> Future:
        """Queue a request; cancelling the future removes it from the queue.

        Returns:
            a future of its result, or of what the lane's `run` raised for it.

        Raises:
            QueueFull: too many requests wait. Closed: the batcher is closed.
        """
        chosen, ticket = self._lanes[lane], _Ticket(job, time.monotonic(), Future())
        with self._changed:
            if self._closing:
                raise Closed(f"{lane}: the server is stopping")
            if len(chosen.waiting) >= chosen.capacity:
                raise QueueFull(lane, chosen.retry_after())
            chosen.waiting.append(ticket)
            self._changed.notify_all()
        ticket.future.add_done_callback(
            lambda future: self._leave(chosen, ticket) if future.cancelled() else None
        )
        return ticket.future

    def _leave(self, lane: Lane, ticket: _Ticket) -> None:
        with self._changed:
            if ticket in lane.waiting:  # else it was taken in the meantime, and is skipped there
                lane.waiting.remove(ticket)

    # ---- in the thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            lane, tickets = taken
            tickets = [ticket for ticket in tickets if ticket.future.set_running_or_notify_cancel()]
            if not tickets:
                continue
            self._busy_since = started = time.monotonic()
            self._run(lane, tickets)
            self._busy_since, seconds = None, time.monotonic() - started
            lane.batch_seconds = (
                seconds if not lane.batch_seconds else 0.8 * lane.batch_seconds + 0.2 * seconds
            )
            if self._observer is not None:
                self._observer.batch(lane.name, len(tickets), seconds)

    def _take(self) -> tuple[Lane, list[_Ticket]] | None:
        """The next batch; None once the batcher is closed and nothing waits."""
        with self._changed:
            while True:
                lane = next((lane for lane in self._turns if lane.waiting), None)
                if lane is None:
                    if self._closing:
                        return None
                    self._changed.wait()
                    continue
                left = lane.waiting[0].since + lane.max_wait - time.monotonic()
                if left > 0 and len(lane.waiting) < lane.max_batch and not self._closing:
                    self._changed.wait(left)
                    continue  # what waited may have left
                self._turns.remove(lane)
                self._turns.append(lane)
                return lane, [lane.waiting.popleft() for _ in range(min(len(lane.waiting), lane.max_batch))]

    def _run(self, lane: Lane, tickets: list[_Ticket]) -> None:
        try:
            results = lane.run([ticket.job for ticket in tickets])
            if len(results) != len(tickets):
                raise RuntimeError(f"{lane.name}: expected {len(tickets)} results, got {len(results)}")
        except Exception as error:
            if len(tickets) > 1:  # one of them is the cause; the others shall not suffer for it
                log.warning("%s: a batch of %d failed (%s); each runs alone", lane.name, len(tickets), error)
                for ticket in tickets:
                    self._run(lane, [ticket])
            else:
                tickets[0].future.set_exception(error)
            return
        for ticket, result in zip(tickets, results, strict=True):
            ticket.future.set_result(result)
