"""Stain separation and normalisation of H&E colours.

Conventions
-----------
Optical density (OD) is natural, ``OD = -ln((I + 1) / 256)`` for an 8-bit value ``I``: 255 becomes exactly 0 and 0
becomes ``ln 256``, so that no value needs special treatment. The inverse is ``I = 256 exp(-OD) - 1`` with OD clamped to
0..ln 256 and the result rounded to the nearest integer, ties to even. A pixel is tissue when the mean OD of its
channels is at least `TISSUE_OD` and its OD of green is at least `INK_RATIO` times that of red (otherwise it is ink).
Stain matrices hold one unit vector per row, hematoxylin first, then eosin: ``OD = concentrations @ matrix``. Lab is
CIE L*a*b* of sRGB under D65, L in 0..100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

MAX_OD = math.log(256)
"""OD of the 8-bit value 0."""

TISSUE_OD = 0.15
"""Mean OD from which a pixel counts as tissue."""

WHITE_SHARE = 0.005
"""Share of pixels that may be brighter than the colour that is taken for glass."""

WHITE_OD = 0.1
"""Mean OD from which the brightest pixels are not taken for glass."""

INK_RATIO = 0.7
"""OD of green over OD of red below which a pixel is blue or green ink; mixtures of hematoxylin and eosin are above."""

MIN_PIXELS = 1000
"""Fewest tissue pixels that a stain is fitted to."""

MOST_PIXELS = 500_000
"""Most tissue pixels of an image that are used."""

METHODS = ("none", "macenko", "vahadane", "reinhard", "histogram")
"""Methods of normalisation."""

OD_TABLE = np.log(256.0 / np.arange(1, 257)).astype(np.float32)
"""OD of each 8-bit value, float32, shape ``(256,)``."""

RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]) / np.linalg.norm(
    [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], axis=1, keepdims=True
)
"""Vectors of hematoxylin and eosin by Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 23, 2001; shape ``(2, 3)``."""

MIN_STAIN_ANGLE = 10.0
"""Angle in degrees between hematoxylin and eosin below which a fit is rejected."""

MAX_OFF_ANGLE = (30.0, 46.0)
"""Angles in degrees between fitted hematoxylin or eosin and Ruifrok's vector above which a fit is rejected.

The limit for eosin is wider: with saffron (HES, common in France) real fields reach 44 degrees; DAB is at 47.
"""

KNOWN_ANGLES = (10.0, 14.0)
"""Angles in degrees between the hematoxylin vectors of a slide and of the reference.

Up to the first angle a stain counts as known, from the second as new. Fields of MoNuSeg and NuCLS are within
10 degrees of the reference of the models that are shipped.
"""

MAX_SCALE = 5.0
"""Largest factor by which a stain's strength may be raised or lowered."""

_PEAKS = (226, 252)  # green values of glass that is not white, up to slightly above WHITE_OD

_BLOCK = 1 << 16  # pixels processed at once, so that they fit into the cache

Extractor = Callable[[np.ndarray], np.ndarray]
"""Function that finds the stain matrix, float64 ``(2, 3)``, of RGB tissue pixels, uint8 ``(n, 3)``."""


class StainFitError(ValueError):
    """Raised when pixels do not determine the two stains; the message is one line that gives the reason."""


def rgb_to_od(rgb: np.ndarray) -> np.ndarray:
    """Convert 8-bit values to OD, float32, of the same shape."""
    return OD_TABLE[rgb]


def od_to_rgb(od: np.ndarray) -> np.ndarray:
    """Convert OD to 8-bit values, uint8, of the same shape."""
    clamped = np.clip(np.asarray(od, np.float32), 0, np.float32(MAX_OD))
    return np.rint(256 * np.exp(-clamped) - 1).astype(np.uint8)


def tissue_mask(rgb: np.ndarray) -> np.ndarray:
    """Mask of the pixels of RGB ``(..., 3)`` that are tissue by colour alone (neither pale nor ink), bool ``(...)``."""
    od = rgb_to_od(rgb)
    return (od.sum(axis=-1) >= 3 * TISSUE_OD) & (od[..., 1] >= INK_RATIO * od[..., 0])


def tissue_pixels(rgb: np.ndarray) -> np.ndarray:
    """Tissue pixels of RGB uint8 ``(..., 3)`` as uint8 ``(n, 3)``; evenly thinned out to at most `MOST_PIXELS`."""
    flat = np.asarray(rgb).reshape(-1, 3)
    pixels = flat[tissue_mask(flat)]
    return thinned(pixels, MOST_PIXELS)


def thinned(pixels: np.ndarray, most: int) -> np.ndarray:
    """Select at most `most` of the pixels ``(n, 3)``, evenly spread."""
    return pixels if len(pixels) <= most else pixels[np.linspace(0, len(pixels) - 1, most).astype(np.int64)]


def white_level(rgb: np.ndarray) -> np.ndarray:
    """OD of the glass around the tissue, estimated from the brightest pixels of each channel.

    Parameters
    ----------
    rgb : numpy.ndarray
        Image of tissue and background, uint8, shape ``(..., 3)``.

    Returns
    -------
    numpy.ndarray
        float64, shape ``(3,)``; zeros when the brightest pixels are too dark to be glass.
    """
    return white_of_counts(*count_values(rgb))


def count_values(rgb: np.ndarray) -> tuple[np.ndarray, int]:
    """Count how often each value occurs in each channel, int64 ``(3, 256)``, and how many pixels are pure white."""
    flat = np.asarray(rgb).reshape(-1, 3)
    counts = np.stack([np.bincount(flat[:, channel], minlength=256) for channel in range(3)])
    return counts, int(np.count_nonzero((flat[:, 0] == 255) & (flat[:, 1] == 255) & (flat[:, 2] == 255)))


def glass_is_darker(green: np.ndarray) -> bool:
    """Whether a histogram of green values has a narrow bright peak, as glass that is not white gives.

    By contrast, glass that the scanner shows as white leaves only a tail that hardly falls towards 255, and tissue a
    wide hump.

    Parameters
    ----------
    green : numpy.ndarray
        Counts of the green values of the pixels that are not pure white, integers ``(256,)``.
    """
    smooth = np.convolve(green, np.ones(5), "same")
    peak = _PEAKS[0] + int(smooth[slice(*_PEAKS)].argmax())
    darker, brighter = smooth[peak - 12], smooth[min(peak + 8, 254)]
    return bool(smooth[peak] > max(2 * darker, 4 * brighter, 2 * WHITE_SHARE * green.sum()))


def white_of_counts(counts: np.ndarray, white_pixels: int = 0) -> np.ndarray:
    """Return `white_level` from the results of `count_values`.

    Pure white pixels may be glass, or filler where nothing was scanned, decoded or stored. They are ignored when the
    other pixels show glass of another colour.
    """
    total = counts[0].sum()
    if total == 0:
        return np.zeros(3)
    if white_pixels > WHITE_SHARE * total:
        counts = counts.copy()
        counts[:, 255] -= white_pixels
        if not glass_is_darker(counts[1]):
            return np.zeros(3)
        total = counts[0].sum()
    brighter = np.cumsum(counts[:, ::-1], axis=1)  # from 255 down
    value = 255 - (brighter > WHITE_SHARE * total).argmax(axis=1)
    white = OD_TABLE[value].astype(np.float64)
    return white if white.mean() < WHITE_OD else np.zeros(3)


def balanced_tissue(rgb: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Subtract the OD of the glass from tissue pixels ``(n, 3)`` and drop those that are not tissue after that."""
    if not white.any():
        return rgb
    rgb = balance(rgb, white)
    return rgb[tissue_mask(rgb)]


def balance(rgb: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Subtract the OD of the glass from colours; uint8, of the same shape as `rgb`."""
    table = od_to_rgb(np.maximum(OD_TABLE[:, None] - np.asarray(white, np.float32), 0))
    return np.stack([table[rgb[..., channel], channel] for channel in range(3)], axis=-1)


def _unit_rows(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def angle(first: np.ndarray, second: np.ndarray) -> float:
    """Angle between two vectors in degrees."""
    cosine = float(first @ second) / float(np.linalg.norm(first) * np.linalg.norm(second))
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


def extract_macenko(rgb: np.ndarray) -> np.ndarray:
    """Stain matrix from the extreme angles (percentiles 1 and 99) in the plane of largest variance of OD.

    Parameters
    ----------
    rgb : numpy.ndarray
        Tissue pixels, uint8, shape ``(n, 3)``.

    Returns
    -------
    numpy.ndarray
        Unit rows, float64, shape ``(2, 3)``; hematoxylin, the vector with the larger OD of red, comes first. Use
        `check_matrix` to test whether the vectors are plausible.

    Raises
    ------
    StainFitError
        When there are too few pixels or they do not span a plane.

    References
    ----------
    Macenko et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009. Here, tissue pixels
    are those with a high mean OD: the original drops pixels with a low OD in any channel and with them eosin.
    """
    _require_pixels(rgb)
    od = rgb_to_od(rgb).astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(od, rowvar=False))
    if not values[1] > 1e-8:
        raise StainFitError("all tissue pixels have one hue")
    plane = vectors[:, [2, 1]]
    if (od @ plane[:, 0]).mean() < 0:
        plane[:, 0] *= -1
    projected = od @ plane
    phi = np.arctan2(projected[:, 1], projected[:, 0])
    extremes = np.percentile(phi, [1.0, 99.0])
    matrix = np.stack([np.cos(extremes), np.sin(extremes)], axis=1) @ plane.T
    return _unit_rows(matrix[np.argsort(-matrix[:, 0], kind="stable")])


OWN_EXTRACTORS: Mapping[str, Extractor] = {"macenko": extract_macenko}
"""Stain matrix extraction by method, for methods that need no further library."""


def _require_pixels(rgb: np.ndarray) -> None:
    if len(rgb) < MIN_PIXELS:
        raise StainFitError(f"only {len(rgb)} tissue pixels, at least {MIN_PIXELS} are needed")


def check_matrix(matrix: np.ndarray) -> None:
    """Raise an error if a stain matrix is not that of hematoxylin and eosin.

    Raises
    ------
    StainFitError
        When the matrix has non-finite numbers or a zero row, a vector points the wrong way (negative absorption), the
        two vectors are nearly the same (a single stain), or a vector is far from its typical direction (pen ink,
        another stain).
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (2, 3) or not np.isfinite(matrix).all() or not np.linalg.norm(matrix, axis=1).all():
        raise StainFitError("the stain vectors are not finite")
    for name, vector in zip(("hematoxylin", "eosin"), _unit_rows(matrix), strict=True):
        if vector.min() < -0.2:
            raise StainFitError(f"the {name} vector {_text(vector)} points the wrong way")
    between = angle(matrix[0], matrix[1])
    if between < MIN_STAIN_ANGLE:
        raise StainFitError(f"hematoxylin and eosin are {between:.1f} degrees apart: one stain")
    for name, vector, typical, limit in zip(("hematoxylin", "eosin"), matrix, RUIFROK, MAX_OFF_ANGLE, strict=True):
        off = angle(vector, typical)
        if off > limit:
            raise StainFitError(f"the {name} vector {_text(vector)} is {off:.0f} degrees off: pen or another stain")


def _text(vector: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in vector) + ")"


def unmixing(matrix: np.ndarray) -> np.ndarray:
    """Pseudo-inverse of a stain matrix, float64 ``(3, 2)``: ``concentrations = OD @ unmixing``."""
    return np.linalg.pinv(np.asarray(matrix, np.float64))


def concentrations(rgb: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Least-squares concentrations of both stains, float64, shape ``(..., 2)``."""
    return rgb_to_od(rgb).astype(np.float64) @ unmixing(matrix)


def max_concentrations(rgb: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """99th percentile of both concentrations over pixels ``(n, 3)``, float64 ``(2,)``."""
    return np.percentile(concentrations(rgb, matrix), 99, axis=0)


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of sRGB uint8 ``(n, 3)`` under D65, float32 ``(n, 3)``."""
    unit = rgb.reshape(1, -1, 3) * np.float32(1 / 255)
    return cv2.cvtColor(unit, cv2.COLOR_RGB2LAB).reshape(-1, 3)


def cumulative(rgb: np.ndarray) -> np.ndarray:
    """Cumulative distribution of each channel of RGB uint8 ``(n, 3)``, float64 ``(3, 256)``, last value 1."""
    counts = np.stack([np.bincount(rgb[:, channel], minlength=256) for channel in range(3)])
    return np.cumsum(counts, axis=1) / len(rgb)


def matching_table(source: np.ndarray, target: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Look-up tables that give one channel-wise distribution the shape of another.

    Parameters
    ----------
    source, target : numpy.ndarray
        Cumulative distributions, shape ``(3, 256)``.
    alpha : float
        0 leaves the colours unchanged, 1 gives those of the target, values in between a linear blend.

    Returns
    -------
    numpy.ndarray
        uint8, shape ``(3, 256)``, non-decreasing. Each value is matched at the middle of its step in the source's
        distribution. Outside the source's 0.5 and 99.5 percentiles the table runs straight to 0 and to 255, so that
        background stays white and a few extreme pixels do not distort the table.

    References
    ----------
    Gonzalez and Woods, Digital Image Processing, section 3.3 (histogram specification).
    """
    values = np.arange(256.0)
    tables = np.empty((3, 256), np.uint8)
    for channel in range(3):
        before = np.r_[0.0, source[channel, :-1]]
        middle = (before + source[channel]) / 2
        steps = np.r_[0.0, target[channel, :-1]]
        seen = np.flatnonzero(target[channel] > steps)
        matched = np.interp(middle, (steps[seen] + target[channel, seen]) / 2, values[seen])
        inner = (middle >= 0.005) & (middle <= 0.995)
        inner &= source[channel] > before
        known = np.flatnonzero(inner & (values > 0) & (values < 255))
        table = np.interp(values, np.r_[0, known, 255], np.r_[0.0, matched[known], 255.0])
        tables[channel] = np.rint(np.maximum.accumulate((1 - alpha) * values + alpha * table)).astype(np.uint8)
    return tables


_NEGATIVE_OD = np.repeat(-OD_TABLE.reshape(1, 256, 1), 3, axis=2)
_FADE = np.full((1, 3), -1 / (3 * TISSUE_OD), np.float32)


def _fade_in(rgb: np.ndarray, moved: np.ndarray, out: np.ndarray) -> None:
    """Write ``rint(rgb + w (moved - rgb))``, ``w = min(1, mean OD / TISSUE_OD)``: white stays white."""
    weight = np.minimum(cv2.transform(cv2.LUT(rgb, _NEGATIVE_OD), _FADE), 1).reshape(1, -1, 1)
    moved -= rgb
    np.multiply(moved, weight, out=moved)
    moved += rgb
    np.rint(moved, out=moved)
    out[:] = moved.astype(np.uint8)


Rows = tuple[tuple[float, ...], ...]


def _rows(value: Any) -> Rows:
    return tuple(tuple(float(item) for item in row) for row in value)


@dataclass(frozen=True)
class StainTransform:
    """Colour transform that is the same for every pixel of a slide.

    Parameters
    ----------
    method : {"none", "matrix", "reinhard", "lut"}
        ``matrix``: ``OD' = max(OD - white, 0) @ matrix``. ``reinhard``: mean and spread of each Lab channel are moved
        from source to target, ``Lab' = Lab * scale + offset`` with scale and offset from `lab_affine`. ``lut``: one
        table of 256 values per channel. The latter two are faded out towards white: with
        ``w = min(1, mean OD / TISSUE_OD)`` the result is ``rint(rgb + w (moved - rgb))``, `moved` being the transformed
        colour, clipped to 0..255 but not rounded.
    matrix : tuple, optional
        3 x 3, for method ``matrix``.
    white : tuple, optional
        OD of the glass in each channel, for method ``matrix``; without it, nothing is subtracted.
    source, target : tuple, optional
        Means and standard deviations of L, a and b, 2 x 3 each, for method ``reinhard``.
    lut : tuple, optional
        3 x 256 integers in 0..255, for method ``lut``.
    """

    method: str = "none"
    matrix: Rows | None = None
    source: Rows | None = None
    target: Rows | None = None
    lut: tuple[tuple[int, ...], ...] | None = None
    white: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        needs = {"none": (), "matrix": ("matrix",), "reinhard": ("source", "target"), "lut": ("lut",)}
        if self.method not in needs:
            raise ValueError(f"no such stain transform: {self.method!r}")
        shapes = {"matrix": (3, 3), "source": (2, 3), "target": (2, 3), "lut": (3, 256)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if (value is not None) != (name in needs[self.method]):
                raise ValueError(f"a stain transform of method {self.method} has no fitting {name}")
            if value is not None and (np.shape(value) != shape or not np.isfinite(value).all()):
                raise ValueError(f"{name} of a stain transform must hold {shape} finite numbers")
        if self.white is not None:
            if self.method != "matrix":
                raise ValueError(f"a stain transform of method {self.method} has no white")
            if np.shape(self.white) != (3,) or not np.isfinite(self.white).all() or min(self.white) < 0:
                raise ValueError("white of a stain transform must hold 3 numbers of at least 0")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StainTransform:
        """Create a transform from the result of `to_json`."""
        fields = dict(value)
        lut, white = fields.pop("lut", None), fields.pop("white", None)
        return cls(
            method=fields.pop("method"),
            lut=None if lut is None else tuple(tuple(int(item) for item in row) for row in lut),
            white=None if white is None else tuple(float(item) for item in white),
            **{name: _rows(rows) for name, rows in fields.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the transform as plain JSON values, only the fields that its method needs."""
        fields: dict[str, Any] = {"method": self.method}
        for name in ("matrix", "source", "target", "lut"):
            value = getattr(self, name)
            if value is not None:
                fields[name] = [list(row) for row in value]
        if self.white is not None:
            fields["white"] = list(self.white)
        return fields

    def apply(self, rgb: np.ndarray) -> np.ndarray:
        """Transform colours.

        Parameters
        ----------
        rgb : numpy.ndarray
            uint8, shape ``(..., 3)``.

        Returns
        -------
        numpy.ndarray
            A new array of the same shape and type.
        """
        if rgb.dtype != np.uint8 or rgb.shape[-1:] != (3,):
            raise ValueError(f"expected uint8 (..., 3), got {rgb.dtype} {rgb.shape}")
        if self.method == "none":
            return rgb.copy()
        flat = np.ascontiguousarray(rgb).reshape(1, -1, 3)
        out = np.empty_like(flat)
        kernel = {"matrix": self._apply_matrix, "reinhard": self._apply_reinhard, "lut": self._apply_lut}[self.method]
        for start in range(0, flat.shape[1], _BLOCK):
            kernel(flat[:, start : start + _BLOCK], out[:, start : start + _BLOCK])
        return out.reshape(rgb.shape)

    def table(self, each: Callable[..., Iterable[Any]] = map) -> np.ndarray:
        """Tabulate the transform of every colour, for use where `apply` cannot run.

        Parameters
        ----------
        each : callable
            Function like the built-in `map`; use that of a thread pool to fill the table in parallel.

        Returns
        -------
        numpy.ndarray
            uint8 ``(256, 256, 256, 4)``, indexed by red, green and blue: the new colour, followed by a 0.
        """
        table = np.zeros((256, 256, 256, 4), np.uint8)
        values = np.arange(256, dtype=np.uint8)

        def fill(red: int) -> None:
            plane = np.stack(np.broadcast_arrays(np.uint8(red), values[:, None], values), axis=-1)
            table[red, ..., :3] = self.apply(plane)

        for _ in each(fill, range(256)):
            pass
        return table

    def _apply_matrix(self, rgb: np.ndarray, out: np.ndarray) -> None:
        table = _NEGATIVE_OD if self.white is None else np.minimum(_NEGATIVE_OD + np.asarray(self.white, np.float32), 0)
        od = cv2.transform(cv2.LUT(rgb, table), np.asarray(self.matrix, np.float32).T)
        np.clip(od, np.float32(-MAX_OD), 0, out=od)
        out[:] = cv2.convertScaleAbs(cv2.exp(od), alpha=256, beta=-1)

    def _apply_reinhard(self, rgb: np.ndarray, out: np.ndarray) -> None:
        scale, offset = self.lab_affine()
        lab = rgb_to_lab(rgb).reshape(1, -1, 3) * scale.astype(np.float32) + offset.astype(np.float32)
        moved = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
        np.clip(moved, 0, 1, out=moved)
        np.multiply(moved, np.float32(255), out=moved)
        _fade_in(rgb, moved, out)

    def _apply_lut(self, rgb: np.ndarray, out: np.ndarray) -> None:
        table = np.asarray(self.lut, np.uint8).T.reshape(1, 256, 3)
        _fade_in(rgb, cv2.LUT(rgb, table).astype(np.float32), out)

    def lab_affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale and offset of each Lab channel of method ``reinhard``, float64 ``(3,)`` each."""
        source, target = np.array(self.source), np.array(self.target)
        scale = target[1] / source[1]
        return scale, target[0] - source[0] * scale


def _rounded(array: np.ndarray) -> list[Any]:
    # Six decimals are far finer than one grey level and make the numbers the same in memory as when read back.
    return np.round(np.asarray(array, np.float64), 6).tolist()


def fit_stains(rgb: np.ndarray, extract: Extractor) -> dict[str, Any]:
    """Fit the stain matrix and the strengths of both stains to tissue pixels.

    Parameters
    ----------
    rgb : numpy.ndarray
        Tissue pixels, uint8, shape ``(n, 3)``.
    extract : callable
        Function that finds the stain matrix.

    Returns
    -------
    dict
        ``matrix`` (2 x 3) and ``max_concentrations`` (2), rounded to six decimals.

    Raises
    ------
    StainFitError
        When the pixels do not determine two stains that look like hematoxylin and eosin.
    """
    _require_pixels(rgb)
    try:
        matrix = np.asarray(extract(rgb), np.float64)
    except np.linalg.LinAlgError as error:
        raise StainFitError(f"no stain vectors could be computed: {error}") from None
    check_matrix(matrix)
    strongest = max_concentrations(rgb, matrix)
    if not (np.isfinite(strongest).all() and strongest.min() > 0.05):
        raise StainFitError(f"a stain is absent: strengths {_text(strongest)}")
    return {"matrix": _rounded(matrix), "max_concentrations": _rounded(strongest)}


def fit_lab(rgb: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviation of L, a and b over tissue pixels ``(n, 3)``."""
    _require_pixels(rgb)
    lab = rgb_to_lab(rgb).astype(np.float64)
    mean, std = lab.mean(axis=0), lab.std(axis=0)
    if not std.min() > 0.5:
        raise StainFitError(f"tissue has no spread of colour: standard deviations {_text(std)} in Lab")
    return {"mean": _rounded(mean), "std": _rounded(std)}


def fit_histogram(rgb: np.ndarray) -> dict[str, Any]:
    """Cumulative distribution of each channel over tissue pixels ``(n, 3)``."""
    _require_pixels(rgb)
    return {"cdf": _rounded(cumulative(rgb))}


def fit_reference(rgb: np.ndarray, extractors: Mapping[str, Extractor] = OWN_EXTRACTORS) -> dict[str, Any]:
    """Describe the stain of a model's training data, for its package and as the target of `fit_transform`.

    Parameters
    ----------
    rgb : numpy.ndarray
        Pixels or images of the reference, uint8, shape ``(..., 3)``; background is ignored.
    extractors : mapping of str to callable
        Stain matrix extraction by method.

    Returns
    -------
    dict
        JSON values: for each extractor's name ``{"matrix": 2x3, "max_concentrations": [2]}``, ``reinhard``
        ``{"mean": [3], "std": [3]}`` in Lab, ``histogram`` ``{"cdf": 3x256}`` of R, G and B.

    Raises
    ------
    StainFitError
        When the pixels do not look like H&E.
    """
    pixels, balanced = tissue_pixels(rgb), tissue_pixels(balance(rgb, white_level(rgb)))
    reference: dict[str, Any] = {name: fit_stains(balanced, extract) for name, extract in extractors.items()}
    return reference | {"reinhard": fit_lab(pixels), "histogram": fit_histogram(pixels)}


def _require_scale(what: str, scale: np.ndarray) -> None:
    largest = float(max(scale.max(), 1 / scale.min()))
    if largest > MAX_SCALE:
        raise StainFitError(f"{what} differs {largest:.1f}-fold from the model's")


def adapted_strength(source: Mapping[str, Any], target: Mapping[str, Any], strength: float) -> float:
    """Strength of normalisation for a slide: `strength` for a known stain, up to 1 for a new one.

    A network does best on known stains when their colours are kept, and on new stains when they are normalised to known
    ones. A stain is known when its hematoxylin is close to the reference's.

    Parameters
    ----------
    source, target : mapping
        Results of `fit_stains` for the slide and for the reference.
    strength : float
        Strength for known stains, 0 to 1.

    Returns
    -------
    float
        Between `strength` and 1, rising between the two angles of `KNOWN_ANGLES`. A strength of 0 and the strength of
        methods without stain vectors are returned unchanged.
    """
    if strength == 0 or "matrix" not in source:
        return strength
    away = angle(np.array(source["matrix"][0]), np.array(target["matrix"][0]))
    return float(np.interp(away, KNOWN_ANGLES, (strength, 1.0)))


def fit_transform(
    rgb: np.ndarray,
    method: str,
    reference: Mapping[str, Any],
    extractors: Mapping[str, Extractor] = OWN_EXTRACTORS,
    strength: float = 1.0,
    white: np.ndarray | None = None,
    adapt: bool = False,
) -> tuple[StainTransform, dict[str, Any]]:
    """Fit the transform of a slide towards a reference.

    Parameters
    ----------
    rgb : numpy.ndarray
        Tissue pixels of the slide, uint8, shape ``(n, 3)``.
    method : str
        One of `METHODS`.
    reference : mapping
        Result of `fit_reference`.
    extractors : mapping of str to callable
        Stain matrix extraction by method, as for `fit_reference`.
    strength : float
        How far to move towards the reference, from 0 (the slide's own colours) to 1 (the reference's). Values in
        between give a weighted mean: for matrix methods, of OD (the weighted geometric mean of transmitted light); for
        ``reinhard``, of the slide's and the reference's statistics; for ``histogram``, of the colours before and after
        matching.
    white : numpy.ndarray, optional
        Result of `white_level` for the slide. Matrix methods subtract it first, because a transform that strengthens
        pale stains would otherwise colour the glass; the other methods leave pale pixels unchanged.
    adapt : bool
        Whether new stains get a higher strength than `strength`, see `adapted_strength`.

    Returns
    -------
    transform : StainTransform
        The transform.
    source : dict
        The fit of the slide, with the same fields as the method's entry in `reference`.

    Raises
    ------
    StainFitError
        When no plausible transform can be fitted to the pixels; the slide should then be left unchanged.
    KeyError
        When `reference` or `extractors` has no entry for the method.

    References
    ----------
    Matrix methods: Macenko 2009; Vahadane et al., Structure-preserving color normalization and sparse stain separation
    for histological images, IEEE TMI 35(8), 2016. Least-squares unmixing, scaling of both strengths and mixing with the
    target's vectors are combined into one 3 x 3 matrix on OD. ``reinhard``: Reinhard et al., Color transfer between
    images, IEEE CG&A 21(5), 2001, in Lab.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be within 0 and 1, got {strength}")
    if method == "none":
        return StainTransform(), {}
    target = reference[method]
    if method == "reinhard":
        source = fit_lab(rgb)
        rows = {name: np.array((fit["mean"], fit["std"])) for name, fit in (("source", source), ("target", target))}
        rows["target"] = (1 - strength) * rows["source"] + strength * rows["target"]
        _require_scale("spread of colour", np.divide(target["std"], source["std"]))
        return StainTransform("reinhard", source=_rows(rows["source"]), target=_rows(rows["target"])), source
    if method == "histogram":
        source = fit_histogram(rgb)
        table = matching_table(np.array(source["cdf"]), np.array(target["cdf"]), strength)
        return StainTransform("lut", lut=tuple(tuple(row) for row in table.tolist())), source
    glass = np.zeros(3) if white is None else np.round(white, 6)
    rgb = balanced_tissue(rgb, glass)
    source = fit_stains(rgb, extractors[method])
    scale = np.divide(target["max_concentrations"], source["max_concentrations"])
    _require_scale("stain strength", scale)
    matrix = unmixing(np.array(source["matrix"])) @ np.diag(scale) @ np.array(target["matrix"])
    share = adapted_strength(source, target, strength) if adapt else strength
    matrix = (1 - share) * np.eye(3) + share * matrix
    moved = _rows(np.round(matrix, 8))
    return StainTransform("matrix", matrix=moved, white=tuple(glass.tolist()) if glass.any() else None), source
