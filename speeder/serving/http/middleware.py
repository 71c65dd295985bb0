"""What every request passes before its route: limits of the body, security headers, metrics."""

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from speeder.serving.http.errors import ApiError, failed
from speeder.serving.http.limits import Limits
from speeder.serving.http.metrics import Metrics

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'{style}; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Gate:
    """ASGI middleware. It reads the whole body, within its limits, before the application sees the request."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_security(scope["path"])]
            await send(message)

        self.metrics.in_flight.inc()
        try:
            try:
                body = await self._body(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, send_on)
                return
            if body is not None:  # else the client disconnected
                await self.app(scope, _replay(body, receive), send_on)
        except Exception as error:
            if status != 499:  # the response has begun, and cannot be replaced
                raise
            await failed(scope["path"], error)(scope, receive, send_on)
        finally:
            self.metrics.in_flight.dec()
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.request(_route(scope), method, status, time.perf_counter() - started)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        most = self.limits.max_body_bytes
        expected = f"at most {most} bytes"
        close = {"connection": "close"}  # the rest of the body is not read
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise ApiError(413, "body", expected, f"{int(length)} bytes", close)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.deadline_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise ApiError(413, "body", expected, f"more than {most} bytes", close)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            late = f"a whole body within {self.limits.deadline_s:g} s"
            raise ApiError(408, "body", late, f"{size} bytes", close) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, and then the server's messages, such as a disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _route(scope: Scope) -> str:
    """The route's template: paths are unlimited in number, and must not become labels."""
    route = getattr(scope.get("route"), "path", None)
    if route is None:
        return "static" if "/static/" in scope["path"] else "none"
    return route


def _security(path: str) -> list[tuple[bytes, bytes]]:
    # Swagger UI sets inline styles
    policy = _POLICY.format(style=" 'unsafe-inline'" if path.endswith("/docs") else "")
    headers = {**_HEADERS, "content-security-policy": policy}
    return [(name.encode(), value.encode()) for name, value in headers.items()]
