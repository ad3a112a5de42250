"""What makes maps of windows: a network on CPU threads, a network on a GPU, or a method without a network."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import PipelineError
from pipeline.kernels.blend import Blender, PatchGrid, blend_weights, weight_sum
from pipeline.kernels.stain import StainTransform
from pipeline.models.package import ModelPackage
from pipeline.networks.outputs import FindsInstances, Folding, Outputs, map_names
from pipeline.networks.registry import build_method, needs_torch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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


class DeviceBlender:
    """What `pipeline.kernels.blend.Blender` does, on a GPU and batch by batch.

    Calls of its own for each window's edges would take longer than the network. Sums of integers, so the results are
    the same.

    Parameters
    ----------
    grid : PatchGrid
        Where the windows lie.
    largest : bool
        As for `Blender`.
    device : torch.device
        Where the maps are.
    """

    def __init__(self, grid: PatchGrid, largest: bool, device: torch.device) -> None:
        import torch

        self.grid = grid
        self._largest = largest
        self._weights = torch.from_numpy(blend_weights(grid.patch, grid.overlap)).to(device)
        self._sum = weight_sum(grid.overlap)
        # By column: the lower edge of its last window, and that window's row.
        self._edges: Tensor | None = None
        self._rows = np.full(grid.columns, -2)
        self._left: Tensor | None = None
        self._last = (-2, -2)

    def add(self, places: Places, maps: Tensor) -> Tensor:
        """Add windows.

        Parameters
        ----------
        places : sequence of (int, int)
            Their rows and columns; windows come in raster order.
        maps : torch.Tensor
            uint8 ``(N, C, patch, patch)``.

        Returns
        -------
        torch.Tensor
            uint8 ``(N, C, stride, stride)``: the pixels of each that no later window reaches.
        """
        stride, overlap = self.grid.stride, self.grid.overlap
        total = maps.int() if self._largest else maps * self._weights
        right = total[..., stride:].clone()
        if self._edges is None:
            self._edges = total.new_zeros((self.grid.columns, maps.shape[1], overlap, stride))
        start = 0
        for row, first, count in runs(places):
            end, columns = start + count, slice(first, first + count)
            run = total[start:end]
            if self._left is not None and self._last == (row, first - 1):
                self._join(run[0, ..., :overlap], self._left)
            self._join(run[1:, ..., :overlap], right[start : end - 1])
            # Those below windows that were there; told here, for asking the device would wait for the network.
            for _, begin, below in runs([(0, int(i)) for i in np.flatnonzero(self._rows[columns] == row - 1)]):
                edges = self._edges[first + begin : first + begin + below]
                self._join(run[begin : begin + below, ..., :overlap, :stride], edges)
            self._edges[columns] = run[..., stride:, :stride]
            self._rows[columns] = row
            self._left, self._last = right[end - 1], (row, first + count - 1)
            start = end
        done = total[..., :stride, :stride]
        return (done if self._largest else (done + self._sum // 2) // self._sum).byte()

    def _join(self, edge: Tensor, other: Tensor) -> None:
        import torch

        if self._largest:
            torch.maximum(edge, other, out=edge)
        else:
            edge += other


class BatchPredictor:
    """Batches of one size on a GPU, which blends them as well.

    Parameters
    ----------
    network : torch.nn.Module
        Gives logits ``(N, C, H, W)`` for images in [0, 1].
    device : str
        ``cuda``, or ``cpu`` for comparison.
    batch : int
        Windows a forward pass; halves itself when the device runs out of memory.
    outputs : Outputs
        What its logits mean.
    precision : torch.dtype
        What it computes with.
    threads : int
        CPU threads that make a slide's table of colours.
    """

    def __init__(
        self,
        network: nn.Module,
        device: str,
        batch: int,
        outputs: Outputs,
        precision: torch.dtype,
        threads: int = 1,
    ) -> None:
        import torch

        self.device = torch.device(device)
        self.batch = batch
        self.outputs = outputs
        self.network = network.to(self.device).to(memory_format=torch.channels_last).eval()
        self.precision = precision
        self.threads = threads
        self.on_gpu = self.device.type == "cuda"
        self._busy = 0.0

    @property
    def per_pass(self) -> int:
        """Windows in a forward pass."""
        return self.batch

    @property
    def busy(self) -> float | None:
        """Seconds in which a GPU was at a batch."""
        return self._busy if self.on_gpu else None

    def slide(self, grid: PatchGrid, transform: StainTransform) -> SlideMaps:
        """See `Predictor`."""
        return _BatchSlide(self, grid, transform)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Maps of windows, see `Predictor`."""
        return np.asarray(self.maps(self.load(patches)).cpu())

    def load(self, patches: np.ndarray) -> Tensor:
        """Windows on the device, uint8 ``(N, H, W, 3)``."""
        import torch

        return torch.from_numpy(patches).to(self.device)

    def maps(self, x: Tensor, colours: Tensor | None = None) -> Tensor:
        """Maps uint8 ``(N, C, H, W)`` of windows on the device, in as many passes as its memory needs."""
        import torch

        done: list[Tensor] = []
        start = 0
        while start < len(x):
            part = x[start : start + self.batch]
            try:
                found = self.forward(part, colours)
            except (torch.OutOfMemoryError, MemoryError):
                found = None  # and on, for only then are the layers of this pass given up
            if found is not None:
                done.append(found)
                start += len(part)
                continue
            if self.batch == 1:
                raise PipelineError(
                    f"{self.device}: not even one window fits the memory", "use another device or a smaller model"
                )
            self.batch //= 2
            log.warning("%s is out of memory: going on with batches of %d", self.device, self.batch)
            if self.on_gpu:
                torch.cuda.empty_cache()
        return done[0] if len(done) == 1 else torch.cat(done)

    def forward(self, x: Tensor, colours: Tensor | None = None) -> Tensor:
        """Maps of at most `batch` windows, their colours changed first; one shape always, so that the same kernels run.

        Parameters
        ----------
        x : torch.Tensor
            uint8 ``(N, H, W, 3)``.
        colours : torch.Tensor, optional
            For every colour another one, see `pipeline.kernels.stain.StainTransform.table`; four bytes are an int32.
        """
        import torch

        if colours is not None:
            red, green, blue = x.int().unbind(-1)
            found = colours.index_select(0, ((red << 16) + (green << 8) + blue).flatten())
            x = found.view(torch.uint8).view(*x.shape[:-1], 4)[..., :3].contiguous()
        count = len(x)
        if count < self.batch:
            x = torch.cat([x, x.new_zeros((self.batch - count, *x.shape[1:]))])
        with torch.inference_mode(), torch.autocast(self.device.type, self.precision, self.precision != torch.float32):
            maps = self.outputs.predict(self.network, x.permute(0, 3, 1, 2).float().div(255))
            return maps.mul(255).round().to(torch.uint8)[:count]

    def computed(self, seconds: float) -> None:
        """Note for how long a batch kept the GPU."""
        self._busy += seconds


class _BatchSlide:
    """See `SlideMaps`; for `BatchPredictor`.

    Strips go to the device as they are; their colours are transformed and windows cut out of them there.
    """

    def __init__(self, predictor: BatchPredictor, grid: PatchGrid, transform: StainTransform) -> None:
        import torch

        self._predictor = predictor
        self._grid = grid
        self._blender = DeviceBlender(grid, isinstance(predictor.network, FindsInstances), predictor.device)
        self._colours: Tensor | None = None
        if transform.method != "none":
            # By table, for a device's own logarithms and powers would round in another way.
            with ThreadPoolExecutor(predictor.threads) as pool:
                table = transform.table(pool.map)
            self._colours = torch.from_numpy(table.view(np.int32).reshape(-1)).to(predictor.device)
        # Strips are copied while the batch before is computed.
        self._copies = torch.cuda.Stream(predictor.device) if predictor.on_gpu else None

    def prepare(self, strips: Sequence[Strip]) -> Callable[[], Finish]:
        """See `SlideMaps`."""
        import torch

        if self._predictor.on_gpu:
            # Memory that the GPU copies by itself; the same size for all full batches, so that it is used again.
            size = self._grid.patch**2 * 3 * sum(strip.count for strip in strips)
            room = np.asarray(torch.empty(size, dtype=torch.uint8, pin_memory=True))
            moved, start = [], 0
            for strip in strips:
                pixels = room[start : start + strip.pixels.size].reshape(strip.pixels.shape)
                pixels[:] = strip.pixels
                moved.append(replace(strip, pixels=pixels))
                start += pixels.size
            strips = moved
        return lambda: self._begin(strips)

    def _begin(self, strips: Sequence[Strip]) -> Finish:
        import torch

        places = [place for strip in strips for place in strip.places]
        try:
            return self._begun(places, strips)
        except (torch.OutOfMemoryError, MemoryError):  # not of a forward pass: that halves itself
            raise PipelineError(
                f"{self._predictor.device} is out of memory: {len(places)} windows at once do not fit",
                f"set infer.batch to {max(1, len(places) // 4)} or less",
            ) from None

    def _begun(self, places: Places, strips: Sequence[Strip]) -> Finish:
        import torch

        with torch.inference_mode():
            x = self._windows(strips)
            started, ended = [torch.cuda.Event(enable_timing=True) for _ in "ab"] if self._copies else (None, None)
            if started is not None:
                started.record()
            blended = self._blender.add(places, self._predictor.maps(x, self._colours))
            if started is None or ended is None:
                return lambda: iter(np.asarray(blended))
            done = torch.empty(blended.shape, dtype=torch.uint8, pin_memory=True)
            done.copy_(blended, non_blocking=True)
            ended.record()

        def finish(_copied_from: Sequence[Strip] = strips) -> Iterator[np.ndarray]:  # which have to stay until then
            ended.synchronize()
            self._predictor.computed(started.elapsed_time(ended) / 1000)
            return iter(np.asarray(done))

        return finish

    def _windows(self, strips: Sequence[Strip]) -> Tensor:
        """Windows on the device, uint8 ``(N, H, W, 3)``."""
        import torch

        patch, stride, device = self._grid.patch, self._grid.stride, self._predictor.device
        count = sum(strip.count for strip in strips)
        with torch.cuda.stream(self._copies) if self._copies else nullcontext():
            x = torch.empty((count, patch, patch, 3), dtype=torch.uint8, device=device)
            start = 0
            for strip in strips:
                pixels = torch.from_numpy(strip.pixels).to(device, non_blocking=True)
                x[start : start + strip.count] = pixels.unfold(1, patch, stride).permute(1, 0, 3, 2)
                start += strip.count
        if self._copies is not None:
            now = torch.cuda.current_stream(device)
            now.wait_stream(self._copies)
            x.record_stream(now)
        return x


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
