"""Take a slide through TIAToolbox's nucleus engine with a network of the pipeline.

    python tiatoolbox_run.py SETTINGS.json

The script runs with the Python of an environment that has TIAToolbox; `benchmarks.peer` starts it and writes the
settings. Everything but the network and the watershed is the toolbox's own: reading, merging, tiles and seams,
properties of nuclei, GeoJSON. As in its HoVer-Net, nuclei come from a watershed over a tile.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.measure import label
from skimage.morphology import remove_small_objects
from skimage.segmentation import watershed
from tiatoolbox.models.architecture.hovernet import HoVerNet, _inst_dict_for_dask_processing
from tiatoolbox.models.engine.io_config import IOSegmentorConfig
from tiatoolbox.models.engine.multi_task_segmentor import MultiTaskSegmentor
from tiatoolbox.models.models_abc import ModelABC

SECONDS: dict[str, float] = {}


def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its wall seconds are added up in `SECONDS` under a name."""

    def inner(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return work(*args, **options)
        finally:
            SECONDS[name] = SECONDS.get(name, 0.0) + time.perf_counter() - start

    return inner


class Wrapped(ModelABC):
    """A traced network that returns a nucleus map and a distance map, as a model of the toolbox.

    Parameters
    ----------
    network : torch.jit.ScriptModule
        Network from RGB in 0 to 1 to maps in 0 to 1.
    rules : dict
        Thresholds of the maps, 0 to 255, ``nucleus`` and ``marker``, and least areas in pixels, ``min_marker`` and
        ``min_area``.
    """

    def __init__(self, network: Any, rules: dict[str, int]) -> None:
        super().__init__()
        self.network, self.rules = network, rules
        self.tasks = ["nuclei_segmentation"]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the maps of a batch of images."""
        return self.network(images)

    @staticmethod
    def infer_batch(model: Any, batch: Any, *, device: str) -> tuple[np.ndarray, np.ndarray]:
        """Return both maps of a batch of patches, each (N, H, W, 1)."""
        images = torch.as_tensor(batch).to(device, torch.float32).permute(0, 3, 1, 2).contiguous() / 255
        with torch.inference_mode():
            maps = timed("forward", model.network)(images).permute(0, 2, 3, 1).contiguous().numpy()
        return maps[..., :1], maps[..., 1:2]

    def postproc(self, raw_maps: list[Any], offset: tuple[int, int] = (0, 0)) -> tuple[dict[str, Any], ...]:
        """Find the nuclei of a tile; return them in the form that the toolbox expects."""
        import dask.array as da

        nucleus, distance = (np.asarray(m)[..., 0] * 255 for m in raw_maps)
        front = nucleus >= self.rules["nucleus"]
        markers = label(front & (distance >= self.rules["marker"]))
        markers = remove_small_objects(markers, max_size=self.rules["min_marker"] - 1)
        found = watershed(-distance, markers, mask=front)
        found = remove_small_objects(found, max_size=self.rules["min_area"] - 1)
        known = HoVerNet.get_instance_info(found, None, offset, verbose=False)
        lazy = isinstance(raw_maps[0], da.Array)
        names = ("box", "centroid", "contours", "prob", "type")
        listed: dict[str, Any] = {name: (da if lazy else np).empty(shape=0, dtype=np.int8) for name in names}
        if known:
            listed = _inst_dict_for_dask_processing(inst_info_dict=known, inst_info_dict_={}, is_dask=lazy)
        return (
            {
                "task_type": self.tasks[0],
                "predictions": da.array(found) if lazy else found,
                "info_dict": listed,
                "seg_type": "instance",
            },
        )


def main() -> None:
    """Run the engine over the slide, and write the wall seconds of its parts as JSON beside its results."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    for name in ("infer_wsi", "post_process_wsi", "save_predictions"):
        setattr(MultiTaskSegmentor, name, timed(name, getattr(MultiTaskSegmentor, name)))
    engine = MultiTaskSegmentor(
        Wrapped(torch.jit.load(settings["network"]), settings["rules"]), batch_size=settings["batch"], device="cpu",
        verbose=False,
    )  # fmt: skip
    resolution = [{"units": "mpp", "resolution": settings["mpp"]}]
    patch, stride = [settings["patch"]] * 2, [settings["patch"] - settings["overlap"]] * 2
    config = IOSegmentorConfig(
        input_resolutions=resolution, output_resolutions=resolution * 2, save_resolution=resolution[0],
        patch_input_shape=patch, patch_output_shape=patch, stride_shape=stride, tile_shape=(2048, 2048), margin=128,
    )  # fmt: skip
    start = time.perf_counter()
    engine.run(
        [settings["slide"]], patch_mode=False, ioconfig=config, save_dir=settings["out"], output_type="qupath",
        auto_get_mask=False, num_workers=0, overwrite=True,
    )  # fmt: skip
    SECONDS["run"] = time.perf_counter() - start
    Path(settings["seconds"]).write_text(json.dumps(SECONDS))


if __name__ == "__main__":
    main()
