"""Drawing one of many logits: by its definition, natively and in NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nvtripy_portable import sampling

native = sampling._native


@pytest.fixture(params=["native", "NumPy"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and native is None:
        pytest.skip("the native executor is not built")
    monkeypatch.setattr(sampling, "_native", native if request.param == "native" else None)
    return request.param


def by_definition(
    logits: np.ndarray, uniform: float, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[int, float]:
    """The index, and how far ``uniform`` is from where another one begins: nearer than rounding, either may come."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    weights = np.array([np.exp((float(logits[i]) - float(logits[order[0]])) / temperature) for i in order])
    ends = np.cumsum(weights) / weights.sum()
    distance = 1.0
    if top_p is not None:
        count = next((i + 1 for i, end in enumerate(ends) if end >= top_p), len(ends))
        distance = float(np.abs(ends - top_p).min())
        ends = ends[:count] / ends[count - 1]
    index = next((i for i, end in enumerate(ends) if uniform < end), len(ends) - 1)
    return order[index], min(distance, float(np.abs(ends - uniform).min()))


@pytest.mark.parametrize("count", [1, 5, 127, 128, 129, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_what_the_definition_says(count: int, ties: bool) -> None:
    random = np.random.default_rng(count)
    compared = 0
    for _ in range(60):
        logits = (random.integers(0, 5, count) if ties else 3 * random.standard_normal(count)).astype(np.float32)
        top_k = random.choice([None, 1, 2, 5, 40, 500])
        top_p = random.choice([None, 0.1, 0.5, 0.95, 1.0])
        temperature, uniform = random.uniform(0.1, 3.0), random.random()
        expected, distance = by_definition(logits, uniform, temperature, top_k, top_p)
        found = sampling.draw(logits, uniform, temperature, top_k, top_p)
        assert 0 <= found < count
        if distance > 1e-9:
            assert found == expected
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("count", [1, 5, 127, 128, 129, 50257])
def test_the_order_of_the_largest(count: int) -> None:
    """They are found without sorting all, whether a few or many are wanted."""
    random = np.random.default_rng(5)
    logits = random.integers(0, 50, count).astype(np.float32)  # with many equals
    order = np.argsort(-logits, kind="stable")
    for top_k in (1, 2, 5, 40, 500):
        kept = min(top_k, count)
        # At a temperature so high, all have the same share: each in turn is drawn.
        drawn = [sampling.draw(logits, (place + 0.5) / kept, 1e12, top_k) for place in range(kept)]
        np.testing.assert_array_equal(drawn, order[:kept])
    for place in {0, count // 2, count - 1}:
        assert sampling.draw(logits, (place + 0.5) / count, 1e12) == order[place]


def test_the_ends_of_the_uniform_numbers() -> None:
    logits = np.array([0, 2, 1], np.float32)
    assert sampling.draw(logits, 0.0, 1.0) == 1
    assert sampling.draw(logits, np.nextafter(1.0, 0.0), 1.0) == 0
    assert sampling.draw(logits, np.nextafter(1.0, 0.0), 1.0, top_p=1e-9) == 1
    assert sampling.draw(logits, np.nextafter(1.0, 0.0), 1e-3) == 1  # the others' shares are too small to be met


def test_logits_that_are_no_numbers_are_not_drawn() -> None:
    logits = np.array([1, -np.inf, 0, -np.inf], np.float32)
    assert {sampling.draw(logits, each, 1.0) for each in np.linspace(0, 1, 50, endpoint=False)} == {0, 2}


def test_any_layout_and_type_of_logits() -> None:
    logits = np.array([[0, 9], [5, 9], [1, 9]])
    assert sampling.draw(logits[:, 0], 0.5, 0.1) == 1
    assert sampling.draw(logits[:, 0].astype(np.float32), 0.5, 0.1) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-300, 1e-45])
@pytest.mark.parametrize("count", [3, 1000])
def test_temperatures_near_zero_are_greedy(temperature: float, count: int) -> None:
    logits = np.random.default_rng(count).uniform(-30, 30, count).astype(np.float32)
    for top_k in (None, 2, 5):
        for top_p in (None, 0.9):
            for uniform in (0.0, 0.5, np.nextafter(1.0, 0.0)):
                assert sampling.draw(logits, uniform, temperature, top_k, top_p) == logits.argmax()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, np.nan], "the logit of token 1 is nan"),
        ([np.inf, np.nan], "the logit of token 0 is inf"),
        ([-np.inf, 3, np.inf], "the logit of token 2 is inf"),
        ([-np.inf], "all logits are -inf"),
        ([], "at least one logit"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_logits_without_probabilities_are_refused(values: list[float], message: str, dtype: type) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.draw(np.array(values, dtype), 0.5, 1.0)


@pytest.mark.parametrize("place", [0, 127, 128, 700, 50175, 50176, 50256])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bad_logit_among_many_is_found(place: int, value: float) -> None:
    logits = np.zeros(50257, np.float32)
    logits[place] = value
    logits[(place + 1) % 50257] = -np.inf
    for top_k in (1, 5, None):
        with pytest.raises(ValueError, match=f"the logit of token {place} is {value}"):
            sampling.draw(logits, 0.5, 1.0, top_k)


SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 1.0, 1.0000001, -np.inf)
FLOATS = st.one_of(st.sampled_from(SPECIAL), st.floats(-40, 40, width=32), st.floats(width=32))


@settings(max_examples=1000, deadline=None)
@given(
    values=st.lists(FLOATS, max_size=40),
    repeats=st.sampled_from((1, 1, 7, 40)),
    dtype=st.sampled_from(("float32", "float32", "float64", "float16", "strided")),
    uniform=st.floats(0, 1, exclude_max=True),
    temperature=st.one_of(st.floats(0.05, 5), st.floats(0, 1e308, exclude_min=True)),
    top_k=st.one_of(st.none(), st.integers(1, 10), st.integers(1, 2**62)),
    top_p=st.one_of(st.none(), st.floats(0, 1, exclude_min=True)),
)
@example([1.0, 1.0], 7, "float32", 0.5, 1.0, 2**62, 1.0)
@example([0.0, -np.inf, 3.4e38], 40, "float32", 0.5, 1e-308, None, 5e-324)
@pytest.mark.skipif(native is None, reason="the native executor is not built")
def test_both_ways_give_the_same(
    values: list[float],
    repeats: int,
    dtype: str,
    uniform: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """To the last bit: neither ids nor errors ever differ."""
    with np.errstate(over="ignore"):
        wide = np.array(values * repeats, np.float32)
        logits = np.repeat(wide, 2)[::2] if dtype == "strided" else wide.astype(dtype)
    found = []
    for module in (native, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_native", module)
            try:
                found.append(str(sampling.draw(logits, uniform, temperature, top_k, top_p)))
            except ValueError as error:
                found.append(str(error))
    assert found[0] == found[1]


@pytest.mark.skipif(native is None, reason="the native executor is not built")
@pytest.mark.parametrize("top_k", [None, 5, 600])
def test_both_ways_give_the_same_for_a_whole_vocabulary(top_k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        logits = (random.standard_normal(50257) * 3).astype(np.float16).astype(np.float32)  # with many equals
        uniform, temperature, top_p = random.random(), random.uniform(0.1, 3.0), random.choice([None, 0.5, 0.99])
        found = []
        for module in (native, None):
            monkeypatch.setattr(sampling, "_native", module)
            found.append(sampling.draw(logits, uniform, temperature, top_k, top_p))
        assert found[0] == found[1]


NUMBERS = st.floats(-50, 50, width=32)
IDS = st.lists(st.integers(0, 199), max_size=12, unique=True).map(lambda ids: np.array(ids, np.int32))


@given(
    data=st.data(),
    repetition=st.floats(0.1, 3),
    penalties=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    ids=st.tuples(IDS, IDS, IDS, IDS),
)
@settings(max_examples=200, deadline=None)
def test_adjusted_logits(
    data: st.DataObject, repetition: float, penalties: tuple[float, float], ids: tuple[np.ndarray, ...]
) -> None:
    """Bias, penalties, allowed and forbidden ids, by their definition, and the same bits both ways."""
    logits = np.array(data.draw(st.lists(NUMBERS, min_size=200, max_size=200)), np.float32)
    biased, seen, allowed, forbidden = ids
    bias = np.array(data.draw(st.lists(st.floats(-100, 100), min_size=len(biased), max_size=len(biased))), np.float64)
    counts = np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(seen), max_size=len(seen))), np.int32)
    how = sampling.Adjustment(biased, bias, seen, counts, repetition, *penalties, allowed, forbidden)
    expected = logits.astype(np.float64)
    expected[biased] += bias
    expected[seen] = np.where(expected[seen] > 0, expected[seen] / repetition, expected[seen] * repetition)
    expected[seen] -= np.where(counts > 0, penalties[0] * counts + penalties[1], 0)
    if len(allowed):
        expected[np.setdiff1d(np.arange(200), allowed)] = -np.inf
    expected[forbidden] = -np.inf
    found = sampling.adjust(logits, how)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found, sampling._adjust(logits, how))
    for bad in (-1, 200):
        with pytest.raises(ValueError, match="token ids of the vocabulary"):
            sampling.adjust(logits, sampling.Adjustment(forbidden=np.array([bad], np.int32)))


@given(logits=st.lists(NUMBERS | st.just(-np.inf), min_size=1, max_size=300), count=st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_log_probabilities(logits: list[float], count: int) -> None:
    array = np.array(logits, np.float32)
    expected = np.logaddexp.reduce(array.astype(np.float64))
    found = sampling.log_sum_exp(array)
    assert found == expected or abs(found - expected) <= 1e-12 * max(1.0, abs(expected))
    order = sorted(range(len(array)), key=lambda id: (-array[id], id))
    assert sampling.largest(array, count) == order[:count]


@given(logits=st.lists(NUMBERS, min_size=1, max_size=100), uniform=st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_min_p(logits: list[float], uniform: float) -> None:
    """Nothing is drawn whose probability is below the share; with a share of 1 it is that of the largest."""
    array = np.array(logits, np.float32)
    for least in (0.2, 1.0):
        drawn = sampling.draw(array, uniform, 0.7, min_p=least)
        assert np.exp((float(array[drawn]) - float(array.max())) / 0.7) >= least
