import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.train.config import OptimizerConfig, RunConfig, TrainConfig
from jaxgen.train.optimizers import learning_rate, same_until
from jaxgen.train.workdir import check_same


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("constant", {5: 0.5, 10: 1.0, 40: 1.0, 109: 1.0}),
        ("linear", {5: 0.5, 10: 1.0, 60: 0.5, 110: 0.0}),
        ("cosine", {5: 0.5, 10: 1.0, 60: 0.5, 35: (1 + np.cos(np.pi / 4)) / 2, 110: 0.0}),
        ("trapezoid", {5: 0.5, 10: 1.0, 60: 1.0, 85: 0.5, 110: 0.0}),
    ],
)
def test_schedules_against_their_definitions(schedule, at):
    """Ten steps of warm-up, a hundred more; a trapezoid falls over the last half of these."""
    config = OptimizerConfig(learning_rate=0.02, warmup_steps=10, schedule=schedule, decay_share=0.5)
    rate = learning_rate(config, 110)
    for step, share in at.items():
        np.testing.assert_allclose(rate(step), 0.02 * share + (0.1 * 0.02 / 2 if step == 5 else 0), rtol=1e-5, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["constant", "linear", "cosine", "trapezoid"]),
    st.integers(0, 8),
    st.integers(10, 40),
    st.integers(10, 40),
    st.integers(0, 40),
)
def test_runs_are_alike_as_long_as_every_rate_is(schedule, warmup, one, other, step):
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup)
    rates = [[float(learning_rate(config, steps)(k)) for k in range(step)] for steps in (one, other)]
    assert same_until(config, one, other, step) == (rates[0] == rates[1])


def test_a_run_can_be_made_longer_before_its_rate_falls(tmp_path):
    config = RunConfig(train=TrainConfig(steps=100), optimizer=OptimizerConfig(schedule="trapezoid", warmup_steps=10))
    longer = dataclasses.replace(config, train=TrainConfig(steps=200))
    check_same(tmp_path, configs.to_dict(config), longer, 70)  # which falls from step 73 on
    with pytest.raises(UserError, match=r"train.steps \(100 there, 200 here\).* up to step 90 stays the same"):
        check_same(tmp_path, configs.to_dict(config), longer, 90)
    cosine = dataclasses.replace(config, optimizer=OptimizerConfig(schedule="cosine", warmup_steps=10))
    with pytest.raises(UserError, match=r"train.steps \(100 there, 200 here\)"):
        check_same(tmp_path, configs.to_dict(cosine), dataclasses.replace(longer, optimizer=cosine.optimizer), 70)
