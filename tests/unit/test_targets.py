"""Targets of samples: turned and mirrored with the image, and pointing the right way."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.slides.synthetic import make_field
from pipeline.training.data import Field
from pipeline.training.labels import craft_contour, craft_hv
from pipeline.training.samples import Augmentation, PreparedField, draw_sample, jitter_colour, prepare_field
from pipeline.training.targets import IGNORED, Targets, class_map, classes_of

PLAIN = Augmentation(scale=(1, 1), rotation=0, flips=(), stain=0, brightness=0, blur=0, noise=0)


def blob(height: int = 64, width: int = 64) -> np.ndarray:
    """One lopsided nucleus: its centre of mass is not the centre of its box."""
    labels = np.zeros((height, width), np.int32)
    labels[20:44, 16:28] = 7
    labels[30:36, 28:48] = 7
    return labels


def test_hv_goes_from_one_end_to_the_other() -> None:
    hv = craft_hv(blob())
    assert hv[blob() == 0].max() == hv[blob() == 0].min() == 0
    for axis in (0, 1):
        assert (hv[..., axis].min(), hv[..., axis].max()) == (-1, 1)
    assert (np.diff(hv[33, 16:48, 0]) > 0).all()
    assert (np.diff(hv[20:44, 20, 1]) > 0).all()
    assert hv[33, 26, 0] == 0  # the centre of mass, left of the box's centre


def test_hv_of_specks_is_nothing() -> None:
    labels = np.zeros((8, 8), np.int32)
    labels[2:4, 2:5] = 1
    assert not craft_hv(labels).any()
    assert craft_hv(labels, min_area=6).any()


def test_hv_of_mirrored_labels_is_mirrored_and_its_sign_turned() -> None:
    labels = blob()
    hv = craft_hv(labels)
    for axis in (0, 1):
        mirrored = craft_hv(np.flip(labels, 1 - axis))
        back = np.flip(mirrored, 1 - axis)
        # The centre of mass is rounded to a pixel, which mirroring may round the other way.
        np.testing.assert_allclose(back[..., axis], -hv[..., axis], atol=0.12)
        np.testing.assert_allclose(back[..., 1 - axis], hv[..., 1 - axis], atol=0.12)
    turned = craft_hv(labels.T)
    np.testing.assert_allclose(turned.transpose(1, 0, 2)[..., ::-1], hv, atol=1e-6)


def test_contours_are_along_borders_and_between_nuclei() -> None:
    labels = np.zeros((30, 40), np.int32)
    labels[5:25, 5:20] = 1
    labels[5:25, 20:35] = 2
    contour = craft_contour(labels, 1)
    assert contour[10:20, 19:21].all()
    assert contour[10:20, 4:6].all()
    assert not contour[10:20, 8:16].any()
    assert not contour[:3].any()


def field(labels: np.ndarray, **more: Any) -> Field:
    image = np.repeat((200 - 120 * (labels > 0))[..., None], 3, axis=2).astype(np.uint8)
    return Field("f", "s", "p", "", 0.5, image, labels, **more)


SPEC = Targets(("nucleus", "distance", "contour", "hv", "type"), ("a", "b"), instances=True)


def named(prepared: PreparedField, targets: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(prepared.spec.names, np.moveaxis(targets, 2, 0), strict=True))


def test_order_of_the_channels() -> None:
    assert Targets().names == ("nucleus", "distance", "seam")
    assert Targets().crafted == ()
    assert SPEC.names == (
        "nucleus", "distance", "contour", "seam", "h", "v", "type", "label_high", "label_low"
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_to_a_sample_its_targets_agree(seed: int) -> None:
    image, labels = make_field(160, 160, 0.5, seed=seed)
    prepared = prepare_field(
        Field("f", "s", "p", "", 0.5, image, labels), 0.5, spec=Targets(("nucleus", "hv"), (), True)
    )
    how = Augmentation(quarter_turns=True, flips=("horizontal", "vertical"), stain=0, brightness=0, blur=0, noise=0)
    _, sample = draw_sample(prepared, 96, how, np.random.default_rng(seed))
    maps = named(prepared, sample)
    found = maps["label_high"].astype(int) * 256 + maps["label_low"]
    assert found.max() > 1
    # The label map and the warped nucleus map are of one place: they differ at borders alone.
    assert ((found > 0) != (maps["nucleus"] > 127)).mean() < 0.05
    # Within each whole nucleus h rises to the right and v downwards, however the sample was turned.
    y, x = np.mgrid[:96, :96]
    whole = [i for i in np.unique(found)[1:] if (found == i).sum() > 40 and not (found == i)[[0, -1]].any()]
    assert whole
    for label in whole:
        inside = found == label
        for name, place in (("h", x), ("v", y)):
            if np.ptp(place[inside]) > 4:
                assert np.corrcoef(place[inside], maps[name][inside].astype(float))[0, 1] > 0.9


def test_a_nucleus_cut_by_the_samples_edge_keeps_its_centre() -> None:
    labels = np.zeros((120, 120), np.int32)
    cv2.circle(labels_u8 := np.zeros((120, 120), np.uint8), (60, 60), 14, 1, -1)
    labels[labels_u8 > 0] = 1
    prepared = prepare_field(field(labels), 0.5, spec=Targets(("nucleus", "hv")))
    for seed in range(40):
        _, sample = draw_sample(prepared, 32, PLAIN, np.random.default_rng(seed))
        maps = named(prepared, sample)
        edge = maps["nucleus"][:, 0] > 127
        if edge.any() and maps["nucleus"][:, -1].max() < 128 and maps["nucleus"].mean() > 30:
            break
    else:
        pytest.fail("no sample cuts the nucleus")
    # The left end lies outside, so h begins above -1 unless the nucleus only just reaches out.
    h = maps["h"].astype(float)[maps["nucleus"] > 127]
    assert h.max() > 250
    assert h.min() > 10


def test_classes_travel_along() -> None:
    labels = blob()
    labels[2:12, 50:60] = 8
    labels[50:60, 2:12] = 9
    types = np.select([labels == 7, labels == 8], [2, 1], 0).astype(np.uint8)
    one = field(labels, types=types, classes=("Tumour", "other"))
    spec = Targets(("nucleus", "type"), ("b", "tumour"))
    names = {"Tumour": "tumour"}
    table = class_map(one, spec.classes, names)
    assert table is not None
    assert table[33, 20] == IGNORED  # `other` is none of the head's classes
    assert table[5, 55] == 2
    assert table[55, 5] == IGNORED  # a nucleus of unknown class
    assert table[0, 0] == 0
    prepared = prepare_field(one, 0.5, spec=spec, class_names=names)
    _, sample = draw_sample(prepared, 64, PLAIN, np.random.default_rng(0))
    np.testing.assert_array_equal(named(prepared, sample)["type"], table)
    without = prepare_field(field(labels), 0.5, spec=spec)
    _, sample = draw_sample(without, 64, PLAIN, np.random.default_rng(0))
    assert (named(without, sample)["type"] == IGNORED).all()
    assert classes_of([one, field(labels)], names) == ("tumour", "other")


def test_unpacked_values() -> None:
    torch = pytest.importorskip("torch")
    labels = blob()
    prepared = prepare_field(field(labels), 0.5, spec=SPEC)
    sample = np.dstack([prepared.targets, SPEC.of_sample(labels, None)])
    found = SPEC.unpack(torch.from_numpy(sample)[None])
    np.testing.assert_allclose(
        np.moveaxis(craft_hv(labels), 2, 0), np.stack([found["h"][0], found["v"][0]]), atol=0.005
    )
    assert found["label"].max() == 1
    assert found["type"].unique().tolist() == [IGNORED]
    assert float(found["h"][0, 0, 0]) == 0
    assert 0 <= float(found["distance"].min()) < float(found["distance"].max()) == 1


def test_samples_on_a_grid() -> None:
    image, labels = make_field(100, 100, 0.5, seed=0)
    prepared = prepare_field(Field("f", "s", "p", "", 0.5, image, labels), 0.5)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        crop, _ = draw_sample(prepared, 32, PLAIN, rng, stride=32)
        places = [
            (y, x) for y in (0, 32, 64, 68) for x in (0, 32, 64, 68)
            if np.array_equal(crop, image[y : y + 32, x : x + 32])
        ]  # fmt: skip
        assert len(places) == 1
        seen.add(places[0])
    assert {y for y, _ in seen} == {0, 32, 64, 68}


def test_colour_jitter() -> None:
    image = np.tile(np.array([200, 120, 160], np.uint8), (4, 4, 1))
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(jitter_colour(image, rng), image)
    for change in ({"hue": 30.0}, {"saturation": 0.5}, {"contrast": 0.5}):
        assert len({jitter_colour(image, rng, **change).tobytes() for _ in range(5)}) > 1
    with pytest.raises(ValueError, match="flips are"):
        Augmentation(flips=("diagonal",))


def test_too_many_instances_for_a_sample() -> None:
    labels = np.zeros((600, 600), np.int32)
    labels[::2, ::2] = np.arange(1, 90001).reshape(300, 300)
    with pytest.raises(PipelineError, match="65535"):
        Targets(("nucleus",), (), True).of_sample(labels, None)
