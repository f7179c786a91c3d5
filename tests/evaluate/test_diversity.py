import math

import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.evaluate.diversity import correct_diversity, distances, diversity
from jaxgen.train.config import EvalConfig


def flat(*levels):
    """Pictures of one level each, uint8 [N, 4, 4, 3]."""
    return np.array(levels, np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)


def test_distances_are_those_counted_by_hand():
    np.testing.assert_allclose(distances(flat(0, 51, 255)), [0.2, 1.0, 0.8])  # pairs 01, 02, 12; nothing wraps at 0
    half = flat(0, 0)
    half[1, :2] = 255  # half of the pixels by the whole range
    np.testing.assert_allclose(distances(half), [math.sqrt(0.5)])


class Draws:
    def sample(self, prompts, num_images, seed):
        assert (num_images, seed) == (4, 7)
        return np.concatenate([flat(0, 0, 0, 255) if prompt == "varied" else flat(9, 9, 9, 9) for prompt in prompts])


def test_diversity_is_the_mean_over_pairs_and_prompts():
    assert diversity(Draws(), ["varied", "collapsed"], seed=7) == pytest.approx(3 / 6 / 2)
    assert diversity(Draws(), ["collapsed"], seed=7) == 0.0


def test_only_correct_pictures_count():
    images = np.stack([flat(0, 51, 255), flat(0, 255, 255), flat(0, 255, 0)])
    exact = np.array([[True, True, False], [False, True, False], [True, True, True]])
    assert correct_diversity(images, exact) == pytest.approx((0.2 + 2 / 3) / 2)  # the second has one, so no pair
    assert math.isnan(correct_diversity(images, np.zeros((3, 3), bool)))


def test_a_number_of_prompts_is_not_negative():
    with pytest.raises(UserError, match=r"eval.diversity=-1"):
        EvalConfig(diversity=-1).validate()
