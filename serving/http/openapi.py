"""``/openapi.json``: what the types in schemas.py say, for clients that read it."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from serving.http import schemas

_ANSWERS: dict[str, Any] = {
    "/v1/completions": (schemas.CompletionRequest, schemas.Completion, "Continue texts"),
    "/v1/chat/completions": (schemas.ChatRequest, schemas.ChatCompletion, "Continue conversations"),
    "/tokenize": (schemas.TokenizeRequest, None, "The token ids of a text"),
    "/detokenize": (schemas.DetokenizeRequest, None, "The text of token ids"),
}
_READ = {
    "/v1/models": "The model that is served",
    "/health": "Whether the engine runs",
    "/metrics": "Numbers for Prometheus",
    "/version": "The version",
    "/tokenizer_info": "What the tokenizer is",
    "/openapi.json": "This document",
}


@functools.cache
def document() -> dict[str, Any]:
    """The description of the API, OpenAPI 3.1."""
    types = [kind for request, answer, _ in _ANSWERS.values() for kind in (request, answer) if kind is not None]
    shapes, components = msgspec.json.schema_components(
        [*types, schemas.ErrorBody], ref_template="#/components/schemas/{name}"
    )
    shape_of = dict(zip([*types, schemas.ErrorBody], shapes, strict=True))
    refusal = {
        "description": "What was wrong",
        "content": {"application/json": {"schema": shape_of[schemas.ErrorBody]}},
    }
    errors = dict.fromkeys(("400", "401", "404", "408", "413", "422", "429", "503"), refusal)
    paths: dict[str, Any] = {}
    for path, (request, answer, what) in _ANSWERS.items():
        content: dict[str, Any] = {"application/json": {"schema": shape_of[answer] if answer else {"type": "object"}}}
        if answer is not None:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        body = {"required": True, "content": {"application/json": {"schema": shape_of[request]}}}
        paths[path] = {
            "post": {
                "summary": what,
                "requestBody": body,
                "responses": {"200": {"description": what, "content": content}, **errors},
            }
        }
    for path, what in _READ.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        paths[path] = {
            "get": {"summary": what, "responses": {"200": {"description": what, "content": {kind: {}}}, **errors}}
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "NanoGPT on Tripy", "version": "1", "description": "OpenAI's completions API."},
        "paths": paths,
        "components": {"schemas": components},
    }
