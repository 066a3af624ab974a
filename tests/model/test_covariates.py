"""Covariates in the network: nothing at first, then each where it belongs and no further than it may reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trellis_ts.config import CovariateShape, ModelConfig, WindowShape
from trellis_ts.distributions import FAMILIES, Family
from trellis_ts.model import ForecastModel
from trellis_ts.types import Features

BATCH, CONTEXT, HORIZON, CHANNELS = 3, 12, 5, 2
EVERYTHING = CovariateShape(
    past_numbers=2,
    past_categories=(3,),
    known_numbers=1,
    known_categories=(2, 4),
    static_numbers=1,
    static_categories=(5,),
    cycles=("week",),
)
CONFIG = ModelConfig(width=8, num_heads=2, num_slots=3, num_layers=1, feedforward_width=6, covariate_width=4)


def build(
    covariates: CovariateShape, *, trained: bool = True, seed: int = 0, family: Family | None = None, **settings
) -> ForecastModel:
    shape = WindowShape(CONTEXT, HORIZON, 4, 3, 7, CHANNELS, covariates)
    torch.manual_seed(seed)
    model = ForecastModel(
        replace(CONFIG, **settings), shape, (0.1, 0.5, 0.9), family=family, implementation="reference"
    )
    if trained:
        for name, parameter in model.named_parameters():
            unknown = "embeddings" in name
            parameter.data += 0.3 * torch.randn_like(parameter)
            if unknown:
                parameter.data[0] = 0.0
    return model.double().eval()


def draw(steps: tuple[int, ...], numbers: int, sizes: tuple[int, ...], seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    observed = torch.rand(BATCH, *steps, numbers, generator=generator) > 0.2
    values = torch.randn(BATCH, *steps, numbers, generator=generator).double() * observed
    codes = [torch.randint(0, size + 1, (BATCH, *steps), generator=generator) for size in sizes]
    return Features(values, observed, torch.stack(codes, dim=-1))


@pytest.fixture
def batch(make_batch):
    plain = make_batch(rows=BATCH, context_length=CONTEXT, channels=CHANNELS)
    return plain._replace(
        past=draw((CONTEXT,), 2, (3,), 1),
        known=draw((CONTEXT + HORIZON,), 1 + 6, (2, 4), 2),
        static=draw((), 1, (5,), 3),
    )


def quantiles(model, batch):
    with torch.no_grad():
        return model(batch).quantiles


def test_without_covariates_the_network_is_as_it_was(batch):
    plain = build(CovariateShape(), trained=False)
    assert not any("covariates" in name for name in plain.state_dict())
    full = build(EVERYTHING, trained=False)
    assert {name for name in full.state_dict() if "covariates" not in name} == set(plain.state_dict())


def test_training_starts_from_the_model_without_them(batch):
    plain, full = (build(each, trained=False) for each in (CovariateShape(), EVERYTHING))
    assert torch.equal(quantiles(plain, batch), quantiles(full, batch))


def test_every_weight_learns(batch):
    model = build(EVERYTHING).train()
    model(batch).quantiles.square().sum().backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


def test_from_the_start_the_maps_into_the_network_learn(batch):
    model = build(EVERYTHING, trained=False).train()
    model.skip = None
    # The head has to let something through before what lies under it can learn.
    model(batch).quantiles.square().sum().backward()
    for name in ("past_patches", "known_patches", "static_token"):
        assert getattr(model.covariates, name).weight.grad.any(), name
    assert model.covariates.horizon.output.weight.grad.any()


@pytest.mark.parametrize("role", ["past", "known", "static"])
@pytest.mark.parametrize("part", ["values", "observed", "codes"])
def test_each_part_moves_the_forecast(batch, role, part):
    model, features = build(EVERYTHING), getattr(batch, role)
    value = getattr(features, part)
    other = ~value if part == "observed" else (value + 1) % 3 if part == "codes" else value + 1
    moved = quantiles(model, batch._replace(**{role: features._replace(**{part: other})}))
    assert (moved - quantiles(model, batch)).abs().amax(dim=(1, 2, 3)).min() > 1e-6


def test_a_future_step_moves_its_own_forecast_only(batch):
    model = build(EVERYTHING)
    for step in range(HORIZON):
        values = batch.known.values.clone()
        values[:, CONTEXT + step] += 1.0
        moved = quantiles(model, batch._replace(known=batch.known._replace(values=values))) - quantiles(model, batch)
        changed = moved.abs().amax(dim=(0, 2, 3)) > 1e-9
        assert changed.tolist() == [each == step for each in range(HORIZON)]


@pytest.mark.parametrize("family", FAMILIES)
class TestDistributions:
    def test_training_starts_from_the_model_without_covariates(self, batch, family):
        plain, full = (build(each, trained=False, family=family) for each in (CovariateShape(), EVERYTHING))
        with torch.no_grad():
            one, other = (model(batch).distribution.parameters for model in (plain, full))
        assert all(map(torch.equal, one, other))

    def test_a_future_step_moves_location_and_shape_of_its_own(self, batch, family):
        model = build(EVERYTHING, family=family)
        shaped = {"normal": (0, 1), "student_t": (0, 1, 2), "negative_binomial": (2, 3)}[family]
        for step in range(HORIZON):
            values = batch.known.values.clone()
            values[:, CONTEXT + step] += 1.0
            with torch.no_grad():
                before = model(batch).distribution.parameters
                after = model(batch._replace(known=batch.known._replace(values=values))).distribution.parameters
            for index, (one, other) in enumerate(zip(before, after, strict=True)):
                changed = (one - other).abs().amax(dim=(0, 2)) > 1e-9
                expected = [each == step and index in shaped for each in range(HORIZON)]
                assert changed.tolist() == expected, index

    def test_every_weight_learns(self, batch, family):
        model = build(EVERYTHING, family=family).train()
        model(batch).distribution.log_prob(batch.future).sum().backward()
        still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
        assert still == []


def test_a_batch_moves_with_its_covariates(batch):
    moved = batch.to(torch.device("meta"))
    for name, part in zip(moved._fields, moved, strict=True):
        for each in part if isinstance(part, Features) else [part]:
            assert each is None or each.device.type == "meta", name
    same = batch.to(torch.device("cpu"))
    assert torch.equal(same.known.codes, batch.known.codes)
    assert torch.equal(same.scale, batch.scale)


def test_steps_beyond_the_horizon_are_not_read(batch):
    longer = Features(*(torch.cat((part, part[:, :4]), dim=1) for part in batch.known))
    model = build(EVERYTHING)
    assert torch.equal(quantiles(model, batch), quantiles(model, batch._replace(known=longer)))


def test_rows_are_independent_and_channels_alike(batch):
    model = build(EVERYTHING, seasonal_cycle=False)
    together = quantiles(model, batch)
    for row in range(BATCH):
        parts = [
            None
            if part is None
            else Features(*(each[row : row + 1] for each in part))
            if isinstance(part, Features)
            else part[row : row + 1]
            for part in batch
        ]
        torch.testing.assert_close(quantiles(model, type(batch)(*parts))[0], together[row], rtol=1e-9, atol=1e-9)
    swapped = batch._replace(context=batch.context.flip(-1), observed=batch.observed.flip(-1))
    torch.testing.assert_close(quantiles(model, swapped), together.flip(2), rtol=1e-9, atol=1e-9)


def test_quantiles_do_not_cross(batch):
    model = build(EVERYTHING)
    with torch.no_grad():
        model.covariates.horizon.output.weight *= 100
    assert (quantiles(model, batch).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("role", ["past", "known", "static"])
def test_a_batch_without_what_the_model_reads_is_refused(batch, role):
    with pytest.raises(ValueError, match="and the batch has none"):
        build(EVERYTHING)(batch._replace(**{role: None}))


def test_known_covariates_that_end_too_soon_are_refused(batch):
    short = Features(*(part[:, :-1] for part in batch.known))
    with pytest.raises(ValueError, match="reach over 16 steps, context and horizon over 17"):
        build(EVERYTHING)(batch._replace(known=short))
