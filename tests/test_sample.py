"""sample.py as a function; as a command see train/test_run.py."""

import pytest

import sample


@pytest.mark.parametrize(
    ("pictures", "num_images", "several", "columns"),
    [(12, 4, False, 4), (20, 10, False, 8), (3, 1, False, 3), (32, 1, False, 8), (1, 1, False, 1), (12, 4, True, 12)],
)
def test_rows_of_a_sheet_are_models_or_prompts(pictures, num_images, several, columns):
    assert sample.in_a_row(pictures, num_images, several) == columns
