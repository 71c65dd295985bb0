"""Running the application: one process, until it is stopped."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from speeder.errors import SpeederError
from speeder.serving.http.limits import Limits
from speeder.serving.http.protocol import bounded_protocol

BACKLOG = 512  # connections that the system holds until they are accepted


class Server(uvicorn.Server):
    """uvicorn's server, with two differences. On SIGTERM /readyz answers 503 first, and the server stops `drain_s`
    later. A server that was stopped by a signal ends with status 0."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, started: Callable[[], None]):
        super().__init__(config)
        self._app, self._on_start = app, started
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again, self._app.state.draining = self._app.state.draining, True
        # a second signal, Ctrl-C, or nothing to drain yet
        if again or sig == signal.SIGINT or self._loop is None:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(
            self._loop.call_later, self._app.state.limits.drain_s, setattr, self, "should_exit", True
        )


def build_server(app: FastAPI, started: Callable[[], None]) -> Server:
    """A server for an application; it calls `started` once it accepts requests."""
    limits: Limits = app.state.limits
    config = uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        timeout_graceful_shutdown=max(1, round(limits.deadline_s)),
        timeout_keep_alive=75,  # longer than a reverse proxy's, which then never uses a connection just closed
        backlog=BACKLOG,
        server_header=False,
        access_log=False,
        log_level="warning",
        ws="none",
    )
    return Server(config, app, started)


def serve(
    app: FastAPI, host: str = "127.0.0.1", port: int = 8000, say: Callable[[str], None] = print
) -> None:
    """Serve an application until SIGTERM or SIGINT; accepted requests are answered first.

    Args:
        port: 0 takes a free one.
        say: called with the address once requests are accepted, and again once the server has stopped.

    Raises:
        SpeederError: the application could not start. OSError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=BACKLOG) as sock:
        address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
        server = build_server(app, lambda: say(f"{address} takes requests; Ctrl-C or SIGTERM stops it"))
        server.run(sockets=[sock])
    if not server.started:
        raise SpeederError("serve: the server could not start; see above")
    say("stopped")
