"""What makes maps of windows: a network on CPU threads or on a GPU, or a method without a network."""

from __future__ import annotations

import logging
import os
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
"""Pixels of the windows of a batch at most, and of a forward pass on a GPU: enough to fill a large one."""

Places = Sequence[tuple[int, int]]
"""Rows and columns of windows, in raster order."""

Finish = Callable[[], Iterator[np.ndarray]]
"""Waits for what was begun; gives what `pipeline.kernels.blend.Blender.add` says of each window."""


@dataclass(frozen=True, eq=False)
class Strip:
    """Neighbouring windows of a row, and the pixels that they lie in.

    Parameters
    ----------
    row, column : int
        Place of the first.
    count : int
        How many.
    pixels : numpy.ndarray
        uint8 ``(patch, (count - 1) * stride + patch, 3)``, as the tiles have them.
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
    """Neighbours among windows in raster order: row and column of the first, and how many they are."""
    start = 0
    for end in range(1, len(places) + 1):
        row, column = places[end - 1]
        if end == len(places) or places[end] != (row, column + 1):
            yield row, column - (end - 1 - start), end - start
            start = end


class SlideMaps(Protocol):
    """The maps of one slide in the making."""

    def prepare(self, strips: Sequence[Strip]) -> Callable[[], Finish]:
        """Make a batch ready, in any thread.

        What is returned begins with it, without waiting. It is called in raster order, from one thread; windows are
        blended in that order.
        """


def choose_device(name: str) -> str:
    """Resolve the `device` setting to ``cpu`` or ``cuda``.

    Raises
    ------
    PipelineError
        When CUDA is asked for and there is none.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise PipelineError("device cuda: this machine has no usable GPU", "use device: auto or cpu")
    return name


class Predictor(Protocol):
    """What makes maps of windows.

    Parameters
    ----------
    batch : int
        Windows that it is given at once.
    per_pass : int
        Windows in a forward pass.
    network : torch.nn.Module, optional
        The network, where there is one.
    busy : float, optional
        Seconds in which a GPU was at a batch; None on a CPU.
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
        """Begin with a slide whose windows lie on a grid and whose colours are to be transformed."""

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Maps uint8 ``(N, C, H, W)``, 255 is probability 1, of windows uint8 ``(N, H, W, 3)`` as they are."""


class WindowPredictor:
    """One window at a time, on several threads: what comes out of a window depends on nothing else.

    On CPUs this is also faster than batches, whose layers outgrow the caches.

    Parameters
    ----------
    maps : callable
        Makes uint8 maps ``(C, H, W)`` of a window uint8 ``(H, W, 3)``.
    threads : int
        Windows at once.
    batch : int
        Windows that it is given at once.
    network : torch.nn.Module, optional
        The network behind it.
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
    """See `SlideMaps`; for `WindowPredictor`."""

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

        # In the same threads, after the windows: a thread more than cores costs more than it gains.
        blended = self._blended = self._pool.submit(blend)
        return lambda: iter(blended.result())


def network_on_cpu(network: nn.Module, outputs: Outputs, precision: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """A network as a function from a window to its maps, for `WindowPredictor`.

    Parameters
    ----------
    network : torch.nn.Module
        Gives logits ``(N, C, H, W)`` for images in [0, 1].
    outputs : Outputs
        What its logits mean.
    precision : torch.dtype
        What it computes with.
    """
    import torch

    network.to(memory_format=torch.channels_last).eval()

    def maps(window: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", precision, precision != torch.float32):
            x = torch.from_numpy(window[None]).permute(0, 3, 1, 2)
            found = outputs.predict(network, x.float().div(255))[0]
            return np.asarray(found.mul(255).round().to(torch.uint8))

    return maps


@contextmanager
def one_result() -> Iterator[None]:
    """Let torch choose kernels that give the same bits in every run on the same machine, on one thread of the CPU.

    Undone at the end, but for ``CUBLAS_WORKSPACE_CONFIG``, which is read once, when CUDA starts.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), cudnn.benchmark, torch.get_num_threads()
    filled = memory.fill_uninitialized_memory
    # Warned of, not refused: a network may hold an operation that has no such kernel. `use_deterministic_algorithms`
    # does the same, but imports the compiler first, which takes longer than all else before the first window.
    torch.set_deterministic_debug_mode("warn")
    memory.fill_uninitialized_memory = False  # which costs time and is for finding bugs
    cudnn.benchmark = False
    torch.set_num_threads(1)  # a thread a window; over the weights, more would but wait for each other
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        memory.fill_uninitialized_memory = filled
        cudnn.benchmark = before[1]
        torch.set_num_threads(before[2])


def choose_predictor(
    package: ModelPackage, device: str, batch: int, threads: int, precision: str = "auto"
) -> tuple[Predictor, dict[str, Any]]:
    """A package's predictor, and what the manifest says of it: ``device`` and ``precision``.

    Parameters
    ----------
    package : ModelPackage
        The model.
    device : {"auto", "cpu", "cuda"}
        Where it shall run.
    batch : int
        Windows at once; 0 chooses by device. No more than make up `PASS_PIXELS`, or on a CPU four a thread.
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
        from pipeline.batch_predictor import BatchPredictor

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
