import itertools

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgen.data.buckets import CYCLE, BucketOrder, nearest, shapes
from jaxgen.errors import UserError


def test_shapes_have_the_square_s_pixels_and_no_more():
    assert shapes(256, 1.0) == [(256, 256)]
    assert shapes(256, 2.0) == [(320, 192), (288, 224), (256, 256), (224, 288), (192, 320)]
    assert shapes(32, 4.0) == [(64, 16), (48, 20), (40, 24), (36, 28), (32, 32), (28, 36), (24, 40), (20, 48), (16, 64)]
    for height, width in shapes(512, 8.0):
        assert 0.85 * 512**2 < height * width <= 512**2
        assert height % 64 == width % 64 == 0
    assert shapes(20, 1.0) == [(20, 20)]
    with pytest.raises(UserError, match=r"data\.image_size=20 is no multiple of 8"):
        shapes(20, 2.0)


def test_a_picture_falls_into_the_shape_of_the_nearest_proportions():
    among = shapes(256, 2.0)
    sizes = [(4000, 3000), (300, 400), (100, 100), (101, 100), (1080, 1920), (10, 900), (900, 10), (480, 640)]
    assert nearest(np.array(sizes), among).tolist() == [1, 3, 2, 2, 4, 4, 0, 3]


def order_of(counts, batch_size=4, seed=0):
    bounds = np.cumsum([0, *counts])
    members = [np.arange(a, b) for a, b in itertools.pairwise(bounds)]
    return BucketOrder(
        members, [grain.MapDataset.range(n).seed(seed).shuffle().repeat(None) for n in counts], batch_size
    ), np.repeat(np.arange(len(counts)), counts)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 9))
def test_a_batch_is_of_one_bucket_and_an_epoch_of_a_bucket_has_each_picture_once(counts, batch_size):
    order, bucket = order_of(counts, batch_size)
    steps = 3 * sum(counts) // batch_size + 1
    seen = np.array([[order[step * batch_size + place] for place in range(batch_size)] for step in range(steps)])
    assert (bucket[seen] == bucket[seen[:, :1]]).all()
    for k, count in enumerate(counts):
        own = seen[bucket[seen[:, 0]] == k].ravel()
        for start in range(0, len(own) - count + 1, count):
            assert len(set(own[start : start + count])) == count


def test_buckets_come_as_often_as_they_have_pictures_and_evenly():
    order, bucket = order_of([900, 90, 10], batch_size=1)
    met = bucket[[order[k] for k in range(CYCLE)]]
    assert np.bincount(met).tolist() == [3686, 369, 41]
    gaps = np.diff(np.flatnonzero(met == 2))
    assert 98 <= gaps.min() <= gaps.max() <= 101
    # A bucket that hardly counts comes nonetheless, and a cycle goes on where the one before it ended.
    order, bucket = order_of([100_000, 3], batch_size=2)
    rare = [order[k] for k in range(2 * 3 * (CYCLE + 1)) if bucket[order[k]] == 1]
    assert len(rare) == 6
    assert sorted(rare[:3]) == sorted(rare[3:]) == [100_000, 100_001, 100_002]
