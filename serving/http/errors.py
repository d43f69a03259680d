"""Errors as OpenAI's clients know them."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
from starlette.responses import Response

from serving.engine import QueueFull
from serving.http.schemas import ErrorBody, ErrorDetail
from serving.settings import RequestError

_T = TypeVar("_T")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_FIELD = re.compile(r"^Object (?:contains unknown|missing required) field `([^`]+)`")


class ApiError(Exception):
    """An answer that is none: its status, and what was wrong."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers

    def response(self) -> Response:
        """The answer."""
        return error_response(self.status, str(self), self.param, self.headers)


def error_response(
    status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """An answer in OpenAI's shape."""
    content = msgspec.json.encode(error_body(status, message, param))
    return Response(content, status, headers, media_type="application/json")


def error_body(status: int, message: str, param: str | None = None) -> ErrorBody:
    """What it holds."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorBody(ErrorDetail(message, kind, param, status))


def decoded(content: bytes, kind: type[_T]) -> _T:
    """A body that is what it has to be.

    Raises:
        ApiError: it is not; with the field that is at fault.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        path, field = _PATH.search(message), _FIELD.match(message)
        names = [part for part in ((path and path[1]) or "", (field and field[1]) or "") if part]
        if "unknown field" in message:
            message = f"the field {'.'.join(names)!r} is not supported"
        raise ApiError(400, message, ".".join(names) or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"expected a JSON object: {error}") from None


def as_api_error(error: Exception) -> ApiError:
    """What the engine says of a request, for HTTP."""
    if isinstance(error, RequestError):
        return ApiError(400, str(error), error.param)
    if isinstance(error, QueueFull):
        return ApiError(429, f"too many requests: {error}", headers={"Retry-After": "1"})
    raise error
