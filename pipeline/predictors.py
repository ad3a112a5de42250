"""What makes maps of windows: a network on CPU threads, a network on a GPU, or a method without a network."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import PipelineError
from pipeline.kernels.blend import Blender, PatchGrid, blend_weights, weight_sum
from pipeline.models.package import ModelPackage
from pipeline.networks.outputs import FindsInstances, Folding, Outputs, map_names
from pipeline.networks.registry import build_method, needs_torch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

PASS_PIXELS = 64 * 320**2
"""Pixels of a forward pass on a GPU, unless the settings say how many windows: enough to fill a large one."""

Places = Sequence[tuple[int, int]]
"""Rows and columns of windows, in raster order."""

Finish = Callable[[], Iterator[np.ndarray]]
"""Waits for what was begun; gives what `pipeline.kernels.blend.Blender.add` says of each window."""


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
        Seconds that a GPU has computed; None on a CPU.
    """

    @property
    def batch(self) -> int: ...

    @property
    def per_pass(self) -> int: ...

    @property
    def network(self) -> Any: ...

    @property
    def busy(self) -> float | None: ...

    def blender(self, grid: PatchGrid) -> Any:
        """What blends its windows."""

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Room for windows, uint8."""

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Maps uint8 ``(N, C, H, W)``, 255 is probability 1, of windows uint8 ``(N, H, W, 3)``."""

    def begin(self, places: Places, patches: np.ndarray, blender: Any) -> Finish:
        """Begin with windows, without waiting; each is blended once the ones begun before it have been."""


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
        self._blended: Future[list[np.ndarray]] | None = None

    def blender(self, grid: PatchGrid) -> Blender:
        """See `Predictor`."""
        return Blender(grid, isinstance(self.network, FindsInstances))

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """See `Predictor`."""
        return np.empty(shape, np.uint8)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Maps of windows, see `Predictor`."""
        return np.stack(list(self._pool.map(self.maps, patches)))

    def begin(self, places: Places, patches: np.ndarray, blender: Blender) -> Finish:
        """See `Predictor`."""
        running = [self._pool.submit(self.maps, patch) for patch in patches]
        before = self._blended

        def blend() -> list[np.ndarray]:
            if before is not None:
                before.result()
            return [blender.add(*place, one.result()) for place, one in zip(places, running, strict=True)]

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
        for end in range(1, len(places) + 1):
            row, column = places[end - 1]
            if end < len(places) and places[end] == (row, column + 1):
                continue
            # Neighbours in a row.
            first = column - (end - 1 - start)
            run, columns = total[start:end], slice(first, column + 1)
            if self._left is not None and self._last == (row, first - 1):
                self._join(run[0, ..., :overlap], self._left)
            self._join(run[1:, ..., :overlap], right[start : end - 1])
            above = self._rows[columns] == row - 1
            if above.any():
                edges = self._edges[columns]
                if not above.all():
                    edges = edges * edges.new_tensor(above)[:, None, None, None]
                self._join(run[..., :overlap, :stride], edges)
            self._edges[columns] = run[..., stride:, :stride]
            self._rows[columns] = row
            self._left, self._last = right[end - 1], (row, column)
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
    """

    def __init__(self, network: nn.Module, device: str, batch: int, outputs: Outputs, precision: torch.dtype) -> None:
        import torch

        self.device = torch.device(device)
        self.batch = batch
        self.outputs = outputs
        self.network = network.to(self.device).to(memory_format=torch.channels_last).eval()
        self.precision = precision
        self._on_gpu = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if self._on_gpu else None
        self._busy = 0.0

    @property
    def per_pass(self) -> int:
        """Windows in a forward pass."""
        return self.batch

    @property
    def busy(self) -> float | None:
        """Seconds that a GPU has computed."""
        return self._busy if self._on_gpu else None

    def blender(self, grid: PatchGrid) -> DeviceBlender:
        """See `Predictor`."""
        return DeviceBlender(grid, isinstance(self.network, FindsInstances), self.device)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """See `Predictor`; memory that the GPU can copy by itself."""
        import torch

        return np.asarray(torch.empty(shape, dtype=torch.uint8, pin_memory=self._on_gpu))

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Maps of windows, see `Predictor`."""
        return np.asarray(self._maps(patches).cpu())

    def begin(self, places: Places, patches: np.ndarray, blender: DeviceBlender) -> Finish:
        """See `Predictor`."""
        import torch

        started, ended = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._on_gpu else (None, None)
        maps = self._maps(patches, started)
        with torch.inference_mode():
            blended = blender.add(places, maps)
            if started is None or ended is None:
                return lambda: iter(np.asarray(blended))
            done = torch.empty(blended.shape, dtype=torch.uint8, pin_memory=True)
            done.copy_(blended, non_blocking=True)
            ended.record()

        def finish(_copied_from: np.ndarray = patches) -> Iterator[np.ndarray]:  # which has to stay until then
            ended.synchronize()
            self._busy += started.elapsed_time(ended) / 1000
            yield from np.asarray(done)

        return finish

    def _maps(self, patches: np.ndarray, started: Any = None) -> Tensor:
        """Maps of windows on the device, in as many passes as its memory needs."""
        import torch

        done: list[Tensor] = []
        start = 0
        while start < len(patches):
            part = patches[start : start + self.batch]
            try:
                x = self.load(part)
                if started is not None and not done:
                    started.record()
                done.append(self.forward(x)[: len(part)])
            except (torch.OutOfMemoryError, MemoryError):
                if self.batch == 1:
                    raise PipelineError(
                        f"{self.device}: not even one window fits the memory", "use another device or a smaller model"
                    ) from None
                self.batch //= 2
                log.warning("%s is out of memory: going on with batches of %d", self.device, self.batch)
                if self._on_gpu:
                    torch.cuda.empty_cache()
                continue
            start += len(part)
        return done[0] if len(done) == 1 else torch.cat(done)

    def load(self, patches: np.ndarray) -> Tensor:
        """Windows on the device, uint8 ``(batch, H, W, 3)``: one shape always, so that the same kernels run."""
        import torch

        x = torch.from_numpy(patches)
        if self._copies is None:
            x = x.to(self.device)
        else:
            with torch.cuda.stream(self._copies):
                x = x.to(self.device, non_blocking=True)
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._copies)
            x.record_stream(now)
        if len(x) < self.batch:
            x = torch.cat([x, x.new_zeros((self.batch - len(x), *x.shape[1:]))])
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Maps uint8 ``(N, C, H, W)`` of windows that `load` has brought to the device."""
        import torch

        with torch.inference_mode(), torch.autocast(self.device.type, self.precision, self.precision != torch.float32):
            maps = self.outputs.predict(self.network, x.permute(0, 3, 1, 2).float().div(255))
            return maps.mul(255).round().to(torch.uint8)


@contextmanager
def one_result() -> Iterator[None]:
    """Let torch choose kernels that give the same bits in every run on the same machine; undone at the end."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), cudnn.benchmark, torch.get_num_threads()
    filled = memory.fill_uninitialized_memory
    # Warned of, not refused: a network may hold an operation that has no such kernel. `use_deterministic_algorithms`
    # does the same, but imports the compiler first, which takes longer than all else before the first window.
    torch.set_deterministic_debug_mode("warn")
    memory.fill_uninitialized_memory = False  # which costs time and is for finding bugs
    cudnn.benchmark = False
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
    """A package's predictor, and what the manifest says of it: ``device``, ``precision``, ``batch``.

    Parameters
    ----------
    package : ModelPackage
        The model.
    device : {"auto", "cpu", "cuda"}
        Where it shall run.
    batch : int
        Windows at once; 0 chooses by device.
    threads : int
        CPU threads.
    precision : str
        One of `pipeline.networks.precision.PRECISIONS`.
    """
    if not needs_torch(package.network):
        import cv2

        cv2.setNumThreads(1)
        method = WindowPredictor(build_method(package.network, package.network_args), threads, batch)
        return method, {"device": "cpu", "precision": "float32", "batch": 1}
    import torch

    from pipeline.models.weights import load_network
    from pipeline.networks.precision import choose_precision

    outputs = Outputs(channel_names(package), package.tta)
    kind = choose_device(device)
    if kind == "cpu":
        torch.set_num_threads(1)  # a thread a window; over the weights, more would but wait for each other
    network = load_network(package)
    if isinstance(network, Folding):
        network.fold_norms()
    number = choose_precision(precision, kind, network)
    about = {"device": "cpu", "precision": str(number).removeprefix("torch."), "batch": 1}
    if kind == "cuda":
        predictor = BatchPredictor(network, "cuda", batch or max(1, PASS_PIXELS // package.patch**2), outputs, number)
        return predictor, about | {"device": torch.cuda.get_device_name(), "batch": predictor.batch}
    return WindowPredictor(network_on_cpu(network, outputs, number), threads, batch, network), about


def channel_names(package: ModelPackage) -> tuple[str, ...]:
    """Names of a model's maps in the order of the network's channels."""
    return map_names(package.heads, [c.name for c in package.classes])
