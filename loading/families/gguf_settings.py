"""What llama.cpp's architectures have in common in a GGUF file's metadata, by its names for them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from loading import settings
from loading.errors import shown
from loading.settings import Settings


@dataclass(frozen=True)
class Metadata:
    """A file's metadata, and what its tensors say.

    Attributes:
        given: The metadata.
        names: Of the tensors.
        vocab_size: Rows of the token embedding.
    """

    given: Settings
    names: Collection[str]
    vocab_size: int

    def has_tensor(self, name: str) -> bool:
        return name in self.names


def sizes(metadata: Metadata, kind: str, epsilon: str = "layer_norm_epsilon") -> dict[str, Any]:
    """The values of `CheckpointConfig`'s fields for sizes, norms, biases and a head of its own.

    Args:
        kind: The architecture, with which its keys begin.
        epsilon: The key of the norm's.
    """
    given = metadata.given
    _check_vocabulary(metadata, kind)
    n_embd = given.integer(f"{kind}.embedding_length", limit=settings.WIDTH)
    n_head = given.integer(f"{kind}.attention.head_count", limit=settings.HEADS)
    groups = given.optional_integer(f"{kind}.attention.head_count_kv", limit=n_head)
    size = given.optional_integer(f"{kind}.attention.key_length", limit=settings.WIDTH)
    if size is None:
        given.divided(f"{kind}.embedding_length", n_embd, f"{kind}.attention.head_count", n_head)
    if given.optional_integer(f"{kind}.attention.value_length", limit=settings.WIDTH) not in (None, size):
        raise given.refuse("values of another size than keys are not supported")
    given.divided(f"{kind}.attention.head_count", n_head, f"{kind}.attention.head_count_kv", groups or n_head)
    given.absent(f"{kind}.expert_count", f"{kind}.attention.clamp_kqv", f"{kind}.attn_logit_softcapping")
    given.neutral(**{f"{kind}.{name}": 1 for name in ("logit_scale", "residual_scale", "embedding_scale")})
    return {
        "vocab_size": metadata.vocab_size,
        "n_positions": given.integer(f"{kind}.context_length", limit=settings.CONTEXT),
        "n_layer": given.integer(f"{kind}.block_count", limit=settings.LAYERS),
        "n_head": n_head,
        "n_kv_head": None if groups == n_head else groups,
        "head_dim": size,
        "n_embd": n_embd,
        "n_inner": given.integer(f"{kind}.feed_forward_length", limit=settings.INNER_WIDTH),
        "layer_norm_epsilon": given.fraction(f"{kind}.attention.{epsilon}"),
        "attention_bias": metadata.has_tensor("blk.0.attn_output.bias"),
        "mlp_bias": metadata.has_tensor("blk.0.ffn_down.bias"),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
        "eos_token_ids": _ending_ids(metadata),
    }


def rotary(metadata: Metadata, kind: str, head_size: int, n_positions: int) -> dict[str, Any]:
    """The values of `CheckpointConfig`'s fields for rotary positions and the window.

    Raises:
        CheckpointError: not of the whole head, scaled otherwise than linearly, or a head of an odd size.
    """
    given = metadata.given
    rotated = given.optional_integer(f"{kind}.rope.dimension_count", limit=settings.WIDTH)
    if rotated not in (None, head_size) or head_size % 2:
        raise given.refuse(
            f"expected {kind}.rope.dimension_count to be the head's size, an even one, got {rotated} and {head_size}"
        )
    scaling = given.value(f"{kind}.rope.scaling.type", default="none")
    factor = given.value(f"{kind}.rope.scaling.factor", f"{kind}.rope.scale_linear", default=1.0)
    if scaling not in ("none", "linear"):
        raise given.refuse(f"expected {kind}.rope.scaling.type to be none or linear, got {shown(scaling)}")
    is_linear = scaling == "linear" or f"{kind}.rope.scale_linear" in given.values
    if metadata.has_tensor("rope_freqs.weight"):
        raise given.refuse("the tensor rope_freqs.weight scales positions, as Llama 3 has it, which is not supported")
    window = given.value(f"{kind}.attention.sliding_window", default=None)
    if window is not None:
        window = given.integer(f"{kind}.attention.sliding_window", limit=2**31)
    return {
        "position_embedding": "rotary",
        "rotary_base": given.positive(f"{kind}.rope.freq_base", default=10000.0),
        "rotary_interpolation": _positive(given, factor) if is_linear else 1.0,
        "window": None if window is None or window >= n_positions else window,
    }


def _positive(given: Settings, factor: object) -> float:
    return Settings(given.source, {"rope.scaling.factor": factor}).positive("rope.scaling.factor")


def _check_vocabulary(metadata: Metadata, kind: str) -> None:
    """Refuses a vocabulary of another size than the embedding."""
    given = metadata.given
    sizes = {f"{kind}.vocab_size": given.values.get(f"{kind}.vocab_size")}
    tokens = given.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        sizes["tokenizer.ggml.tokens"] = len(tokens)
    for name, size in sizes.items():
        if size not in (None, metadata.vocab_size):
            rows = f"the {metadata.vocab_size} rows of token_embd.weight"
            raise given.refuse(f"expected a vocabulary of {rows}, got {shown(size)} by {name}")


def _ending_ids(metadata: Metadata) -> tuple[int, ...]:
    """The tokens that end a text, or a turn of a conversation."""
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    found = [metadata.given.values[name] for name in names if name in metadata.given.values]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in found):
        raise metadata.given.refuse(f"expected {names[0]} to be an integer, got {shown(found[0])}")
    return tuple(sorted({each for each in found if 0 <= each < metadata.vocab_size}))
