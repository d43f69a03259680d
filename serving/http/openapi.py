"""``/openapi.json``: what the types in schemas.py say, for clients that read it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import msgspec

from serving.http import schemas


@dataclass(frozen=True)
class _Operation:
    """What can be asked at a path.

    Attributes:
        what: It does.
        answer: Its type; None: text.
        asked: The type of the request's body; None: it has none, and is a GET.
        chunk: The type of an event's data, where the answer can be a stream.
        errors: Statuses of answers that are none, beside those that any request may get.
    """

    what: str
    answer: Any = None
    asked: Any = None
    chunk: Any = None
    errors: tuple[int, ...] = ()


_ANY_ERROR = (401, 408, 413, 503)  # no key, too slow, too large, too busy
_OPERATIONS = {
    "/v1/completions": _Operation(
        "Continue texts", schemas.Completion, schemas.CompletionRequest, schemas.Completion, (400, 404, 429, 500)
    ),
    "/v1/chat/completions": _Operation(
        "Continue conversations", schemas.ChatCompletion, schemas.ChatRequest, schemas.ChatChunk, (400, 404, 429, 500)
    ),
    "/tokenize": _Operation("The token ids of a text", schemas.Tokens, schemas.TokenizeRequest, errors=(400, 404)),
    "/detokenize": _Operation("The text of token ids", schemas.Text, schemas.DetokenizeRequest, errors=(400, 404)),
    "/v1/load_lora_adapter": _Operation(
        "Load an adapter", schemas.ModelCard, schemas.LoadAdapterRequest, errors=(400,)
    ),
    "/v1/unload_lora_adapter": _Operation(
        "Drop an adapter", schemas.ModelCard, schemas.UnloadAdapterRequest, errors=(400, 404)
    ),
    "/v1/models": _Operation("The models that are served", schemas.ModelList),
    "/v1/models/{model}": _Operation("The same by its name", schemas.ModelCard, errors=(404,)),
    "/health": _Operation("Whether the engine runs", schemas.Health),
    "/metrics": _Operation("Numbers for Prometheus"),
    "/version": _Operation("The version", schemas.Version),
    "/tokenizer_info": _Operation("What the tokenizer is", schemas.TokenizerInfo),
    "/openapi.json": _Operation("This document", dict[str, Any]),
}


@functools.cache
def document() -> dict[str, Any]:
    """The description of the API, OpenAPI 3.1."""
    types = [schemas.ErrorBody]
    for each in _OPERATIONS.values():
        types += [kind for kind in (each.answer, each.asked, each.chunk) if kind is not None and kind not in types]
    shapes, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    shape_of = dict(zip(map(str, types), shapes, strict=True))

    def json_of(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": shape_of[str(kind)]}}

    refusal = {"description": "What was wrong", "content": json_of(schemas.ErrorBody)}
    paths: dict[str, Any] = {}
    for path, each in _OPERATIONS.items():
        content: dict[str, Any] = {"text/plain": {}} if each.answer is None else json_of(each.answer)
        if each.chunk is not None:
            name = each.chunk.__name__
            data = {"type": "string", "description": f"a {name}, an ErrorBody or, at the end, [DONE]"}
            content["text/event-stream"] = {"schema": {"type": "object", "properties": {"data": data}}}
        answers: dict[str, Any] = {"200": {"description": each.what, "content": content}}
        answers |= {str(status): refusal for status in sorted((*_ANY_ERROR, *each.errors))}
        operation: dict[str, Any] = {"summary": each.what, "responses": answers}
        if each.asked is not None:
            operation["requestBody"] = {"required": True, "content": json_of(each.asked)}
        if "{model}" in path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get" if each.asked is None else "post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "NanoGPT on Tripy", "version": "1", "description": "OpenAI's completions API."},
        "paths": paths,
        "components": {"schemas": components},
    }
