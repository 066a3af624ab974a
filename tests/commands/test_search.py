"""``trellis search``: what it shows, writes, goes on with and refuses."""

from __future__ import annotations

import pytest

from trellis_ts import search as module


@pytest.fixture
def options(tiny, monkeypatch):
    """A search of two settings with quick trials."""
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    monkeypatch.setattr(module, "SPACE", {"dropout": (0.0, 0.2), "learning_rate": (1e-3, 1e-2)})
    return ("search", "wide.csv", "-o", "m", *tiny)


def test_a_table_of_trials_and_a_model(trellis, refused, wide, make_wide, options):
    result = trellis(*options, "--trials", "2")
    assert result.out.splitlines()[0].split() == ["trial", "dropout", "learning_rate", "validation", "loss", "state"]
    assert "saved to m; next: trellis evaluate m wide.csv" in result.out
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["trial 0", "trial 1"]
    assert len(trellis("forecast", "m", "wide.csv").out.splitlines()) == 13
    result = trellis(*options, "--trials", "3", "--json")
    assert "going on after 2 trials" in result.err
    assert [each["number"] for each in sorted(result.data["trials"], key=lambda each: each["number"])] == [0, 1, 2]
    assert result.data["validation_loss"] == min(each["validation_loss"] or 9 for each in result.data["trials"])
    assert "holds a search of other data or settings" in refused(*options, "--loss", "mae")
    make_wide(130).to_csv("wide.csv", index=False)
    assert "holds a search of other data or settings" in refused(*options)
    trellis(*options, "--trials", "1", "--overwrite")


def test_what_is_refused(refused, wide, options, monkeypatch):
    assert "--trials 0 must be at least 1" in refused(*options, "--trials", "0")
    assert "did you mean fast?" in refused(*options, "--preset", "fats")
    assert "max_time='soon' is not a duration" in refused(*options, "--max-time", "soon")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert 'install it with `pip install "trellis-ts[search]"`' in refused(*options)
