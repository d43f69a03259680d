"""``POST /v1/chat/completions``, and the templates that make a text of a conversation."""

from __future__ import annotations

import datetime
import json
import time
import uuid
from typing import Any

import msgspec
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from starlette.requests import Request
from starlette.responses import Response

from serving.drawing import TokenScores
from serving.http.answering import Answer, Plan, answer, stream, usage_of
from serving.http.errors import ApiError, decoded
from serving.http.schemas import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatTokenLogprob,
    ChatTopLogprob,
    Message,
)
from serving.http.service import Service
from serving.sequence import Update

MAX_TEXT = 1 << 20  # characters that a template may make


class ChatTemplate:
    """A checkpoint's template, in Jinja as transformers has it, in a sandbox: it reads the messages and nothing else.

    Args:
        source: The template.
        tokens: Texts of special tokens by their names, such as ``bos_token``.

    Raises:
        TemplateError: it is none.
    """

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        self._template, self._tokens = environment.from_string(source), tokens
        self.source = source

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Raises:
            TemplateError: the template refuses it, or does what it may not.
        """
        plain = [_plain(message) for message in messages]
        pieces, length = [], 0
        for piece in self._template.generate(
            messages=plain, add_generation_prompt=add_generation_prompt, tools=None, **self._tokens
        ):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise TemplateError(f"the conversation is longer than {MAX_TEXT} characters")
        return "".join(pieces)


def _plain(message: Message) -> dict[str, Any]:
    content = message.content
    text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
    return {"role": message.role, "content": text, **({"name": message.name} if message.name else {})}


def _raise(message: str) -> None:
    raise TemplateError(message)


async def create_chat_completion(service: Service, request: Request) -> Response:
    """Answers a conversation, or begins a stream.

    Raises:
        ApiError: it cannot be answered as given.
    """
    asked = decoded(await request.body(), ChatRequest)
    named = service.adapter_of(asked.model)
    template = service.chat_template
    if not isinstance(template, ChatTemplate):
        raise ApiError(
            400,
            "the checkpoint has no chat template: use /v1/completions, or serve it with --chat-template FILE",
            "messages",
        )
    if asked.response_format not in (None, {"type": "text"}):
        raise ApiError(400, "response_format is not supported, but for text", "response_format")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options is allowed in streams only", "stream_options")
    try:
        text = template.render(asked.messages, asked.add_generation_prompt)
    except Exception as error:  # a template may raise whatever Python does
        raise ApiError(400, f"the chat template: {error}", "messages") from None
    ids = await service.encode(text, "messages")
    prefix = list(service.tokenizer.prefix)
    if prefix and ids[: 2 * len(prefix)] == 2 * prefix:
        ids = ids[len(prefix) :]  # the template has begun the text already
    if asked.truncate_prompt_tokens is not None:
        ids = ids[-asked.truncate_prompt_tokens :]
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if most is None:
        virtual = 0 if named is None else len(named.virtual)
        most = max(service.engine.decoder.context + 1 - virtual - len(ids), 1)
    choices = asked.n or 1
    settings = service.settings(
        asked, most, (asked.top_logprobs or 0) if asked.logprobs else None, asked.prompt_logprobs, choices
    )
    plan = Plan(
        [ids],
        settings,
        choices,
        asked.priority,
        (asked.cache_salt or "").encode(),
        named,
    )
    shape = _Shape(service, asked, plan.prompts)
    if asked.stream:
        has_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return await stream(service, plan, shape.chunk, shape.usage if has_usage else None, shape.opening)
    body = shape.whole(await answer(service, plan, request))
    return Response(msgspec.json.encode(body), media_type="application/json")


class _Shape:
    """Answers as OpenAI's clients read them."""

    def __init__(self, service: Service, asked: ChatRequest, prompts: list[list[int]]) -> None:
        self._model = asked.model or service.name
        self._service, self._asked, self._prompts = service, asked, prompts
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, answers: list[Answer]) -> ChatCompletion:
        """The answer."""
        choices = [
            ChatChoice(
                index=number,
                message=ChatMessage(each.update.text),
                logprobs=self._logprobs(each.update.scores),
                finish_reason=each.update.finish_reason,
                stop_reason=each.update.stop_reason,
            )
            for number, each in enumerate(answers)
        ]
        usage = usage_of(self._prompts, answers)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def opening(self, number: int) -> ChatChunk:
        """The chunk that says who speaks."""
        return self._chunk([ChatChunkChoice(index=number, delta=ChatDelta(role="assistant", content=""))])

    def chunk(self, number: int, update: Update) -> ChatChunk:
        """A piece of a stream."""
        delta = ChatDelta(content=update.text) if update.text else ChatDelta()
        scores = self._logprobs(update.scores)
        return self._chunk(
            [ChatChunkChoice(index=number, delta=delta, logprobs=scores, finish_reason=update.finish_reason)]
        )

    def usage(self, answers: list[Answer]) -> ChatChunk:
        """The chunk that tells how many tokens there were."""
        chunk = self._chunk([])
        chunk.usage = usage_of(self._prompts, answers)
        return chunk

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices)

    def _logprobs(self, scores: list[TokenScores]) -> ChatLogprobs | None:
        if not self._asked.logprobs:
            return None
        return ChatLogprobs(
            [
                ChatTokenLogprob(
                    *self._token(each.id, each.logprob),
                    [ChatTopLogprob(*self._token(id, value)) for id, value in each.top],
                )
                for each in scores
            ]
        )

    def _token(self, id: int, logprob: float) -> tuple[str, float, list[int]]:
        return self._service.token_text(id), logprob, list(self._service.tokenizer.decode_bytes([id]))
