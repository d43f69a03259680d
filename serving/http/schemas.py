"""What requests and answers look like, by OpenAI's names. A field that is not here is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Of a stream: whether its last chunk but one tells how many tokens there were."""

    include_usage: bool = False


class _Sampling(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of requests say of how tokens are chosen. None: the default."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: Count = 0
    prompt_logprobs: Count | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=1)] | None = None
    return_token_ids: bool = False
    cache_salt: str | None = None
    priority: int = 0
    use_beam_search: bool = False
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionRequest(_Sampling, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    echo: bool = False
    logprobs: Count | None = None
    max_tokens: Count | None = None
    suffix: str | None = None


class ContentPart(Struct, forbid_unknown_fields=True):
    """A part of a message: text is the only kind."""

    type: Literal["text"]
    text: str


class Message(Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None


class ChatRequest(_Sampling, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool = True
    response_format: dict[str, Any] | None = None


class TokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /tokenize``."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /detokenize``."""

    tokens: list[Count]
    model: str | None = None


class LoadAdapterRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/load_lora_adapter``: the path is one within --lora-dir."""

    lora_name: Annotated[str, Meta(min_length=1, max_length=256)]
    lora_path: Annotated[str, Meta(min_length=1, max_length=4096)]


class UnloadAdapterRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: Annotated[str, Meta(min_length=1, max_length=256)]


class Tokens(Struct, kw_only=True):
    """A text's token ids, and what each is, where that was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Struct):
    """The text of token ids."""

    prompt: str


class ModelMeta(Struct):
    """Sizes of a model."""

    n_vocab: int
    n_ctx_train: int


class ModelCard(Struct, kw_only=True):
    """A model that is served: the model itself, or with an adapter, whose parent it is."""

    id: str
    created: int
    max_model_len: int
    meta: ModelMeta
    parent: str | None = None
    object: Literal["model"] = "model"
    owned_by: str = "nanogpt-tripy"


class ModelList(Struct, kw_only=True):
    """All that are."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class TokenizerInfo(Struct, kw_only=True):
    """What the tokenizer is."""

    tokenizer_class: str
    vocab_size: int
    eos_token_id: int | None
    eos_token: str | None
    bos_token: str | None
    chat_template: str | None


class Health(Struct):
    """The engine runs."""

    status: Literal["ok"] = "ok"


class Version(Struct):
    """Of the portable runtime, and so of all of this."""

    version: str


class Logprobs(Struct):
    """Log-probabilities of a completion's tokens. Of an echoed prompt's first token there is none."""

    tokens: list[str] = msgspec.field(default_factory=list)
    token_logprobs: list[float | None] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = msgspec.field(default_factory=list)
    text_offset: list[int] = msgspec.field(default_factory=list)


class CompletionChoice(Struct, omit_defaults=False, kw_only=True):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    token_ids: list[int] | None = None


class PromptTokensDetails(Struct):
    """Tokens of the prompts that were found in pages."""

    cached_tokens: int = 0


class Usage(Struct):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(Struct, kw_only=True):
    """The answer to a completion request, or a chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | None = None


class ChatTopLogprob(Struct):
    """A token that could have come, and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct):
    """A token that came."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities of a message's tokens."""

    content: list[ChatTokenLogprob]


class ChatDelta(Struct, omit_defaults=True):
    """A piece of a message."""

    role: str | None = None
    content: str | None = None


class ChatMessage(Struct):
    """A message."""

    content: str
    role: str = "assistant"


class ChatChoice(Struct, kw_only=True):
    """One answer of a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatChunkChoice(Struct, kw_only=True):
    """A piece of one."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(Struct, kw_only=True):
    """The answer to a chat request."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    object: Literal["chat.completion"] = "chat.completion"
    usage: Usage | None = None


class ChatChunk(Struct, kw_only=True):
    """A chunk of its stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | None = None


class ErrorDetail(Struct):
    """What was wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None = None
    code: int | str | None = None


class ErrorBody(Struct):
    """The body of every answer that is none."""

    error: ErrorDetail
