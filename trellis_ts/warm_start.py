"""Training that begins with a trained model: which settings go along, and which cannot be changed."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from trellis_ts.config import HOMES, ExperimentConfig, ModelConfig
from trellis_ts.datasets.covariates import covariate_options
from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from trellis_ts.checkpoints import Checkpoint

_LENGTHS = ("context_length", "prediction_length", "patch_length", "patch_stride", "season_length")
# Of the learning rate of the first training: what was learnt is to be adjusted, not learnt anew.
_RATE_SHARE = 0.3


def continue_settings(config: ExperimentConfig, start: Checkpoint) -> ExperimentConfig:
    """The settings of a training that begins with a model: its network, lengths, loss and columns.

    Args:
        config: as asked for.
        start: the model.

    Raises:
        ConfigError: a setting was named that the model has otherwise.
    """
    experiment, shape, data = start.experiment, start.model.shape, start.data
    fixed: dict[str, Any] = {each.name: getattr(experiment.model, each.name) for each in fields(ModelConfig)}
    fixed |= {name: getattr(shape, name) for name in _LENGTHS}
    fixed |= {name: getattr(experiment.training, name) for name in ("loss", "quantile_levels")}
    defaults = ExperimentConfig()
    for name, value in fixed.items():
        # The command line names every setting; one at its default was not asked for.
        asked, default = (getattr(getattr(each, HOMES[name]), name) for each in (config, defaults))
        if name in config.named and asked not in (value, default):
            raise ConfigError(
                f"{name}={_spell(asked)} is not the {_spell(value)} of the model to start from; leave it out, or train "
                "without a start"
            )
    chosen: dict[str, Any] = {"time": data.time_column, "id": data.id_column, "target": data.channels}
    chosen |= covariate_options(data.covariates)
    chosen["initial_skip"] = experiment.training.initial_skip
    chosen["learning_rate"] = _RATE_SHARE * experiment.training.learning_rate
    fixed |= {name: value for name, value in chosen.items() if name not in config.named}
    return replace(config.replace_settings(**fixed), named=tuple(sorted({*config.named, *fixed})))


def _spell(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
