"""A random order without a list of it: a permutation, even, fixed by its seed, the same read whole or in stretches."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from trellis_ts import loaders
from trellis_ts.loaders import EpochSampler
from trellis_ts.shuffling import RandomOrder


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 9, 10, 1000, 4095, 4096, 65_537])
def test_every_number_comes_once(size):
    for seed in range(3):
        assert (np.sort(RandomOrder(size, (seed, 0)).at(0, size)) == np.arange(size)).all()


def test_stretches_are_those_of_the_whole():
    order = RandomOrder(10_001, (7, 3))
    whole = order.at(0, 10_001)
    assert (
        np.concatenate([order.at(start, min(start + 700, 10_001)) for start in range(0, 10_001, 700)]) == whole
    ).all()
    assert (RandomOrder(10_001, (7, 3)).at(0, 10_001) == whole).all()
    for seed in ((7, 4), (8, 3)):
        assert (RandomOrder(10_001, seed).at(0, 10_001) != whole).mean() > 0.99


def test_the_order_is_even_and_without_trend():
    size, drawn = 1_000_000, 20_000
    found = RandomOrder(size, (0, 0)).at(0, drawn)
    counts = np.histogram(found, 100, (0, size))[0]
    assert ((counts - drawn / 100) ** 2 / (drawn / 100)).sum() < 99 + 5 * np.sqrt(2 * 99)
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 5 / np.sqrt(drawn)
    assert abs(np.corrcoef(found, np.arange(drawn))[0, 1]) < 5 / np.sqrt(drawn)


def test_the_memory_of_an_epoch_does_not_grow_with_the_windows():
    tracemalloc.start()
    drawn = sum(1 for _ in EpochSampler(100_000_000, seed=0, windows_per_epoch=8192))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert drawn == 8192
    assert peak < 4 << 20


def test_few_windows_and_many_are_both_drawn_once_each(monkeypatch):
    monkeypatch.setattr(loaders, "_MOST_SHUFFLED", 99)
    for size in (99, 100, 9000):
        sampler = EpochSampler(size, seed=1, windows_per_epoch=None)
        first = list(sampler)
        assert sorted(first) == list(range(size))
        assert list(sampler) == first
        sampler.set_epoch(1)
        assert list(sampler) != first
        assert list(EpochSampler(size, seed=1, windows_per_epoch=50)) == first[:50]
