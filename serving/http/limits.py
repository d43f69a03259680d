"""What a server on a network needs around its answers: a key, and bounds on what clients may send and how slowly."""

from __future__ import annotations

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.errors import ApiError

PUBLIC = ("/health", "/")  # without a key, too: a supervisor has none, and the page shows nothing by itself


class ApiKey:
    """Lets only those in who send the key, but for ``PUBLIC``."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                message = "expected the API key in a header 'Authorization: Bearer KEY'"
                refusal = ApiError(401, message, headers={"WWW-Authenticate": "Bearer"}).response()
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large, or that come too slowly.

    Args:
        size: Bytes.
        seconds: For the whole body.
    """

    def __init__(self, app: ASGIApp, size: int, seconds: float) -> None:
        self._app, self._size, self._seconds = app, size, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            content = await asyncio.wait_for(self._body(scope, receive), self._seconds)
        except asyncio.TimeoutError:
            slow = ApiError(408, f"expected the whole body within {self._seconds:g} s", headers={"Connection": "close"})
            await slow.response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            if content is not None:
                await self._app(scope, _once(content, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it; None where the client has gone."""
        too_large = ApiError(413, f"expected a body of at most {self._size} bytes", headers={"Connection": "close"})
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._size:
            raise too_large
        content, has_more = bytearray(), True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            content += message.get("body", b"")
            has_more = message.get("more_body", False)
            if len(content) > self._size:
                raise too_large
        return bytes(content)


def _once(content: bytes, receive: Receive) -> Receive:
    """The body that has been received, and then what comes after it."""
    is_told = False

    async def replayed() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replayed
