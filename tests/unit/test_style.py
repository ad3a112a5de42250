"""Style transfer as augmentation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.kernels.stain import tissue_mask
from pipeline.slides.synthetic import make_field
from pipeline.training.field import Field
from pipeline.training.samples import Augmentation, draw_sample, prepare_field
from pipeline.training.stream import SampleStream
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


PLAIN = Augmentation(scale=(1, 1), rotation=0, flips=(), stain=0, brightness=0, blur=0, noise=0)


def field(name: str, image: np.ndarray) -> Field:
    return Field(name, "s", name, "", 0.5, image, (image[..., 0] < 120).astype(np.int32))


def test_samples_take_on_other_fields_styles() -> None:
    fields = [prepare_field(field(n, i), 0.5, styled=True) for n, i in (("a", VIOLET), ("b", ROSE))]
    stream = SampleStream(fields, np.array([1.0, 0.0]), 96, replace(PLAIN, style=1.0), seed=3)
    assert len(stream.styles) == 2
    assert stream[0][0].shape == (96, 96, 3)
    changed = 0
    for seed in range(40):
        plain = draw_sample(fields[0], 96, PLAIN, np.random.default_rng(seed))
        half = replace(PLAIN, style=0.5)
        styled = draw_sample(fields[0], 96, half, np.random.default_rng(seed), styles=stream.styles[1:])
        # Targets are those of the same place, whatever the style.
        np.testing.assert_array_equal(plain[1], styled[1])
        changed += np.abs(plain[0].astype(int) - styled[0]).mean() > 2
    assert 10 <= changed <= 30


def test_no_style_costs_nothing() -> None:
    prepared = prepare_field(field("a", VIOLET), 0.5)
    assert prepared.tones == ()
    assert SampleStream([prepared], np.ones(1), 64, PLAIN, 0).styles == []
    first = draw_sample(prepared, 64, replace(PLAIN, style=1.0), np.random.default_rng(0))
    np.testing.assert_array_equal(first[0], draw_sample(prepared, 64, PLAIN, np.random.default_rng(0))[0])


def test_shear_slants() -> None:
    stripes = np.full((200, 200, 3), 230, np.uint8)
    stripes[:, 96:104] = 60
    prepared = prepare_field(field("a", stripes), 0.5)
    slants = []
    for seed in range(12):
        image, targets = draw_sample(prepared, 120, replace(PLAIN, shear=20), np.random.default_rng(seed))
        rows = [np.flatnonzero(image[y, :, 0] < 120).mean() for y in (40, 80) if (image[y, :, 0] < 120).any()]
        if len(rows) == 2:
            slants.append((rows[1] - rows[0]) / 40)
        np.testing.assert_allclose(targets[..., 0] > 127, image[..., 0] < 145, atol=1)
    assert max(map(abs, slants)) <= np.tan(np.radians(20)) + 0.02
    assert max(slants) > 0.1
    assert min(slants) < -0.1


def test_ranges() -> None:
    for wrong in ({"style": 2}, {"style": -0.1}, {"shear": 60}, {"shear": -1}):
        with pytest.raises(ValueError, match=r"shear|style"):
            Augmentation(**wrong)
