"""What is looked at while training."""

import pytest

from jaxgen.data.config import DataConfig
from jaxgen.errors import UserError
from jaxgen.train.config import EvalConfig, RunConfig
from jaxgen.train.evaluation import check_metric, scores_of


def check(metric, name="scenes", diversity=0):
    config = RunConfig(data=DataConfig(name=name), eval=EvalConfig(metric=metric, diversity=diversity))
    check_metric(config, scores_of(config))


def test_a_metric_is_one_of_the_scores_to_come():
    for metric in ("eval/loss", "eval/exact", "eval/exact_count", "eval/colour"):
        check(metric)
    check("eval/diversity", diversity=4)
    for metric, name in (("eval/exakt", "scenes"), ("eval/exact", "emoji"), ("eval/diversity", "scenes"), ("loss", "emoji")):
        with pytest.raises(UserError, match=f"^eval.metric={metric}: this data set has eval/loss"):
            check(metric, name)
