"""The search keeps the best model, goes on where it was left, and stops when it is told to."""

from __future__ import annotations

import pytest

from trellis_ts import search as module
from trellis_ts.config import ExperimentConfig
from trellis_ts.errors import ConfigError, TrellisError
from trellis_ts.search import SPACE, Search, check_installed
from trellis_ts.training import SilentObserver

SETTINGS = {"num_heads": 2, "num_layers": 1, "feedforward_width": 8, "batch_size": 16, "device": "cpu", "num_slots": 3}
SETTINGS |= {"context_length": 21, "prediction_length": 7, "patch_length": 7, "max_epochs": 2, "preset": "fast"}

pytestmark = pytest.mark.usefixtures("quiet_lightning")


@pytest.fixture
def small(monkeypatch):
    """A search of few values, all of them quick."""
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    monkeypatch.setattr(module, "SPACE", {"width": (4, 8), "learning_rate": (1e-4, 1e-2), "num_layers": (1, 2)})
    return ExperimentConfig.of(**SETTINGS)


def test_without_optuna_the_hint_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'install it with `pip install "trellis-ts\[search\]"`'):
        check_installed()


def test_every_setting_of_the_space_exists():
    for name, values in SPACE.items():
        for value in values:
            ExperimentConfig.of(**{name: value})


def test_the_best_model_is_kept_and_the_search_goes_on(small, make_panel, tmp_path):
    panel, heard = make_panel((160,), noise=0.2), []
    search = Search(panel, small, tmp_path)
    assert set(search.space) == {"width", "learning_rate"}  # what was named is not searched
    search.run(2, told=heard.append)
    assert [each.number for each in heard] == [0, 1]
    losses = [each.validation_loss for each in heard]
    best = heard[losses.index(min(losses))]
    assert search.best_loss == min(losses)
    assert search.best().experiment.model.width == best.settings["width"]
    assert search.best().experiment.training.learning_rate == best.settings["learning_rate"]
    again = Search(panel, small, tmp_path)
    assert again.best_loss == min(losses)
    again.run(3, told=heard.append)
    assert [each.number for each in again.trials()] == [0, 1, 2]
    assert not list(tmp_path.glob("trial-*"))
    assert len({each.settings["learning_rate"] for each in again.trials()}) == 3  # none is tried twice


def test_searches_side_by_side_share_a_study(small, make_panel, tmp_path):
    panel = make_panel((160,))
    one, other = Search(panel, small, tmp_path), Search(panel, small, tmp_path)
    one.run(1)
    other.run(2)
    one.run(3)
    rates = [each.settings["learning_rate"] for each in one.trials()]
    assert len(rates) == len(set(rates)) == 3
    assert one.best_loss == other.best_loss == min(each.validation_loss for each in other.trials())


def test_what_was_found_is_kept_when_it_is_stopped(small, make_panel, tmp_path):
    class Stopper(SilentObserver):
        steps = 0

        def stepped(self):
            self.steps += 1

        def should_stop(self):
            return self.steps >= 3

    search = Search(make_panel((160,)), small, tmp_path)
    search.run(5, observer=Stopper())
    assert [each.state for each in search.trials()] == ["fail"]
    assert search.best().experiment.model.num_slots == 3


def test_trials_that_fall_behind_are_cut_short(small, make_panel, tmp_path, monkeypatch):
    import optuna

    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.number == 1)
    search = Search(make_panel((160,)), small, tmp_path)
    search.run(2)
    assert [each.state for each in search.trials()] == ["complete", "pruned"]


def test_nothing_to_search_and_nothing_found(small, make_panel, tmp_path):
    everything = ExperimentConfig.of(**SETTINGS, width=8, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="nothing is left to search"):
        Search(make_panel((160,)), everything, tmp_path)
    search = Search(make_panel((160,)), small, tmp_path)
    search.run(3, seconds=0)
    with pytest.raises(TrellisError, match="no trial came to a first validation"):
        search.best()
