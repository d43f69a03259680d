"""parallelism/mapping.py: who has what, and what cannot be shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_configs import GPT2

from loading.config import CheckpointConfig
from parallelism.mapping import Mapping

GPT2_XL = replace(GPT2, vocab_size=50257, n_positions=1024, n_layer=48, n_head=25, n_embd=1600, n_inner=6400)
LLAMA = replace(GPT2_XL, n_layer=5, n_head=12, n_kv_head=4, n_embd=48, n_inner=96, position_embedding="rotary")


def test_ranks_of_a_stage_follow_each_other() -> None:
    mapping = Mapping(4, 2)
    assert mapping.world_size == 8
    assert [mapping.of_rank(rank).tp_rank for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [mapping.of_rank(rank).pp_rank for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [each.rank for each in mapping.stage_ranks(1)] == [4, 5, 6, 7]


@pytest.mark.parametrize(("n_layer", "pp_size"), [(12, 1), (12, 5), (5, 5), (48, 7), (3, 2)])
def test_the_first_stages_have_the_layers_that_are_over(n_layer: int, pp_size: int) -> None:
    stages = [Mapping(2, pp_size, 2 * stage).layers(n_layer) for stage in range(pp_size)]
    assert [layer for stage in stages for layer in stage] == list(range(n_layer))
    sizes = [len(stage) for stage in stages]
    assert (
        sizes == sorted(sizes, reverse=True) and sum(size > n_layer // pp_size for size in sizes) == n_layer % pp_size
    )


def test_embeddings_are_in_the_first_stage_and_the_head_in_the_last() -> None:
    first, middle, last = (Mapping(1, 3, rank) for rank in range(3))
    for name, has in {
        "wte.weight": (True, False, False),
        "wpe.weight": (True, False, False),
        "h.1.attn.c_attn.weight_scale": (True, False, False),
        "h.2.attn.k_scale": (False, True, False),
        "h.4.ln_1.bias": (False, False, True),
        "ln_f.weight": (False, False, True),
        "lm_head.weight": (False, False, True),
    }.items():
        assert tuple(each.is_of_stage(name, 5) for each in (first, middle, last)) == has
        assert last.stage_of(name, 5) == has.index(True)


def test_a_tied_head_is_the_embedding_where_both_have_the_same_rows() -> None:
    shares = {
        (tp_size, pp_size, dimension): Mapping(tp_size, pp_size, 0, dimension).shares_embedding(GPT2_XL)
        for tp_size in (1, 5)
        for pp_size in (1, 2)
        for dimension in (None, 0, 1)
    }
    assert {key for key, value in shares.items() if value} == {(1, 1, None), (1, 1, 0), (1, 1, 1), (5, 1, 0)}
    assert not Mapping().shares_embedding(replace(GPT2_XL, tie_word_embeddings=False))


REFUSED = [
    (GPT2_XL, Mapping(2), "expected tp_size to divide the 25 heads but got 2: 1, 5 or 25 would do"),
    (GPT2_XL, Mapping(1, 49), "expected pp_size to be at most 48, the number of layers, but got 49"),
    (LLAMA, Mapping(5), "expected tp_size to divide the 12 heads but got 5: 1, 2, 4 or 12 would do"),
    (
        LLAMA,
        Mapping(3),
        "expected tp_size to divide the 4 heads of keys and values, or to be a multiple of them, but got 3",
    ),
    (replace(LLAMA, n_inner=90), Mapping(4), "expected tp_size to divide the MLP's width of 90 but got 4: 1 or 2"),
    (
        replace(LLAMA, n_embd=50, head_dim=4),
        Mapping(4, embedding_sharding_dim=1),
        "expected tp_size to divide the width of 50, along which the embeddings are shared, but got 4",
    ),
    (
        replace(LLAMA, quant_mode="int4-weight-only", block_size=16),
        Mapping(12),
        "expected tp_size to leave whole int4 blocks of 16 of 48 input features but got 12: 1 would do",
    ),
]


@pytest.mark.parametrize(("config", "mapping", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_shared_is_refused_with_what_could(
    config: CheckpointConfig, mapping: Mapping, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        mapping.check(config)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1), "expected tp_size to be at least 1 but got 0"),
        ((1, -1), "expected pp_size to be at least 1 but got -1"),
        ((2, 2, 4), "expected a rank from 0 to 3 but got 4"),
        ((2, 2, 0, 2), "expected embedding_sharding_dim to be 0 or 1 but got 2"),
    ],
)
def test_values_that_no_rank_has(values: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mapping(*values)


def test_a_rank_has_a_smaller_model() -> None:
    local = Mapping(4, 2, rank=5).local(LLAMA)
    assert (local.n_layer, local.n_head, local.kv_heads, local.head_size, local.n_inner) == (2, 3, 1, 4, 24)
    assert Mapping(12, 1).local(LLAMA).kv_heads == 1
    assert (local.n_embd, local.vocab_size) == (LLAMA.n_embd, LLAMA.vocab_size)
