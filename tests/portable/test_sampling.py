"""Drawing one of many logits: by its definition, natively and in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

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
