"""The server's routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from serving.http.adapters import Named
from serving.http.chat import create_chat_completion
from serving.http.completions import create_completion
from serving.http.errors import ApiError, decoded, error_response
from serving.http.limits import ApiKey, BodyLimit
from serving.http.openapi import document
from serving.http.schemas import (
    DetokenizeRequest,
    Health,
    LoadAdapterRequest,
    ModelCard,
    ModelList,
    ModelMeta,
    Text,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
    UnloadAdapterRequest,
    Version,
)
from serving.http.service import Service
from weight_loader import CheckpointError

STUCK_SECONDS = 60.0  # of one step: then something is wrong
_PAGE = Path(__file__).with_name("page.html")


@dataclass
class Limits:
    """Of what clients may send."""

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0


def build_app(service: Service, key: str | None, limits: Limits) -> Starlette:
    """The ASGI application.

    Args:
        key: What requests have to send; None: nothing.
    """
    handlers = {
        "/v1/completions": (create_completion, "POST"),
        "/v1/chat/completions": (create_chat_completion, "POST"),
        "/v1/load_lora_adapter": (_load_adapter, "POST"),
        "/v1/unload_lora_adapter": (_unload_adapter, "POST"),
        "/v1/models": (_models, "GET"),
        "/v1/models/{model:path}": (_model, "GET"),
        "/tokenize": (_tokenize, "POST"),
        "/detokenize": (_detokenize, "POST"),
        "/tokenizer_info": (_tokenizer_info, "GET"),
        "/health": (_health, "GET"),
        "/metrics": (_metrics, "GET"),
        "/version": (_version, "GET"),
        "/openapi.json": (_openapi, "GET"),
        "/": (_page, "GET"),
    }
    routes = [Route(path, _handled(service, handler), methods=[method]) for path, (handler, method) in handlers.items()]
    middleware = [Middleware(BodyLimit, size=limits.body_bytes, seconds=limits.body_seconds)]
    if key is not None:
        middleware.insert(0, Middleware(ApiKey, key=key))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.bridge.open()
        service.engine.start()
        yield

    return Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _not_there}
    )


_Handler = Callable[[Service, Request], Awaitable[Response]]


def _handled(service: Service, handler: _Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(service, request)
        except ApiError as error:
            return error.response()

    return endpoint


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers) if error.headers else None
    return error_response(error.status_code, f"{error.detail}: {request.method} {request.url.path}", None, headers)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _card(service: Service, named: Named | None = None) -> ModelCard:
    decoder = service.engine.decoder
    card = ModelCard(
        id=service.name,
        created=service.started,
        max_model_len=decoder.context,
        meta=ModelMeta(decoder.vocabulary, decoder.context),
    )
    if named is not None:
        card.id, card.created, card.parent = named.name, named.created, service.name
    return card


async def _models(service: Service, request: Request) -> Response:
    others = [] if service.adapters is None else service.adapters.all()
    return _json(ModelList(data=[_card(service), *(_card(service, each) for each in others)]))


async def _model(service: Service, request: Request) -> Response:
    return _json(_card(service, service.adapter_of(request.path_params["model"])))


async def _load_adapter(service: Service, request: Request) -> Response:
    asked = decoded(await request.body(), LoadAdapterRequest)
    if service.adapters is None:
        raise ApiError(400, "adapters can be loaded only where the server was started with --lora-dir")
    if asked.lora_name == service.name:
        raise ApiError(400, f"expected a name that is not the model's own but got {asked.lora_name!r}", "lora_name")
    try:
        named = await asyncio.to_thread(service.adapters.read_for_client, asked.lora_name, asked.lora_path)
    except CheckpointError as error:
        raise ApiError(400, str(error), "lora_path") from None
    return _json(_card(service, named))


async def _unload_adapter(service: Service, request: Request) -> Response:
    asked = decoded(await request.body(), UnloadAdapterRequest)
    named = service.adapter_of(asked.lora_name)
    if named is None or service.adapters is None:
        raise ApiError(400, f"expected the name of an adapter but {asked.lora_name!r} is the model", "lora_name")
    if not service.adapters.drop(asked.lora_name):
        raise ApiError(400, f"expected the name of an adapter but {asked.lora_name!r} is a task's prompt", "lora_name")
    return _json(_card(service, named))


async def _tokenize(service: Service, request: Request) -> Response:
    asked = decoded(await request.body(), TokenizeRequest)
    service.adapter_of(asked.model)
    ids = await service.encode(asked.prompt)
    prefix = list(service.tokenizer.prefix)
    if not asked.add_special_tokens and prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    strings = [service.token_text(id) for id in ids] if asked.return_token_strs else None
    context = service.engine.decoder.context
    return _json(Tokens(count=len(ids), max_model_len=context, tokens=ids, token_strs=strings))


async def _detokenize(service: Service, request: Request) -> Response:
    asked = decoded(await request.body(), DetokenizeRequest)
    service.adapter_of(asked.model)
    return _json(Text(service.tokenizer.decode(asked.tokens)))


async def _tokenizer_info(service: Service, request: Request) -> Response:
    eos = service.tokenizer.eos_id
    template = getattr(service.chat_template, "source", None)
    return _json(
        TokenizerInfo(
            tokenizer_class=type(service.tokenizer).__name__,
            vocab_size=service.engine.decoder.vocabulary,
            eos_token_id=eos,
            eos_token=None if eos is None else service.token_text(eos),
            bos_token="".join(service.token_text(id) for id in service.tokenizer.prefix) or None,
            chat_template=template,
        )
    )


async def _health(service: Service, request: Request) -> Response:
    stuck = service.engine.stuck_for
    if stuck > STUCK_SECONDS:
        return error_response(
            503, "the engine has ended" if stuck == float("inf") else f"a step has taken {stuck:.0f} s"
        )
    return _json(Health())


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _version(service: Service, request: Request) -> Response:
    return _json(Version(metadata.version("nvtripy-portable")))


async def _openapi(service: Service, request: Request) -> Response:
    return _json(document())


async def _page(service: Service, request: Request) -> Response:
    return HTMLResponse(
        _PAGE.read_text(encoding="utf-8"),
        headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data:"},
    )
