"""partial_sum against sums written out one by one in float64, and its promises on order and calls."""

from __future__ import annotations

import numpy as np
import pytest

from node_agent import frame
from node_agent.partial import partial_sum

T, D = 5, 7


def linear(expert: int, precision: int, rows: np.ndarray) -> np.ndarray:
    """A stand-in expert whose value is easy to write down: rows times (expert + 1) plus precision. Each row by itself."""
    return rows * np.float32(expert + 1) + np.float32(precision)


def by_hand(x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    out = np.zeros(x.shape)
    for row, expert, precision, gate in pairs.tolist():
        out[row] += gate * (x[row].astype(np.float64) * (expert + 1) + precision)
    return out


def some_pairs(rng: np.random.Generator, rows: int) -> np.ndarray:
    pairs = [
        (row, expert, precision, rng.random())
        for row in range(rows)
        for expert in (300, 2, 11)
        for precision in (2, 0)
        if rng.random() < 0.6
    ]
    rng.shuffle(pairs)
    return np.array([tuple(pair) for pair in pairs], frame.PAIR)


@pytest.mark.parametrize("rows", [1, 2, T])
def test_sum_is_what_it_is_by_hand(rows):
    rng = np.random.default_rng(rows)
    for _ in range(20):
        x = rng.standard_normal((rows, D)).astype(np.float32)
        pairs = some_pairs(rng, rows)
        got = partial_sum(x, pairs, linear)
        assert got.dtype == np.float32 and got.shape == (rows, D)
        np.testing.assert_allclose(got, by_hand(x, pairs), rtol=1e-5, atol=1e-5 * 300)
        if len(pairs):  # negative control: one gate changed must be seen
            pairs["gate"][0] += 1
            assert np.abs(got - by_hand(x, pairs)).max() > 1e-2


@pytest.mark.parametrize("rows", [1, T])
def test_order_of_pairs_does_not_change_a_bit(rows):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, D)).astype(np.float32)
    pairs = np.array([(r, e, p, rng.random()) for r in range(rows) for e in range(6) for p in (0, 1)], frame.PAIR)
    want = partial_sum(x, pairs, linear)
    for _ in range(10):
        assert partial_sum(x, rng.permutation(pairs), linear).tobytes() == want.tobytes()


def test_a_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((T, D)).astype(np.float32)
    pairs = some_pairs(rng, T)
    whole = partial_sum(x, pairs, linear)
    for row in range(T):
        own = pairs[pairs["row"] == row].copy()
        own["row"] = 0
        assert np.array_equal(partial_sum(x[row : row + 1], own, linear)[0], whole[row])


@pytest.mark.parametrize("rows", [1, 4])
def test_each_expert_runs_once_in_ascending_order_and_may_reuse_its_buffer(rows):
    calls = []
    buffer = np.empty((rows, D), np.float32)

    def expert(number: int, precision: int, x: np.ndarray) -> np.ndarray:
        calls.append((number, precision, x.shape[0]))
        buffer[: len(x)] = linear(number, precision, x)
        return buffer[: len(x)]

    x = np.ones((rows, D), np.float32)
    pairs = np.array([(r, e, p, 0.5) for e, p in ((9, 0), (2, 2), (2, 1)) for r in range(rows)], frame.PAIR)
    got = partial_sum(x, pairs, expert)
    assert calls == [(2, 1, rows), (2, 2, rows), (9, 0, rows)]
    assert np.array_equal(got, np.full((rows, D), 0.5 * (3 + 1) + 0.5 * (3 + 2) + 0.5 * 10, np.float32))


def test_rows_without_a_pair_are_zero():
    x = np.ones((3, D), np.float32)
    got = partial_sum(x, np.array([(1, 0, 0, 2.0)], frame.PAIR), linear)
    assert got[1].tolist() == [2.0] * D and not got[[0, 2]].any()
    assert not partial_sum(x[:1], np.empty(0, frame.PAIR), linear).any()


@pytest.mark.parametrize("rows", [1, 3])
def test_the_same_pair_twice_is_refused(rows):
    pairs = np.array([(0, 4, 1, 0.5), (0, 5, 1, 0.5), (0, 4, 1, 0.5)], frame.PAIR)
    with pytest.raises(ValueError, match="expert 4 .*twice"):
        partial_sum(np.ones((rows, D), np.float32), pairs, linear)
    pairs["precision"][2] = 2  # another precision of the same expert is another expert
    partial_sum(np.ones((rows, D), np.float32), pairs, linear)


def test_dynamic_int8_is_run_row_by_row():
    calls = []

    def batch_dependent(expert: int, precision: int, rows: np.ndarray) -> np.ndarray:
        calls.append(len(rows))
        return rows * np.abs(rows).max()  # like one activation scale for the whole call

    x = np.array([[1.0, -2.0], [30.0, 4.0]], np.float32)
    pairs = np.array(
        [(0, 5, frame.PRECISION_ID["int8dyn"], 0.5), (1, 5, frame.PRECISION_ID["int8dyn"], 1.0)], frame.PAIR
    )
    assert partial_sum(x, pairs, batch_dependent).tolist() == [[1.0, -2.0], [900.0, 120.0]]
    assert calls == [1, 1]
    pairs["precision"] = frame.PRECISION_ID["int8"]
    assert partial_sum(x, pairs, batch_dependent)[0].tolist() == [15.0, -30.0]  # control: the whole batch's scale
