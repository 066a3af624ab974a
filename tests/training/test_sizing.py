"""Lengths chosen from the data: those asked for are kept, the others fit the rows there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis_ts.config import WindowConfig
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.sizing import choose_prediction_length, choose_season_length, choose_shape, explain_shape


@pytest.mark.parametrize(
    ("freq", "rows", "lengths"),
    # context, horizon, patch, season
    [
        ("h", 5000, (192, 48, 12, 24)),
        ("D", 1000, (56, 14, 4, 7)),
        ("MS", 200, (48, 12, 3, 12)),
        ("15min", 5000, (672, 96, 42, 96)),
        ("h", 60, (19, 10, 1, 24)),
        ("D", 12, (3, 2, 1, 7)),
    ],
)
def test_lengths_for_a_frequency(make_panel, freq, rows, lengths):
    shape = choose_shape(make_panel((rows,), freq=freq), WindowConfig(), train_rows=int(0.8 * rows))
    chosen = (shape.context_length, shape.prediction_length, shape.patch_length, shape.season_length)
    assert chosen == lengths
    assert shape.patch_stride == shape.patch_length


@given(
    rows=st.integers(4, 400),
    context=st.none() | st.integers(1, 60),
    horizon=st.none() | st.integers(1, 30),
    patch=st.none() | st.integers(1, 20),
)
def test_what_is_asked_for_is_kept_and_all_fits(make_panel, rows, context, horizon, patch):
    panel, train_rows = make_panel((rows,)), int(0.8 * rows)
    window = WindowConfig(context_length=context, prediction_length=horizon, patch_length=patch)
    try:
        shape = choose_shape(panel, window, train_rows=train_rows)
    except (ConfigError, DataError):
        needed = (context or patch or 1) + choose_prediction_length(panel, window)
        assert needed > train_rows or (context is not None and patch is not None and patch > context)
        return
    assert shape.context_length + shape.prediction_length <= train_rows
    for name, value in (("context_length", context), ("prediction_length", horizon), ("patch_length", patch)):
        assert value is None or getattr(shape, name) == value


def test_the_season_asked_for_comes_before_that_of_the_benchmark_and_of_the_calendar(make_panel):
    panel = make_panel((500,), freq="h")
    assert choose_season_length(panel, WindowConfig()) == 24
    assert choose_season_length(replace(panel, dataset="Traffic"), WindowConfig()) == 168
    assert choose_season_length(replace(panel, dataset="ETTm1"), WindowConfig()) == 96
    assert choose_season_length(replace(panel, dataset="ETTm1"), WindowConfig(season_length=5)) == 5


def test_a_context_that_does_not_fit_is_refused_with_the_numbers(make_panel):
    with pytest.raises(ConfigError, match=r"context_length=90 and prediction_length=14 exceed the 80 rows"):
        choose_shape(make_panel((100,)), WindowConfig(context_length=90), train_rows=80)
    with pytest.raises(DataError, match=r"80 training rows do not hold a patch of 30 and a horizon of 60"):
        choose_shape(make_panel((100,)), WindowConfig(patch_length=30, prediction_length=60), train_rows=80)


def test_the_choice_in_words(make_panel):
    panel = make_panel((1000,))
    text = explain_shape(choose_shape(panel, WindowConfig(), train_rows=800), panel)
    assert text == "reads 56 steps of D as 14 patches of 4, predicts 14; season of 7"
