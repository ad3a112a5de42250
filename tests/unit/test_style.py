"""Style transfer as augmentation."""

from __future__ import annotations

import numpy as np

from pipeline.kernels.stain import tissue_mask
from pipeline.slides.synthetic import make_field
from pipeline.training.style import random_style, restyle, tones

VIOLET, _ = make_field(240, 220, 0.5, seed=1, stain="violet")
ROSE, _ = make_field(240, 220, 0.5, seed=2, stain="rose")


def known(image: np.ndarray) -> np.ndarray:
    found = tones(image)
    assert found is not None
    return found


def test_a_field_takes_on_anothers_tones() -> None:
    own, target = known(VIOLET), known(ROSE)
    moved = restyle(VIOLET, own, target, 1.0)
    assert np.abs(known(moved) - target).max() < 0.1 < np.abs(own - target).max()
    np.testing.assert_array_equal(restyle(VIOLET, own, target, 0.0), VIOLET)
    np.testing.assert_array_equal(restyle(VIOLET, own, own, 1.0)[tissue_mask(VIOLET)], VIOLET[tissue_mask(VIOLET)])


def test_a_part_is_moved_as_its_field_is() -> None:
    own, target = known(VIOLET), known(ROSE)
    whole = restyle(VIOLET, own, target, 0.8)
    np.testing.assert_array_equal(restyle(VIOLET[30:90, 40:99], own, target, 0.8), whole[30:90, 40:99])


def test_random_styles_lie_between() -> None:
    own, target = known(VIOLET), known(ROSE)
    full = restyle(VIOLET, own, target, 1.0).astype(int)
    step = np.abs(full - VIOLET).mean()
    for seed in range(8):
        moved = random_style(VIOLET, own, [target], np.random.default_rng(seed))
        assert 0.4 * step < np.abs(moved.astype(int) - VIOLET).mean() <= 1.01 * step
        again = random_style(VIOLET, own, [target], np.random.default_rng(seed))
        np.testing.assert_array_equal(moved, again)


def test_white_has_no_style() -> None:
    white = np.full((60, 60, 3), 245, np.uint8)
    assert tones(white) is None
    assert random_style(white, None, [known(ROSE)], np.random.default_rng(0)) is white
    assert random_style(VIOLET, known(VIOLET), [], np.random.default_rng(0)) is VIOLET
    np.testing.assert_array_equal(restyle(white, known(VIOLET), known(ROSE), 1.0) > 235, True)
