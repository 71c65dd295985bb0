"""Limits of connections: their number, the size and time of a request's head, and the time that a client may not read.

uvicorn limits none of these by itself. It keeps heads of any size, and a connection that sends nothing or reads nothing
stays for ever. At `limit_concurrency` it refuses every connection, even those that were open before.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from speeder.serving.http.limits import Limits

MAX_HEAD = (
    64 * 1024
)  # bytes of a request's line and headers, and of the data received together with their end


def bounded_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The class of a server's connections."""

    class Bounded(HttpToolsProtocol):
        _head = 0  # bytes of a head that is not complete; -1 from its end to the end of the body
        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _answering = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self.app = service_unavailable
            self._expect_head(limits.deadline_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect_head(None)
            self._expect_reader(None)
            if self._answering is not None:  # of several requests, uvicorn informs only the newest
                self._answering.disconnected = True
                self._answering.message_event.set()
            super().connection_lost(exc)

        def _start_asgi_task(self, cycle, app) -> None:
            self._answering = cycle
            super()._start_asgi_task(cycle, app)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._expect_reader(limits.deadline_s)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._expect_reader(None)

        def data_received(self, data: bytes) -> None:
            if self._head >= 0:
                self._head += len(data)
            super().data_received(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self._refuse(f"A request's head may have {MAX_HEAD} bytes.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect_head(limits.deadline_s)

        def on_headers_complete(self) -> None:
            self._head = -1
            self._expect_head(None)
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._head = 0
            super().on_message_complete()

        def _expect_head(self, seconds: float | None) -> None:
            """Set the time in which the head must be complete; None: no limit."""
            if self._timer is not None:
                self._timer.cancel()
            late = f"A request's head must come within {limits.deadline_s:g} s."
            self._timer = None if seconds is None else self.loop.call_later(seconds, self._refuse, late)

        def _expect_reader(self, seconds: float | None) -> None:
            """Set the time in which the client must read; None: no limit."""
            if self._unread is not None:
                self._unread.cancel()
            self._unread = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

        def _refuse(self, reason: str) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response(reason)
            else:  # an earlier request is being answered
                self.transport.close()

    return Bounded
