from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.kernels import stain

TYPICAL = stain.RUIFROK
OTHER = np.array([[0.58, 0.75, 0.32], [0.15, 0.88, 0.45]])
OTHER = OTHER / np.linalg.norm(OTHER, axis=1, keepdims=True)


def mixture(
    vectors: np.ndarray, strengths: tuple[float, ...] = (1.0, 1.0), n: int = 40_000, seed: int = 0
) -> np.ndarray:
    """Pixels of two stains that rarely meet, with a little sensor noise, uint8 (n, 3)."""
    random = np.random.default_rng(seed)
    amounts = random.gamma(2.0, 0.3, (n, len(vectors)))
    pure = random.random(n)[:, None] < 0.5
    amounts *= np.where(np.arange(len(vectors)) % 2, pure, ~pure) * 0.8 + 0.05
    values = 256 * np.exp(-(amounts * np.array(strengths)[: len(vectors)]) @ vectors) - 1
    return np.clip(np.rint(values + random.normal(0, 2, values.shape)), 0, 255).astype(np.uint8)


def reference() -> dict:
    return stain.fit_reference(mixture(OTHER, (0.8, 1.3), seed=9))


def test_od_of_every_value_comes_back() -> None:
    values = np.arange(256, dtype=np.uint8)
    assert np.array_equal(stain.od_to_rgb(stain.rgb_to_od(values)), values)
    assert stain.rgb_to_od(values)[255] == 0
    assert (np.diff(stain.rgb_to_od(values)) < 0).all()


def test_macenko_finds_the_vectors() -> None:
    for vectors in (TYPICAL, OTHER):
        found = stain.extract_macenko(stain.tissue_pixels(mixture(vectors)))
        assert max(stain.angle(a, b) for a, b in zip(found, vectors, strict=True)) < 6
        assert np.allclose(np.linalg.norm(found, axis=1), 1)


@pytest.mark.parametrize("method", ["macenko", "reinhard", "histogram"])
def test_transform_brings_the_slide_to_the_reference(method: str) -> None:
    source, target = mixture(TYPICAL, (1.0, 1.0)), mixture(OTHER, (0.8, 1.3), seed=9)
    transform, fit = stain.fit_transform(stain.tissue_pixels(source), method, reference())
    before = np.abs(source.mean(0) - target.mean(0)).max()
    after = np.abs(transform.apply(source).mean(0, dtype=float) - target.mean(0)).max()
    assert after < min(8, before / 2)
    assert fit


@pytest.mark.parametrize("method", ["macenko", "reinhard", "histogram"])
def test_white_stays_white_and_towards_itself_nothing_moves(method: str) -> None:
    source = mixture(TYPICAL)
    transform, _ = stain.fit_transform(stain.tissue_pixels(source), method, reference())
    assert (transform.apply(np.full((2, 3), 255, np.uint8)) == 255).all()
    assert transform.apply(np.full((2, 3), 247, np.uint8)).min() >= 235
    own, _ = stain.fit_transform(stain.tissue_pixels(source), method, stain.fit_reference(source))
    moved = np.abs(own.apply(source).astype(int) - source)
    assert np.percentile(moved, 95) <= 12  # what lies off the plane of the two stains is projected onto it
    assert moved.mean() < 3


@pytest.mark.parametrize("method", ["none", "macenko", "reinhard", "histogram"])
def test_json_gives_the_same_transform(method: str) -> None:
    source = mixture(TYPICAL)
    transform, _ = stain.fit_transform(stain.tissue_pixels(source), method, reference())
    again = stain.StainTransform.from_json(json.loads(json.dumps(transform.to_json())))
    assert again == transform
    assert np.array_equal(again.apply(source), transform.apply(source))


def test_matrix_transform_is_the_formula() -> None:
    random = np.random.default_rng(3)
    rgb = random.integers(0, 256, (300, 200, 3), dtype=np.uint8)
    matrix = np.array([[0.9, 0.1, 0.05], [0.05, 1.1, -0.1], [-0.02, 0.1, 0.8]])
    transform = stain.StainTransform("matrix", matrix=tuple(map(tuple, matrix.tolist())))
    expected = stain.od_to_rgb(stain.rgb_to_od(rgb).astype(float) @ matrix)
    moved = transform.apply(rgb).astype(int)
    assert np.abs(moved - expected).max() <= 1
    assert (moved != expected).mean() < 1e-3


def test_reinhard_is_the_formula() -> None:
    from skimage.color import lab2rgb

    rgb = mixture(TYPICAL, n=4000)
    transform, _ = stain.fit_transform(stain.tissue_pixels(mixture(TYPICAL)), "reinhard", reference())
    scale, offset = transform.lab_affine()
    lab = stain.rgb_to_lab(rgb) * scale + offset
    moved = np.clip(lab2rgb(lab[None])[0], 0, 1) * 255
    weight = np.minimum(1, stain.rgb_to_od(rgb).mean(-1, keepdims=True) / stain.TISSUE_OD)
    expected = rgb + weight * (moved - rgb)
    inside = ((moved > 1) & (moved < 254)).all(axis=1)
    assert np.abs(transform.apply(rgb) - expected)[inside].max() <= 2.5


@settings(deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(0, 5), st.integers(1, 5), st.just(3))))
def test_pixels_are_independent(rgb: np.ndarray) -> None:
    for transform in (
        stain.StainTransform(),
        stain.StainTransform("matrix", matrix=((1.1, 0, 0), (0, 0.9, 0.1), (0, 0, 1))),
        stain.StainTransform("reinhard", source=((50, 20, -9), (9, 8, 7)), target=((60, 25, -12), (12, 8, 6))),
        stain.StainTransform("lut", lut=(tuple(range(255, -1, -1)),) * 3),
    ):
        whole = transform.apply(rgb)
        assert whole.shape == rgb.shape
        assert whole.dtype == np.uint8
        for y, x in np.ndindex(rgb.shape[:2]):
            assert np.array_equal(transform.apply(rgb[y, x]), whole[y, x])


def test_non_contiguous_input() -> None:
    rgb = mixture(TYPICAL, n=4096).reshape(64, 64, 3)
    transform, _ = stain.fit_transform(stain.tissue_pixels(mixture(TYPICAL)), "macenko", reference())
    assert np.array_equal(transform.apply(rgb[::2, ::-3]), transform.apply(rgb)[::2, ::-3])


def pen(colour: tuple[float, float, float]) -> np.ndarray:
    return np.array([colour]) / np.linalg.norm(colour)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((5000, 3), 246, np.uint8), "only 0 tissue pixels"),
        (mixture(TYPICAL, n=500), "tissue pixels, at least"),
        (np.tile(np.array([120, 60, 140], np.uint8), (5000, 1)), "one hue"),
        (mixture(TYPICAL[:1]), "one stain"),
        (mixture(pen((0.85, 0.5, 0.12))), "tissue pixels, at least"),
        (mixture(pen((0.75, 0.15, 0.6))), "tissue pixels, at least"),
        (mixture(np.array([[0.65, 0.70, 0.29], [0.2, 0.4, 0.9]])), "another stain"),
    ],
    ids=["white", "tiny", "one colour", "one stain", "blue pen", "green pen", "another stain"],
)
def test_degenerate_slides_are_told(pixels: np.ndarray, reason: str) -> None:
    with pytest.raises(stain.StainFitError, match=reason):
        stain.fit_transform(stain.tissue_pixels(pixels), "macenko", reference())


def test_pen_beside_tissue_does_not_bend_the_fit() -> None:
    tissue = mixture(TYPICAL)
    marked = np.concatenate([tissue, mixture(pen((0.85, 0.5, 0.12)), n=10_000)])
    clean = stain.fit_stains(stain.tissue_pixels(tissue), stain.extract_macenko)
    found = stain.fit_stains(stain.tissue_pixels(marked), stain.extract_macenko)
    assert np.abs(np.subtract(clean["matrix"], found["matrix"])).max() < 0.05


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        ([[np.nan, 1, 0], [0, 1, 0]], "finite"),
        ([[0, 0, 0], [0, 1, 0]], "finite"),
        ([[0.6, -0.7, 0.3], [0.07, 0.99, 0.11]], "wrong way"),
        ([[0.65, 0.7, 0.29], [0.6, 0.72, 0.29]], "apart"),
        ([[0.9, 0.1, 0.4], [0.07, 0.99, 0.11]], "pen or another"),
    ],
)
def test_bad_matrices_are_refused(matrix: list[list[float]], reason: str) -> None:
    with pytest.raises(stain.StainFitError, match=reason):
        stain.check_matrix(np.array(matrix))


def test_too_different_strengths_are_refused() -> None:
    far = reference()
    far["macenko"]["max_concentrations"] = [100.0, 1.0]
    with pytest.raises(stain.StainFitError, match="strength"):
        stain.fit_transform(stain.tissue_pixels(mixture(TYPICAL)), "macenko", far)


GLASS = np.array([236, 240, 246], np.uint8)


def on_glass(share: float) -> np.ndarray:
    """Pale tissue as a scanner with bluish glass sees it, beside some of that glass, uint8 (n, 3)."""
    tissue = mixture(TYPICAL, (0.4, 0.4))
    seen = np.rint(tissue * (GLASS / 255.0)).astype(np.uint8)
    return np.concatenate([seen, np.tile(GLASS, (round(share / (1 - share) * len(seen)), 1))])


def test_white_is_the_glass_where_there_is_some() -> None:
    assert np.allclose(stain.white_level(on_glass(0.05)), stain.rgb_to_od(GLASS))
    assert not stain.white_level(mixture(TYPICAL, (3.0, 3.0))[: 10**4] // 2).any()  # nothing but dark tissue
    assert not stain.white_level(np.empty((0, 3), np.uint8)).any()
    assert not stain.white_level(np.full((50, 50, 3), 255, np.uint8)).any()


def test_a_speck_is_no_glass() -> None:
    rgb = on_glass(0.05)
    speck = np.full((len(rgb) // 1000, 3), 255, np.uint8)
    assert np.allclose(stain.white_level(np.concatenate([rgb, speck])), stain.rgb_to_od(GLASS))


def test_filler_is_no_glass() -> None:
    rng = np.random.default_rng(3)
    filler = np.full((3000, 3), 255, np.uint8)
    glass = np.rint(GLASS + rng.normal(0, 1, (3000, 1))).clip(0, 255).astype(np.uint8)
    scanned = np.concatenate([np.rint(mixture(TYPICAL) * (GLASS / 255)).astype(np.uint8), glass])
    assert np.allclose(stain.white_level(np.concatenate([scanned, filler])), stain.white_level(scanned))
    # Glass that the scanner shows as white: its noise and the edges of tissue come near it.
    near = np.rint(255 - np.abs(rng.normal(0, 4, (3000, 1))) * np.ones(3)).astype(np.uint8)
    for strength in (0.2, 0.4, 1.0):
        tissue = mixture(TYPICAL, (strength, strength))
        assert not stain.white_level(np.concatenate([tissue, near, filler])).any()
        assert not stain.white_level(np.concatenate([tissue, filler])).any()


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_glass_becomes_white_however_much_stains_are_strengthened(strength: float) -> None:
    rgb = on_glass(0.05)
    target = stain.fit_reference(mixture(TYPICAL, (1.6, 1.6)))
    plain, corrected = (
        stain.fit_transform(stain.tissue_pixels(rgb), "macenko", target, strength=strength, white=white)[0]
        for white in (None, stain.white_level(rgb))
    )
    assert (corrected.apply(GLASS[None]) == 255).all()
    assert (corrected.apply(np.full((1, 3), 255, np.uint8)) == 255).all()
    assert plain.apply(GLASS[None]).min() < 236
    assert stain.StainTransform.from_json(json.loads(json.dumps(corrected.to_json()))) == corrected
    # As the same tissue would have come out on clear glass.
    clear = mixture(TYPICAL, (0.4, 0.4))
    wanted = stain.fit_transform(stain.tissue_pixels(clear), "macenko", target, strength=strength)[0].apply(clear)
    assert np.abs(corrected.apply(rgb)[: len(clear)].astype(int) - wanted).mean() < 4


@pytest.mark.parametrize("white", [(0.1,), (-0.1, 0, 0), (float("nan"), 0, 0)])
def test_impossible_white_is_refused(white: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="white of a stain transform"):
        stain.StainTransform("matrix", matrix=((1, 0, 0), (0, 1, 0), (0, 0, 1)), white=white)
    with pytest.raises(ValueError, match="has no white"):
        stain.StainTransform(white=(0.1, 0.1, 0.1))


def test_half_of_a_matrix_method_is_the_geometric_mean() -> None:
    rgb = mixture(TYPICAL)
    pixels = stain.tissue_pixels(rgb)
    none, full, half = (stain.fit_transform(pixels, "macenko", reference(), strength=s)[0] for s in (0.0, 1.0, 0.5))
    assert np.array_equal(none.apply(rgb), rgb)
    # Clamping aside, OD is the mean of both ends' OD.
    mean = (stain.rgb_to_od(rgb) + stain.rgb_to_od(full.apply(rgb))) / 2
    assert np.abs(half.apply(rgb).astype(int) - stain.od_to_rgb(mean)).max() <= 2


def test_new_stains_are_normalised_further_than_known_ones() -> None:
    def turned(degrees: float) -> dict:
        along, up = TYPICAL[0], np.cross(TYPICAL[0], TYPICAL[1])
        up = up / np.linalg.norm(up)
        return {"matrix": [np.cos(np.radians(degrees)) * along + np.sin(np.radians(degrees)) * up, TYPICAL[1]]}

    own = turned(0)
    found = [stain.adapted_strength(turned(degrees), own, 0.25) for degrees in (0, 9.9, 12, 14.1, 25)]
    assert found == pytest.approx([0.25, 0.25, 0.625, 1, 1])
    assert stain.adapted_strength(turned(25), own, 0) == 0
    assert stain.adapted_strength({"cdf": []}, {"cdf": []}, 0.25) == 0.25
    # The transform follows: a new stain goes all the way, unless told how far.
    target = stain.fit_reference(mixture(TYPICAL))
    pixels = stain.tissue_pixels(mixture(np.array(turned(20)["matrix"])))
    full, adapted, stated = (
        stain.fit_transform(pixels, "macenko", target, strength=s, adapt=a)[0]
        for s, a in ((1.0, False), (0.25, True), (0.25, False))
    )
    assert adapted == full != stated


def test_half_of_reinhard_ends_between() -> None:
    rgb = mixture(TYPICAL)
    pixels = stain.tissue_pixels(rgb)
    ends = [stain.fit_transform(pixels, "reinhard", reference(), strength=s)[0] for s in (0.0, 0.5, 1.0)]
    assert np.abs(ends[0].apply(rgb).astype(int) - rgb).max() <= 1
    means = [np.array(end.target)[0] for end in ends]
    assert np.allclose(means[1], (means[0] + means[2]) / 2)


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_strength_is_a_share(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be within 0 and 1"):
        stain.fit_transform(stain.tissue_pixels(mixture(TYPICAL)), "macenko", reference(), strength=strength)


def test_histogram_strength_is_a_blend() -> None:
    pixels = stain.tissue_pixels(mixture(TYPICAL))
    none, _ = stain.fit_transform(pixels, "histogram", reference(), strength=0.0)
    assert none.lut == (tuple(range(256)),) * 3
    full, half = (
        stain.fit_transform(pixels, "histogram", reference(), strength=strength)[0] for strength in (1.0, 0.5)
    )
    middle = (np.array(full.lut) + np.arange(256)) / 2
    assert np.abs(np.array(half.lut) - middle).max() <= 1
    assert (np.diff(np.array(full.lut, int), axis=1) >= 0).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "other"},
        {"method": "matrix"},
        {"method": "none", "matrix": ((1, 0, 0),) * 3},
        {"method": "matrix", "matrix": ((1, 0), (0, 1))},
        {"method": "matrix", "matrix": ((np.inf, 0, 0),) * 3},
    ],
)
def test_transform_refuses_what_it_cannot_be(fields: dict) -> None:
    with pytest.raises(ValueError):
        stain.StainTransform(**fields)


def test_transform_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match="uint8"):
        stain.StainTransform().apply(np.zeros((2, 2, 3)))


def test_thinning_is_even() -> None:
    pixels = np.arange(3000).reshape(1000, 3)
    assert set(np.diff(stain.thinned(pixels, 100)[:, 0])) == {30, 33}
    assert len(stain.tissue_pixels(np.zeros((800, 800, 3), np.uint8))) == stain.MOST_PIXELS < 800 * 800
    assert stain.thinned(pixels, 1000) is pixels


@pytest.mark.parametrize(
    "transform",
    [
        stain.StainTransform(
            "matrix", matrix=((0.78, 0.11, 0.06), (0.21, 0.88, -0.07), (0.01, 0.1, 0.98)), white=(0.05, 0, 0.02)
        ),
        stain.StainTransform("lut", lut=(tuple(range(256)), tuple(range(128)) * 2, (9,) * 256)),
        stain.StainTransform("reinhard", source=((60, 20, -10), (10, 5, 5)), target=((65, 22, -12), (12, 5, 5))),
    ],
    ids=lambda transform: transform.method,
)
def test_the_table_has_what_becomes_of_every_colour(transform: stain.StainTransform) -> None:
    with ThreadPoolExecutor(2) as pool:
        table = transform.table(pool.map)
    rng = np.random.default_rng(4)
    for count in (1, 7, 150_001):  # ends of blocks are computed without vectors
        rgb = rng.integers(0, 256, (count, 3), np.uint8)
        np.testing.assert_array_equal(table[*rgb.T][:, :3], transform.apply(rgb))
    assert not table[..., 3].any()
