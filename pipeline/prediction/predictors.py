"""Predictors, which compute maps of windows: a network on CPU threads or on a GPU, or a method without a network."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import PipelineError
from pipeline.kernels.blend import Blender, PatchGrid
from pipeline.kernels.stain import StainTransform
from pipeline.models.package import ModelPackage
from pipeline.networks.outputs import FindsInstances, Folding, Outputs, map_names
from pipeline.networks.registry import build_method, needs_torch

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

PASS_PIXELS = 64 * 320**2
"""Most pixels in the windows of a batch, and of a forward pass on a GPU: enough to keep a large GPU busy."""

Places = Sequence[tuple[int, int]]
"""Rows and columns of windows, in raster order."""

Finish = Callable[[], Iterator[np.ndarray]]
"""Waits for a batch that was begun; returns the pixels of each window as `pipeline.kernels.blend.Blender.add` does."""


@dataclass(frozen=True, eq=False)
class Strip:
    """Neighbouring windows of a row, and the pixels that they cover.

    Parameters
    ----------
    row, column : int
        Row and column of the first window.
    count : int
        Number of windows.
    pixels : numpy.ndarray
        uint8 ``(patch, (count - 1) * stride + patch, 3)``, in the slide's own colours.
    """

    row: int
    column: int
    count: int
    pixels: np.ndarray

    @property
    def places(self) -> list[tuple[int, int]]:
        """Rows and columns of the windows."""
        return [(self.row, column) for column in range(self.column, self.column + self.count)]


def runs(places: Places) -> Iterator[tuple[int, int, int]]:
    """Yield each run of neighbouring windows: row and column of the first, and their number."""
    start = 0
    for end in range(1, len(places) + 1):
        row, column = places[end - 1]
        if end == len(places) or places[end] != (row, column + 1):
            yield row, column - (end - 1 - start), end - start
            start = end


class SlideMaps(Protocol):
    """Computes the maps of one slide, batch by batch."""

    def prepare(self, strips: Sequence[Strip]) -> Callable[[], Finish]:
        """Prepare a batch; safe from any thread.

        Returns
        -------
        callable
            Begins to compute the batch and returns at once. To be called from one thread, in raster order of the
            batches: windows are blended in the order of these calls.
        """


def choose_device(name: str) -> str:
    """Resolve the `device` setting to ``cpu`` or ``cuda``.

    Raises
    ------
    PipelineError
        When CUDA is asked for and not available.
    """
    import torch

    available = name != "cpu" and torch.cuda.is_available()
    unfit = unfit_card() if available else None
    if name == "auto":
        if unfit is not None:
            log.warning("%s: the CPU is used", unfit)
        return "cuda" if available and unfit is None else "cpu"
    if name == "cuda" and (unfit is not None or not available):
        raise PipelineError(f"device cuda: {unfit or 'this machine has no usable GPU'}", "use device: auto or cpu")
    return name


def unfit_card(index: int = 0) -> str | None:
    """Say why the installed PyTorch cannot use a GPU, or return None: it has code for some generations only."""
    import torch

    built = [re.fullmatch(r"(sm|compute)_(\d+?)(\d)[a-z]?", one) for one in torch.cuda.get_arch_list()]
    made = [(one[1], int(one[2]), int(one[3])) for one in built if one]
    if not made:  # not CUDA
        return None
    major, minor = torch.cuda.get_device_capability(index)
    for kind, own, step in made:
        # Machine code runs within its generation, and PTX (compute) is translated for all later ones.
        if (own == major and step <= minor) or (kind == "compute" and (own, step) <= (major, minor)):
            return None
    return f"this PyTorch has no code for {torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"


class Predictor(Protocol):
    """Computes maps of windows.

    Attributes
    ----------
    batch : int
        Windows in a batch.
    per_pass : int
        Windows in a forward pass.
    network : torch.nn.Module, optional
        The network; None for a method without one.
    busy : float, optional
        Seconds in which a GPU was computing; None on a CPU.
    """

    @property
    def batch(self) -> int: ...

    @property
    def per_pass(self) -> int: ...

    @property
    def network(self) -> Any: ...

    @property
    def busy(self) -> float | None: ...

    def slide(self, grid: PatchGrid, transform: StainTransform) -> SlideMaps:
        """Start a slide, given the grid of its windows and the transform of its colours."""

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Maps uint8 ``(N, C, H, W)``, 255 is probability 1, of windows uint8 ``(N, H, W, 3)``, colours unchanged."""


class WindowPredictor:
    """Predictor that computes each window by itself, several at once on threads.

    The maps of a window thus depend on nothing but the window. On CPUs this is also faster than batches, whose layers
    outgrow the caches.

    Parameters
    ----------
    maps : callable
        Returns the uint8 maps ``(C, H, W)`` of a window uint8 ``(H, W, 3)``.
    threads : int
        Windows that are computed at once.
    batch : int
        Windows in a batch; 0 means four per thread.
    network : torch.nn.Module, optional
        The network that `maps` runs.
    """

    per_pass = 1
    busy = None

    def __init__(
        self, maps: Callable[[np.ndarray], np.ndarray], threads: int, batch: int = 0, network: nn.Module | None = None
    ) -> None:
        self.maps = maps
        self.batch = batch or 4 * threads
        self.network = network
        self._pool = ThreadPoolExecutor(threads, "maps")

    def slide(self, grid: PatchGrid, transform: StainTransform) -> SlideMaps:
        """See `Predictor`."""
        return _WindowSlide(self.maps, self._pool, Blender(grid, isinstance(self.network, FindsInstances)), transform)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Maps of windows, see `Predictor`."""
        return np.stack(list(self._pool.map(self.maps, patches)))


class _WindowSlide:
    """`SlideMaps` of a `WindowPredictor`."""

    def __init__(
        self,
        maps: Callable[[np.ndarray], np.ndarray],
        pool: ThreadPoolExecutor,
        blender: Blender,
        transform: StainTransform,
    ) -> None:
        self._maps = maps
        self._pool = pool
        self._blender = blender
        self._transform = transform
        self._blended: Future[list[np.ndarray]] | None = None

    def prepare(self, strips: Sequence[Strip]) -> Callable[[], Finish]:
        """See `SlideMaps`."""
        patch, stride = self._blender.grid.patch, self._blender.grid.stride
        windows = []
        for strip in strips:
            pixels = self._transform.apply(strip.pixels)
            for left in range(0, strip.count * stride, stride):
                windows.append(np.ascontiguousarray(pixels[:, left : left + patch]))
        places = [place for strip in strips for place in strip.places]
        return lambda: self._begin(places, windows)

    def _begin(self, places: Places, windows: Sequence[np.ndarray]) -> Finish:
        running = [self._pool.submit(self._maps, window) for window in windows]
        before = self._blended

        def blend() -> list[np.ndarray]:
            if before is not None:
                before.result()
            return [self._blender.add(*place, one.result()) for place, one in zip(places, running, strict=True)]

        # On the same pool, queued behind the windows: one thread more than there are cores costs more than it gains.
        blended = self._blended = self._pool.submit(blend)
        return lambda: iter(blended.result())


def network_on_cpu(network: nn.Module, outputs: Outputs, precision: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that computes the maps of a window by a network, for `WindowPredictor`.

    Parameters
    ----------
    network : torch.nn.Module
        Returns logits ``(N, C, H, W)`` for images in [0, 1].
    outputs : Outputs
        How logits become maps.
    precision : torch.dtype
        Type of the numbers that the network computes with.
    """
    import torch

    network.to(memory_format=torch.channels_last).eval()
    for part in network.modules():
        if type(part) is torch.nn.Conv2d:  # others may compute with their weights first
            part.to(precision)  # once, instead of for every window

    def maps(window: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", precision, precision != torch.float32):
            x = torch.from_numpy(window[None]).permute(0, 3, 1, 2)
            found = outputs.predict(network, x.float().div(255))[0]
            return np.asarray(found.mul(255).round().to(torch.uint8))

    return maps


@contextmanager
def one_result() -> Iterator[None]:
    """Make torch give the same bits in every run on the same machine: deterministic kernels, one CPU thread.

    All settings are restored at the end, except ``CUBLAS_WORKSPACE_CONFIG``, which is read only when CUDA starts.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), cudnn.benchmark, torch.get_num_threads()
    short = cudnn.allow_tf32
    filled = memory.fill_uninitialized_memory
    # Only a warning: a network may contain an operation without a deterministic kernel. `use_deterministic_algorithms`
    # does the same, but first imports the compiler, which takes longer than all else before the first window.
    torch.set_deterministic_debug_mode("warn")
    memory.fill_uninitialized_memory = False  # filling takes time and only helps to find bugs
    cudnn.benchmark = False
    cudnn.allow_tf32 = False  # by default, convolutions in float32 round their operands to 10 bits on newer GPUs
    torch.set_num_threads(1)  # windows run on threads of their own; for the weights, more only wait for each other
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        memory.fill_uninitialized_memory = filled
        cudnn.benchmark = before[1]
        cudnn.allow_tf32 = short
        torch.set_num_threads(before[2])


def choose_predictor(
    package: ModelPackage, device: str, batch: int, threads: int, precision: str = "auto"
) -> tuple[Predictor, dict[str, Any]]:
    """Build a package's predictor; return it with its ``device`` and ``precision`` for the manifest.

    Parameters
    ----------
    package : ModelPackage
        The model.
    device : {"auto", "cpu", "cuda"}
        Where to run the network.
    batch : int
        Windows in a batch; 0 chooses by device. At most as many as `PASS_PIXELS` holds or, on a CPU where this is
        more, four per thread.
    threads : int
        CPU threads.
    precision : str
        One of `pipeline.networks.precision.PRECISIONS`.
    """
    a_pass = max(1, PASS_PIXELS // package.patch**2)
    on_cpu = _limited(batch, max(a_pass, 4 * threads))
    if not needs_torch(package.network):
        import cv2

        cv2.setNumThreads(1)
        method = WindowPredictor(build_method(package.network, package.network_args), threads, on_cpu)
        return method, {"device": "cpu", "precision": "float32"}
    import torch

    from pipeline.models.weights import load_network
    from pipeline.networks.precision import choose_precision

    outputs = Outputs(channel_names(package), package.tta)
    kind = choose_device(device)
    network = load_network(package)
    if isinstance(network, Folding):
        network.fold_norms()
    number = choose_precision(precision, kind, network)
    about = {"device": "cpu", "precision": str(number).removeprefix("torch.")}
    if kind == "cuda":
        from pipeline.prediction.batches import BatchPredictor

        predictor = BatchPredictor(network, "cuda", _limited(batch, a_pass) or a_pass, outputs, number, threads)
        return predictor, about | {"device": torch.cuda.get_device_name()}
    return WindowPredictor(network_on_cpu(network, outputs, number), threads, on_cpu, network), about


def _limited(batch: int, most: int) -> int:
    if batch > most:
        log.warning("batch %d: no more than %d windows are taken at once", batch, most)
    return min(batch, most)


def channel_names(package: ModelPackage) -> tuple[str, ...]:
    """Names of a model's maps in the order of the network's channels."""
    return map_names(package.heads, [c.name for c in package.classes])
