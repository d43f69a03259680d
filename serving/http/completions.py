"""``POST /v1/completions``."""

from __future__ import annotations

import time
import uuid

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from serving.drawing import TokenScores
from serving.http.answering import Answer, Plan, answer, stream, usage_of
from serving.http.errors import ApiError, decoded
from serving.http.schemas import Completion, CompletionChoice, CompletionRequest, Logprobs
from serving.http.service import Service
from serving.sequence import Update

DEFAULT_TOKENS = 16
MAX_PROMPTS = 256


async def create_completion(service: Service, request: Request) -> Response:
    """Answers a request, or begins a stream.

    Raises:
        ApiError: it cannot be answered as given.
    """
    asked = decoded(await request.body(), CompletionRequest)
    named = service.adapter_of(asked.model)
    if asked.suffix:
        raise ApiError(400, "suffix is not supported: the model continues a text, it fills no gaps", "suffix")
    choices = asked.n or 1
    best_of = asked.best_of or choices
    if best_of < choices:
        raise ApiError(400, f"expected best_of to be at least n ({choices}) but got {best_of}", "best_of")
    if asked.stream and best_of > choices:
        raise ApiError(
            400, "best_of above n is not supported in a stream: which are best is known at the end", "best_of"
        )
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options is allowed in streams only", "stream_options")
    prompts = await _prompts(service, asked)
    virtual = 0 if named is None else len(named.virtual)
    room = min(service.engine.decoder.context + 1 - virtual - len(prompt) for prompt in prompts)
    most = max(min(DEFAULT_TOKENS, room), 1) if asked.max_tokens is None else asked.max_tokens
    prompt_scores = asked.prompt_logprobs
    if asked.echo and asked.logprobs is not None:
        prompt_scores = max(asked.logprobs, prompt_scores or 0)
    beams = best_of
    if asked.use_beam_search:  # which tells the best ones itself
        best_of = choices
    ranks_by_probability = best_of > choices and asked.logprobs is None
    scores = 0 if ranks_by_probability else asked.logprobs
    settings = service.settings(asked, most, scores, prompt_scores, beams)
    plan = Plan(
        prompts,
        settings,
        best_of,
        asked.priority,
        (asked.cache_salt or "").encode(),
        named,
    )
    shape = _Shape(service, asked, prompts, best_of)
    if asked.stream:
        has_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return await stream(service, plan, shape.chunk, shape.usage if has_usage else None)
    answers = await answer(service, plan, request)
    body = shape.whole(answers, choices)
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _prompts(service: Service, asked: CompletionRequest) -> list[list[int]]:
    given = asked.prompt
    if isinstance(given, list) and given and all(isinstance(each, int) for each in given):
        many: list[str | int | list[int]] = [given]  # type: ignore[list-item]
    else:
        many = [given] if isinstance(given, str) else given
    if not many or any(isinstance(each, int) for each in many):
        raise ApiError(400, "expected prompt to be a text, token ids, or a list of texts or of lists of ids", "prompt")
    if len(many) > MAX_PROMPTS:
        raise ApiError(400, f"expected at most {MAX_PROMPTS} prompts but got {len(many)}", "prompt")
    prompts = []
    for each in many:
        ids = each if isinstance(each, list) else await service.encode(each)  # type: ignore[arg-type]
        wrong = next((id for id in ids if not 0 <= id < service.engine.decoder.vocabulary), None)
        if wrong is not None:
            largest = service.engine.decoder.vocabulary - 1
            raise ApiError(400, f"expected token ids from 0 to {largest} in prompt but got {wrong}", "prompt")
        if asked.truncate_prompt_tokens is not None:
            ids = ids[-asked.truncate_prompt_tokens :]
        prompts.append(ids)
    return prompts


class _Shape:
    """Answers as OpenAI's clients read them."""

    def __init__(self, service: Service, asked: CompletionRequest, prompts: list[list[int]], best_of: int) -> None:
        self._model = asked.model or service.name
        self._service, self._asked, self._prompts, self._best_of = service, asked, prompts, best_of
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._echoed = set[int]()  # answers whose prompt has been told
        self._lengths: dict[int, int] = {}

    def whole(self, answers: list[Answer], choices: int) -> Completion:
        """The answer, with the ``choices`` likeliest to each prompt."""
        told = []
        for number in range(len(self._prompts)):
            own = answers[number * self._best_of : (number + 1) * self._best_of]
            if self._best_of > choices:
                own = sorted(own, key=lambda each: -each.mean_logprob)[:choices]
            for place, each in enumerate(own):
                told.append(self._choice(number * self._best_of + each.choice, each.update, number * choices + place))
        usage = usage_of(self._prompts, answers)
        return Completion(id=self._id, created=self._created, model=self._model, choices=told, usage=usage)

    def chunk(self, number: int, update: Update) -> Completion:
        """A piece of a stream."""
        choice = self._choice(number, update, number)
        return Completion(id=self._id, created=self._created, model=self._model, choices=[choice])

    def usage(self, answers: list[Answer]) -> Completion:
        """The chunk that tells how many tokens there were."""
        usage = usage_of(self._prompts, answers)
        return Completion(id=self._id, created=self._created, model=self._model, choices=[], usage=usage)

    def _choice(self, number: int, update: Update, index: int) -> CompletionChoice:
        asked, prompt = self._asked, self._prompts[number // self._best_of]
        text, logprobs = update.text, None
        echoes = asked.echo and number not in self._echoed
        if echoes:
            self._echoed.add(number)
            start = self._service.tokenizer.decode(prompt)
            text = start + text
            self._lengths[number] = len(start)
        if asked.logprobs is not None:
            logprobs = Logprobs()
            if echoes:
                self._add_prompt(logprobs, prompt, update.prompt_scores or [])
            before = self._lengths.get(number, 0)
            for offset, scores in zip(update.offsets, update.scores, strict=True):
                self._add(logprobs, scores.id, scores, before + offset)
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=update.finish_reason)
        choice.stop_reason = update.stop_reason
        if asked.prompt_logprobs is not None and update.prompt_scores is not None:
            choice.prompt_logprobs = [None if each is None else self._named(each) for each in update.prompt_scores]
        if asked.return_token_ids:
            choice.token_ids = update.ids
        return choice

    def _add_prompt(self, logprobs: Logprobs, prompt: list[int], scores: list[TokenScores | None]) -> None:
        offset = 0
        for id, each in zip(prompt, scores, strict=True):
            self._add(logprobs, id, each, offset)
            offset += len(self._service.tokenizer.decode_bytes([id]).decode("utf-8", "ignore"))

    def _add(self, logprobs: Logprobs, id: int, scores: TokenScores | None, offset: int) -> None:
        logprobs.tokens.append(self._service.token_text(id))
        logprobs.token_logprobs.append(None if scores is None else scores.logprob)
        if scores is None:
            logprobs.top_logprobs.append(None)
        else:
            count = self._asked.logprobs or 0
            top = {self._service.token_text(other): value for other, value in scores.top[:count]}
            top.setdefault(self._service.token_text(id), scores.logprob)
            logprobs.top_logprobs.append(top)
        logprobs.text_offset.append(offset)

    def _named(self, scores: TokenScores) -> dict[str, object]:
        """vLLM's shape: by id, the log-probability, the rank and the text of a token."""
        count = self._asked.prompt_logprobs or 0
        told = {id: (value, rank) for rank, (id, value) in enumerate(scores.top[:count], 1)}
        told.setdefault(scores.id, (scores.logprob, scores.rank))
        return {
            str(id): {"logprob": value, "rank": rank, "decoded_token": self._service.token_text(id)}
            for id, (value, rank) in told.items()
        }
