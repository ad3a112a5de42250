"""Prediction of maps for whole annotated fields."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from torch import nn

from pipeline.kernels.blend import Blender, PatchGrid
from pipeline.networks.outputs import FindsInstances, Outputs
from pipeline.networks.precision import choose_precision

WINDOWS_AT_ONCE = 8


def to_field(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize a map or label map ``(h, w)`` to a field's own size by nearest-neighbour sampling."""
    height, width = shape
    rows = np.minimum((np.arange(height) + 0.5) * values.shape[0] / height, values.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) * values.shape[1] / width, values.shape[1] - 1).astype(int)
    return np.asarray(values[rows[:, None], columns])


def predict_field(
    network: nn.Module, image: np.ndarray, outputs: Outputs, window: tuple[int, int] | None = None
) -> np.ndarray:
    """Predict the maps of a whole field, mirroring the image at its borders.

    Parameters
    ----------
    network : torch.nn.Module
        Network that returns logits.
    image : numpy.ndarray
        uint8 ``(H, W, 3)`` at the model's pixel size.
    outputs : Outputs
        Meaning of the logits, and the test-time augmentation.
    window : (int, int), optional
        Side and overlap in pixels of the windows in which the field is predicted, as on a slide. Without it, the field
        is predicted in one pass.

    Returns
    -------
    numpy.ndarray
        uint8 ``(C, H, W)``, 255 is 1.
    """
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    precision = choose_precision("auto", device.type, network)
    if isinstance(network, FindsInstances):
        network.margin = 0 if window is None else window[1] // 2
    with torch.inference_mode(), torch.autocast(device.type, precision, precision != torch.float32):
        maps = _in_one(network, image, outputs) if window is None else _in_windows(network, image, outputs, *window)
    network.train(was_training)
    return maps


def _forward(network: nn.Module, images: np.ndarray, outputs: Outputs) -> np.ndarray:
    device = next(network.parameters()).device
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    return np.asarray((outputs.predict(network, x) * 255).round().to(torch.uint8).cpu())


def _in_one(network: nn.Module, image: np.ndarray, outputs: Outputs) -> np.ndarray:
    height, width = image.shape[:2]
    margin = 32
    multiple = math.lcm(32, getattr(network, "stride", 1))
    bottom, right = (margin + -(side + 2 * margin) % multiple for side in (height, width))
    padded = cv2.copyMakeBorder(image, margin, bottom, margin, right, cv2.BORDER_REFLECT)
    maps = _forward(network, padded[None], outputs)[0]
    return maps[:, margin : margin + height, margin : margin + width]


def _in_windows(network: nn.Module, image: np.ndarray, outputs: Outputs, patch: int, overlap: int) -> np.ndarray:
    height, width = image.shape[:2]
    grid = PatchGrid(width, height, patch, overlap)
    bottom, right = (count * grid.stride - side for count, side in ((grid.rows, height), (grid.columns, width)))
    padded = cv2.copyMakeBorder(image, overlap, bottom, overlap, right, cv2.BORDER_REFLECT)
    blender = Blender(grid, largest=isinstance(network, FindsInstances))
    maps = np.empty((len(outputs.names), grid.rows * grid.stride, grid.columns * grid.stride), np.uint8)
    for row in range(grid.rows):
        corners = [(row * grid.stride, column * grid.stride) for column in range(grid.columns)]
        for start in range(0, len(corners), WINDOWS_AT_ONCE):
            part = corners[start : start + WINDOWS_AT_ONCE]
            windows = np.stack([padded[y : y + patch, x : x + patch] for y, x in part])
            for (y, x), found in zip(part, _forward(network, windows, outputs), strict=True):
                done = blender.add(row, x // grid.stride, found)
                maps[:, y : y + grid.stride, x : x + grid.stride] = done
    return maps[:, overlap : overlap + height, overlap : overlap + width]
