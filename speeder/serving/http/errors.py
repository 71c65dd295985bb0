"""Every error in one form: which field, what was expected, what was received."""

import logging
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)

_SHOWN = 80  # characters of the received value that a message repeats
_BODY_ITSELF = "body"


class Problem(BaseModel):
    """One mistake in a request, or the reason why it could not be served."""

    field: str
    expected: str
    got: str
    message: str


class Problems(BaseModel):
    """The body of every response with status 400 or above."""

    errors: list[Problem]


class ApiError(Exception):
    """Ends a request with a status and one problem."""

    def __init__(
        self, status: int, field: str, expected: str, got: object, headers: dict[str, str] | None = None
    ):
        super().__init__(f"{field}: expected {expected}, got {shown(got)}")
        self.status, self.headers = status, headers
        self.problem = Problem(field=field, expected=expected, got=shown(got), message=str(self))

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return _answer(self.status, [self.problem], self.headers)


def shown(value: object) -> str:
    """A value for a message: text as it is, else its representation, cut to `_SHOWN` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of an application in the same form."""

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [_problem(entry) for entry in error.errors()[:10]]
        if [problem.field for problem in problems] == [_BODY_ITSELF] and not _says_json(request):
            # the framework reads such a body as text, whatever it holds
            got = request.headers.get("content-type", "no such header")
            return ApiError(422, "content-type header", "application/json", got).response()
        return _answer(422, problems)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # JSON that the parser gives up on, such as one nested too deep
            return ApiError(400, _BODY_ITSELF, "JSON", "something that is not JSON").response()
        what = f"{request.method} {request.url.path}"
        expected = {404: "a path of this server", 405: "another method"}.get(error.status_code, "")
        message = f"{shown(what)}: {error.detail}"
        problem = Problem(field="path", expected=expected, got=shown(what), message=message)
        return _answer(error.status_code, [problem], error.headers)


def _says_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def failed(path: str, error: BaseException) -> JSONResponse:
    """A bug of the server: the response has a number, and the log has the traceback under it."""
    number = uuid.uuid4().hex[:12]
    log.error("%s failed (%s)", path, number, exc_info=error)
    message = f"the server failed; see its log under {number}"
    return _answer(500, [Problem(field="server", expected="an answer", got="a fault", message=message)])


def _problem(entry: dict[str, Any]) -> Problem:
    """One of pydantic's errors in this server's form."""
    where, kind = list(entry["loc"]), entry["type"]
    if where and where[0] in ("body", "query", "path"):
        where = where[1:]
    expected = entry["msg"].removeprefix("Value error, ")
    for start in ("Input should be ", "Input should have "):
        expected = expected.removeprefix(start)
    got = shown(entry.get("input"))
    if kind == "json_invalid":
        where, expected, got = [], "JSON", f"something else ({entry.get('ctx', {}).get('error', '')})"
    elif kind == "missing":
        expected, got = "a value", "nothing"
    elif kind == "extra_forbidden":
        expected = "no such field"
    elif kind in ("too_long", "too_short", "string_too_long", "string_too_short"):
        size = entry["ctx"].get("actual_length", len(entry["input"] or ""))
        unit = "characters" if kind.startswith("string") else "entries"
        bound = entry["ctx"].get("max_length", entry["ctx"].get("min_length"))
        expected = f"at {'most' if kind.endswith('long') else 'least'} {bound} {unit}"
        got = f"{size} {unit}"
    field = ".".join(map(str, where)) or _BODY_ITSELF
    return Problem(
        field=field, expected=expected, got=got, message=f"{field}: expected {expected}, got {got}"
    )


def _answer(status: int, problems: list[Problem], headers: dict[str, str] | None = None) -> JSONResponse:
    # JSON may contain lone surrogates, which UTF-8 cannot encode
    encodable = [
        {key: text.encode(errors="replace").decode() for key, text in problem} for problem in problems
    ]
    return JSONResponse({"errors": encodable}, status, headers)
