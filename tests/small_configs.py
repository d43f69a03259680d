"""Settings of small models, which tests change as they like."""

from __future__ import annotations

from loading.config import CheckpointConfig

GPT2 = CheckpointConfig(
    vocab_size=97,
    n_positions=30,
    n_layer=2,
    n_head=4,
    n_embd=64,
    n_inner=128,
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    tie_word_embeddings=True,
    eos_token_ids=(),
)
