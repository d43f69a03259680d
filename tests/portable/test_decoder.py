"""The decoder against the executable that it is of, and a sequence's numbers against themselves in any company."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
from fused_graphs import Shape, empty_cache, model_graph

from nvtripy_portable.cpu import executor as executor_module
from nvtripy_portable.decoder import Decoder, Piece, Rows
from nvtripy_portable.executable import Executable
from nvtripy_portable.graph import Graph
from nvtripy_portable.pages import PagePool, PagesExhausted

native = pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")

ISAS = native.testable_isas()
STATM = Path("/proc/self/statm")
VARIANTS: dict[str, dict[str, Any]] = {
    "f32": {"weight_dtype": "f32", "cache_dtype": "f32"},
    "f16": {"weight_dtype": "f16", "cache_dtype": "f16"},
    "bf16": {"weight_dtype": "bf16", "cache_dtype": "bf16"},
    "i8": {"weight_dtype": "i8", "scales": "rows", "cache_dtype": "f16", "dtype": "f16"},
    "i4": {"weight_dtype": "i4", "scales": "32", "cache_dtype": "f16", "dtype": "f16"},
    "i4 in blocks of 6": {"weight_dtype": "i4", "scales": "6", "cache_dtype": "f16", "dtype": "f16"},
    "fp8": {"weight_dtype": "f8e4m3fn", "scales": "scalar", "cache_dtype": "f16", "input_dtype": "f8e4m3fn"},
    "llama": {"weight_dtype": "f16", "cache_dtype": "f16", "dtype": "f16"},
    "llama, i8": {"weight_dtype": "i8", "scales": "rows", "cache_dtype": "i8", "rounding": "i8", "dtype": "f16"},
    "window": {"weight_dtype": "f16", "cache_dtype": "f32"},
    "w8a8": {
        "weight_dtype": "i8",
        "scales": "rows",
        "cache_dtype": "i8",
        "rounding": "i8",
        "input_dtype": "i8",
        "dtype": "f16",
    },
}


def shape_of(variant: str) -> Shape:
    """For the weights' blocks the width is a multiple of 32; the relatives have heads that share keys."""
    size = 32 if variant.startswith("i4") else 20
    shape = Shape(layers=2, heads=3, head_size=size, context=300, vocabulary=67)
    if variant.startswith("llama"):
        return replace(shape, heads=4, groups=2, is_llama=True)
    return replace(shape, heads=4, groups=1, window=37, is_llama=True) if variant == "window" else shape


def compiled(graph: Graph) -> Any:
    """As nvtripy holds what the portable runtime gave it."""
    return SimpleNamespace(_executable=SimpleNamespace(portable=Executable(graph)))


def decoder_of(graph: Graph, **settings: Any) -> Decoder:
    decoder = Decoder.of(compiled(graph), **settings)
    assert decoder is not None
    return decoder


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.fixture(autouse=True)
def threads() -> object:
    before = native.threads()
    yield
    native.set_threads(before)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if "-" in name else ()) for name in ISAS])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NVTRIPY_PORTABLE_ISA", request.param)
    return request.param


@pytest.mark.parametrize(("cache_dtype", "rounding"), [("f32", None), ("f16", None), ("bf16", None), ("i8", "i8")])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("page_tokens", [1, 5, 64])
def test_steps_are_those_of_the_executable(
    cache_dtype: str, rounding: str | None, batch: int, page_tokens: int
) -> None:
    """To the last bit: it is the same program."""
    shape = Shape(batch=batch)
    graph = model_graph(shape, weight_dtype="f16", cache_dtype=cache_dtype, rounding=rounding)
    executable, decoder = Executable(graph), decoder_of(graph, page_tokens=page_tokens)
    random = np.random.default_rng(batch)
    for _ in range(2):  # the second sequences find the first ones' numbers in their pages
        cache: Any = empty_cache(shape, cache_dtype)
        position = np.zeros(batch, np.int32)
        tables = [decoder.pool.take(-(-shape.context // decoder.page_tokens)) for _ in range(batch)]
        for length in (9, 1, 1, 3, 1):
            ids = random.integers(0, shape.vocabulary, (batch, length)).astype(np.int32)
            last = random.integers(0, length, batch).astype(np.int32)
            expected, cache = executable.run([ids, position, cache, last])
            pieces = [
                Piece(ids[row], int(position[row]), tables[row], length == 1, [int(last[row])]) for row in range(batch)
            ]
            found = decoder.step(pieces)
            assert isinstance(expected, np.ndarray) and found.dtype == np.float32
            np.testing.assert_array_equal(found, expected)
            position = position + np.int32(length)
        for table in tables:
            decoder.pool.release(table)


class Sequence:
    """Random tokens, of which the first ``prompt`` are a prompt's, and the logits of each token from there on."""

    def __init__(self, random: np.random.Generator, vocabulary: int, length: int, prompt: int) -> None:
        self.tokens = random.integers(0, vocabulary, length).tolist()
        self.prompt = prompt

    def alone(self, decoder: Decoder) -> list[bytes]:
        """The prompt at once, then token by token, in pages of their own, on one thread."""
        native.set_threads(1)
        table = decoder.pool.take(-(-len(self.tokens) // decoder.page_tokens))
        logits = list(decoder.step([Piece(self.tokens[: self.prompt], 0, table, rows=range(self.prompt))]))
        for at in range(self.prompt, len(self.tokens)):
            logits.extend(decoder.step([Piece([self.tokens[at]], at, table, generated=True)]))
        decoder.pool.release(table)
        return [each.tobytes() for each in logits]


def together(
    decoder: Decoder, sequences: list[Sequence], random: np.random.Generator, eager: float = 0.7
) -> list[list[bytes]]:
    """All of them in random company: pieces of random length, several generated tokens at once, in shuffled pages."""
    pages = random.permutation(decoder.pool.take(decoder.pool.free)).tolist()
    tables: list[list[int]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    found: list[list[bytes]] = [[] for _ in sequences]
    while any(at < len(each.tokens) for at, each in zip(done, sequences, strict=True)):
        native.set_threads(int(random.integers(1, 4)))
        pieces, whose = [], []
        for number in random.permutation(len(sequences)).tolist():
            each, at = sequences[number], done[number]
            end = each.prompt if at < each.prompt else len(each.tokens)
            if at == len(each.tokens) or random.random() > eager:
                continue
            count = int(random.integers(0, min(end - at, 1 if random.random() < 0.3 else 60) + 1))  # none, too
            while len(tables[number]) * decoder.page_tokens < at + count:
                tables[number].append(pages.pop())
            pieces.append(Piece(each.tokens[at : at + count], at, tables[number], at >= each.prompt, range(count)))
            whose.append((number, count))
        rows = iter(decoder.step(pieces))
        for number, count in whose:
            found[number].extend(next(rows).tobytes() for _ in range(count))
            done[number] += count
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_in_any_company(isa: str, variant: str) -> None:
    """Alone, or beside others, prompts in pieces, pages anywhere, on any number of threads."""
    random = np.random.default_rng([*variant.encode()])
    shape = shape_of(variant)
    decoder = decoder_of(model_graph(shape, **VARIANTS[variant]), page_tokens=int(random.integers(1, 80)), pages=6000)
    lengths = [(1, 1), (4, 3), (40, 1), (90, 70), (300, 250), (17, 5), (262, 258)]
    sequences = [Sequence(random, shape.vocabulary, length, prompt) for length, prompt in lengths]
    expected = [each.alone(decoder) for each in sequences]
    assert together(decoder, sequences, random) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("company", "variant"),
    [
        # Those blocks are no kernel's strength: with many sequences they take a quarter of a minute.
        pytest.param(company, variant, marks=pytest.mark.slow if variant == "i4 in blocks of 6" and company > 5 else ())
        for company in (2, 3, 5, 16, 33, 64)
        for variant in VARIANTS
        if company in (3, 33) or not shape_of(variant).is_llama
    ],
)
def test_the_same_bits_among_many(isa: str, variant: str, company: int) -> None:
    random = np.random.default_rng([company, *variant.encode()])
    for _ in range(3):
        heads, size = int(random.integers(1, 4)), int(random.choice([1, 8, 15, 16, 33, 64]))
        shape = Shape(layers=2, heads=heads, head_size=size, context=160, vocabulary=131)
        if shape_of(variant).is_llama:
            heads = shape_of(variant).kv_heads * int(random.integers(1, 4))
            shape = replace(shape_of(variant), heads=heads, head_size=max(size, 2), context=160, vocabulary=131)
        if variant.startswith("i4") and (heads * size) % 96:
            shape = Shape(layers=2, heads=3, head_size=32, context=160, vocabulary=131)
        page = int(random.choice([1, 2, 7, 16, 63, 64, 128, 160]))
        decoder = decoder_of(model_graph(shape, **VARIANTS[variant]), page_tokens=page, pages=64 * 200)
        sequences = [
            Sequence(random, shape.vocabulary, length, int(random.integers(1, length + 1)))
            for length in random.integers(1, 160, company).tolist()
        ]
        expected = [each.alone(decoder) for each in sequences]
        assert together(decoder, sequences, random, eager=1.0 if company == 64 else 0.7) == expected


@pytest.mark.parametrize("variant", ["f32", "i8", "w8a8", "llama", "window"])
@pytest.mark.parametrize("batch", [1, 2])
def test_numpys_fall_back_does_the_same(variant: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(batch)
    shape = replace(shape_of(variant), head_size=16, context=40, batch=batch)
    form = VARIANTS[variant]
    fast = decoder_of(model_graph(shape, **form), page_tokens=7, pages=40)
    monkeypatch.setattr(executor_module.Executor, "of", staticmethod(lambda graph: None))
    plain = decoder_of(model_graph(shape, **form), page_tokens=7, pages=40)
    sequences = [Sequence(random, shape.vocabulary, length, prompt) for length, prompt in [(9, 6), (40, 33), (3, 1)]]
    results = []
    for decoder in (fast, plain):
        found = together(decoder, sequences, np.random.default_rng(5))
        results.append(np.concatenate([np.frombuffer(each, np.float32) for rows in found for each in rows]))
    tolerance = 2e-3 if variant == "f32" else 0.05 * np.abs(results[1]).max()  # rounded inputs fall on the other side
    np.testing.assert_allclose(results[0], results[1], rtol=2e-3, atol=tolerance)


def test_a_piece_may_be_empty_and_ask_for_nothing() -> None:
    decoder = decoder_of(model_graph(Shape()))
    table = decoder.pool.take(1)
    assert decoder.step([]).shape == (0, 50)
    assert decoder.step([Piece([], 0, table)]).shape == (0, 50)
    assert decoder.step([Piece([1, 2], 0, table, rows=[])]).shape == (0, 50)
    other = decoder.step([Piece([], 2, table, generated=True), Piece([3], 2, table, generated=True)])
    alone = decoder_of(model_graph(Shape()))
    alone.step([Piece([1, 2], 0, table)])
    np.testing.assert_array_equal(other, alone.step([Piece([3], 2, table, generated=True)]))


def test_sequences_may_share_pages() -> None:
    """Two that begin alike read the same pages for it."""
    decoder = decoder_of(model_graph(Shape()), page_tokens=4, pages=8)
    start = decoder.pool.take(2)
    decoder.step([Piece([1, 2, 3, 4, 5, 6, 7, 8], 0, start)])
    tables = [start + decoder.pool.take(1) for _ in range(2)]
    found = decoder.step([Piece([each], 8, table, generated=True) for each, table in zip((9, 10), tables, strict=True)])
    for each, logits in zip((9, 10), found, strict=True):
        alone = decoder_of(model_graph(Shape()))
        table = alone.pool.take(1)
        alone.step([Piece([1, 2, 3, 4, 5, 6, 7, 8], 0, table)])
        np.testing.assert_array_equal(alone.step([Piece([each], 8, table, generated=True)])[0], logits)


def test_results_stay_as_they_are() -> None:
    decoder = decoder_of(model_graph(Shape()))
    table = decoder.pool.take(1)
    first = decoder.step([Piece([1, 2], 0, table)])
    before = first.copy()
    decoder.step([Piece([3], 2, table, generated=True)])
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ({"tokens": [1, 50], "position": 3}, "expects? indices in|out of bounds"),
        ({"tokens": [1, 2], "position": 31}, "expected pages for 33 tokens"),
        ({"tokens": [1], "position": 3, "rows": [1]}, "expected rows of a piece to be 0 to 0 but got 1"),
        ({"tokens": [1], "position": 3, "pages": [7]}, "expected pages for 4 tokens"),
        ({"tokens": [1], "position": 3, "pages": []}, "expected pages for 4 tokens"),
    ],
)
def test_inputs_that_do_not_fit(
    piece: dict[str, Any], message: str, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused, and the next step is as if they had not been."""
    if not is_native:
        monkeypatch.setattr(executor_module.Executor, "of", staticmethod(lambda graph: None))
    graph = model_graph(Shape())
    decoder, other = decoder_of(graph), decoder_of(graph)
    tables = []
    for each in (decoder, other):
        tables.append(each.pool.take(1))
        each.step([Piece([7, 8, 9], 0, tables[-1])])
    with pytest.raises(ValueError, match=message):
        decoder.step([Piece(**{"pages": tables[0], **piece})])
    expected = other.step([Piece([4], 3, tables[1], generated=True)])
    np.testing.assert_array_equal(decoder.step([Piece([4], 3, tables[0], generated=True)]), expected)


def test_what_is_no_decoder() -> None:
    assert Decoder.of(compiled(model_graph(Shape(), cache_dtype=None))) is None  # no cache
    assert Decoder.of(tp.compile(lambda x: x + 1.0, args=[tp.InputInfo((2,), dtype=tp.float32)])) is None
    assert Decoder.of(SimpleNamespace(_executable=object())) is None  # type: ignore[arg-type]  # NVIDIA's


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTRIPY_PORTABLE_ISA", "sse9")
    with pytest.raises(ValueError, match=r"expected NVTRIPY_PORTABLE_ISA to be one of .* but got 'sse9'"):
        decoder_of(model_graph(Shape()))


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc to see what memory is in use")
def test_memory_grows_with_the_tokens_that_are_held() -> None:
    """Pages that nobody uses are no more than addresses, and those that were used are used again."""
    shape = Shape(layers=4, heads=8, head_size=64, context=1024)  # 1 MB a page

    def resident() -> int:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

    graph = model_graph(shape)
    decoder_of(graph).step([Piece([1], 0, [0])])
    before = resident()
    decoder = decoder_of(graph, pages=4000)
    for _ in range(50):
        table = decoder.pool.take(1)
        decoder.step([Piece([1, 2, 3], 0, table)])
        decoder.pool.release(table)
    assert resident() - before < 20
    table = decoder.pool.take(16)
    for start in range(0, 1024, 64):
        decoder.step([Piece([1] * 64, start, table)])
    assert 10 < resident() - before < 40


@pytest.mark.parametrize("is_native", [True, False])
def test_a_window_costs_the_memory_of_the_window(is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that no token sees any more go back, long prompts are cut, and the numbers are those of a sequence that
    keeps all its pages."""
    monkeypatch.setattr("nvtripy_portable.decoder.PROMPT_TOKENS", 50)
    if not is_native:
        monkeypatch.setattr(executor_module.Executor, "of", staticmethod(lambda graph: None))
    shape = replace(shape_of("window"), context=300 if is_native else 130, batch=2)
    graph = model_graph(shape, **VARIANTS["window"])
    decoder, keeps = (decoder_of(graph, page_tokens=8, pages=pages) for pages in (2 * (37 + 50) // 8 + 4, 80))
    assert decoder.window == 37
    random = np.random.default_rng(1)
    rows, table = Rows(decoder, 2), keeps.pool.take(-(-shape.context // 8))
    for start in range(2):  # the second time in the first one's pages
        prompt = shape.context - 60 - start
        ids = random.integers(0, shape.vocabulary, (2, prompt)).astype(np.int32)
        logits = rows.step(ids, i32(0, 0), i32(prompt - 1, 9))
        expected = keeps.step([Piece(ids[0], 0, table)])
        np.testing.assert_array_equal(logits[:1], expected)
        for position in range(prompt, shape.context):
            ids = random.integers(0, shape.vocabulary, (2, 1)).astype(np.int32)
            logits = rows.step(ids, i32(position, 10 + position - prompt), i32(0, 0))
            np.testing.assert_array_equal(logits[:1], keeps.step([Piece(ids[0], position, table, generated=True)]))


def test_the_pool() -> None:
    pool = PagePool(3)
    first = pool.take(2)
    assert len({*first}) == 2 and pool.free == 1
    with pytest.raises(PagesExhausted, match="expected 2 free pages but there are 1 of 3"):
        pool.take(2)
    assert pool.free == 1
    pool.hold(first[:1])
    pool.release(first)
    assert pool.free == 2
    with pytest.raises(ValueError, match=f"page {first[1]} is free"):
        pool.release(first[1:])
    with pytest.raises(ValueError, match=f"page {first[1]} is free"):
        pool.hold(first[1:])
    pool.release(first[:1])
    assert sorted(pool.take(3)) == [0, 1, 2]
