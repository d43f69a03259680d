"""What all requests need: the engine, the tokenizer, and how a request's fields become settings."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field

from serving.engine import ServingEngine
from serving.http.adapters import AdapterNames, Named
from serving.http.bridge import Bridge
from serving.http.errors import ApiError
from serving.http.metrics import Metrics
from serving.http.schemas import ChatRequest, CompletionRequest
from serving.settings import BeamSettings, SamplingSettings
from tokenizer import Tokenizer, UnknownCharacterError
from weight_loader import CheckpointError

_LONG_TEXT = 4096  # characters: encoding more is left to another thread


@dataclass
class Service:
    """A model that is served.

    Attributes:
        name: What requests call it.
        chat_template: Renders conversations; None where there is none.
        adapters: Which requests may have, by calling them for the model; None: none can be loaded.
        started: When, in seconds since 1970.
    """

    engine: ServingEngine
    tokenizer: Tokenizer
    bridge: Bridge
    metrics: Metrics
    name: str
    chat_template: object | None = None
    adapters: AdapterNames | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    def adapter_of(self, name: str | None) -> Named | None:
        """The adapter that a request calls for the model; None for the model itself.

        Raises:
            ApiError: 404: there is no such model.
        """
        if name is None or name == self.name:
            return None
        named = None if self.adapters is None else self.adapters.find(name)
        if named is None:
            others = [] if self.adapters is None else [each.name for each in self.adapters.all()]
            known = ", ".join(map(repr, [self.name, *others][:8]))
            raise ApiError(404, f"the model {name!r} is not served here: expected {known}", "model")
        return named

    async def encode(self, text: str, param: str = "prompt") -> list[int]:
        """The ids of a text.

        Raises:
            ApiError: it is empty, or has what the vocabulary lacks.
        """
        try:
            if len(text) > _LONG_TEXT:
                return await asyncio.to_thread(self.tokenizer.encode, text)
            return self.tokenizer.encode(text)
        except (UnknownCharacterError, CheckpointError, ValueError) as error:
            raise ApiError(400, str(error), param) from None

    def token_text(self, id: int) -> str:
        """A token as a string: its text, or its bytes where those are no whole characters."""
        content = self.tokenizer.decode_bytes([id])
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def settings(
        self,
        request: CompletionRequest | ChatRequest,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        beams: int,
    ) -> SamplingSettings:
        """A request's fields, with OpenAI's defaults for those that are not given.

        Args:
            beams: How many, where the request is for a search.

        Raises:
            ApiError: a key of logit_bias is no number, or fields do not go together.
        """
        stop = request.stop
        stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
        seed = int.from_bytes(os.urandom(8), "little") if request.seed is None else request.seed % (1 << 64)
        allowed = request.allowed_token_ids
        return SamplingSettings(
            seed=seed,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=None if request.top_k in (None, 0, -1) else request.top_k,
            top_p=None if request.top_p == 1.0 else request.top_p,
            min_p=None if request.min_p == 0.0 else request.min_p,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=_biases(request.logit_bias or {}),
            allowed_token_ids=None if allowed is None else tuple(allowed),
            max_tokens=max_tokens,
            min_tokens=request.min_tokens,
            ignore_eos=request.ignore_eos,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            stop=tuple(stops),
            include_stop=request.include_stop_str_in_output,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            beams=_search(request, beams),
        )


def _search(request: CompletionRequest | ChatRequest, beams: int) -> BeamSettings | None:
    if not request.use_beam_search:
        for name in ("length_penalty", "early_stopping"):
            if getattr(request, name) is not None:
                raise ApiError(400, f"{name} is allowed with use_beam_search only", name)
        return None
    if request.stream:
        raise ApiError(400, "use_beam_search is not supported in a stream: beams are known at the end", "stream")
    penalty = 1.0 if request.length_penalty is None else request.length_penalty
    return BeamSettings(beams, penalty, request.early_stopping or False)


def _biases(given: dict[str, float]) -> dict[int, float]:
    if not all(id.isascii() and id.isdigit() and len(id) < 10 for id in given):
        raise ApiError(400, "expected the keys of logit_bias to be token ids", "logit_bias")
    return {int(id): bias for id, bias in given.items()}
