"""Run a network on a GPU in batches of windows; colours are transformed and maps blended on the GPU as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.kernels.blend import PatchGrid, blend_weights, weight_sum
from pipeline.kernels.stain import StainTransform
from pipeline.networks.outputs import FindsInstances, Outputs
from pipeline.prediction.predictors import Finish, Places, SlideMaps, Strip, runs

log = logging.getLogger(__name__)


class DeviceBlender:
    """Blend windows as `pipeline.kernels.blend.Blender` does, but on a GPU and batch by batch.

    Edges are joined for whole runs of windows, because separate calls for each window would take longer than the
    network. The sums are of integers, so the results equal those of `Blender`.

    Parameters
    ----------
    grid : PatchGrid
        Where the windows lie.
    largest : bool
        As for `Blender`.
    device : torch.device
        Device that holds the maps.
    """

    def __init__(self, grid: PatchGrid, largest: bool, device: torch.device) -> None:
        self.grid = grid
        self._largest = largest
        self._weights = torch.from_numpy(blend_weights(grid.patch, grid.overlap)).to(device)
        self._sum = weight_sum(grid.overlap)
        # For each column, the lower edge of the last window that was added there, and the row of that window.
        self._edges: Tensor | None = None
        self._rows = np.full(grid.columns, -2)
        self._left: Tensor | None = None
        self._last = (-2, -2)

    def add(self, places: Places, maps: Tensor) -> Tensor:
        """Add a batch of windows.

        Parameters
        ----------
        places : sequence of (int, int)
            Rows and columns of the windows, which come in raster order.
        maps : torch.Tensor
            uint8 ``(N, C, patch, patch)``.

        Returns
        -------
        torch.Tensor
            uint8 ``(N, C, stride, stride)``: the pixels of each window that no later one reaches.
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
            # Windows with a neighbour above. Looked up on the host, as asking the device would wait for the network.
            for _, begin, below in runs([(0, int(i)) for i in np.flatnonzero(self._rows[columns] == row - 1)]):
                edges = self._edges[first + begin : first + begin + below]
                self._join(run[begin : begin + below, ..., :overlap, :stride], edges)
            self._edges[columns] = run[..., stride:, :stride]
            self._rows[columns] = row
            self._left, self._last = right[end - 1].clone(), (row, first + count - 1)
            start = end
        done = total[..., :stride, :stride]
        return (done if self._largest else (done + self._sum // 2) // self._sum).byte()

    def _join(self, edge: Tensor, other: Tensor) -> None:
        if self._largest:
            torch.maximum(edge, other, out=edge)
        else:
            edge += other


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the device, or pinned memory of the host, does not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Without room to work in, cuDNN finds no way to compute a convolution.
    told = ("out of memory", "ALLOC_FAILED", "unable to find an engine")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


@contextmanager
def within_memory(device: torch.device) -> Iterator[None]:
    """Turn a lack of memory within the context into a `PipelineError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise PipelineError(
            f"{device} has not enough memory left for the network", "does another process hold it? See nvidia-smi"
        ) from None


class BatchPredictor:
    """Predictor that runs batches of one size on a GPU and blends them there.

    Parameters
    ----------
    network : torch.nn.Module
        Returns logits ``(N, C, H, W)`` for images in [0, 1].
    device : str
        ``cuda``, or ``cpu`` for comparison.
    batch : int
        Windows per forward pass; halved whenever the device runs out of memory.
    outputs : Outputs
        How logits become maps.
    precision : torch.dtype
        Type of the numbers that the network computes with.
    threads : int
        CPU threads that compute a slide's table of colours.
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
        self.device = torch.device(device)
        self.batch = batch
        self.outputs = outputs
        with within_memory(self.device):
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
        """Seconds in which the GPU was computing; None on a CPU."""
        return self._busy if self.on_gpu else None

    def slide(self, grid: PatchGrid, transform: StainTransform) -> SlideMaps:
        """See `Predictor`."""
        with within_memory(self.device):
            return _BatchSlide(self, grid, transform)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Maps of windows, see `Predictor`."""
        return np.asarray(self.maps(self.load(patches)).cpu())

    def load(self, patches: np.ndarray) -> Tensor:
        """Copy windows to the device, uint8 ``(N, H, W, 3)``."""
        return torch.from_numpy(patches).to(self.device)

    def maps(self, x: Tensor, colours: Tensor | None = None) -> Tensor:
        """Maps uint8 ``(N, C, H, W)`` of windows on the device, in as many passes as its memory requires."""
        done: list[Tensor] = []
        start = 0
        while start < len(x):
            part = x[start : start + self.batch]
            try:
                found = self.forward(part, colours)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                found = None  # go on outside this block: within it, the error keeps the pass's layers in memory
            if found is not None:
                done.append(found)
                start += len(part)
                continue
            if self.batch == 1:
                raise PipelineError(
                    f"{self.device}: not even one window fits the memory", "use another device or a smaller model"
                )
            self.batch = -(-self.batch // 2)  # rounded up: full batches are cut into as few passes as fit
            log.warning("%s is out of memory: going on with batches of %d", self.device, self.batch)
            if self.on_gpu:
                torch.cuda.empty_cache()
        return done[0] if len(done) == 1 else torch.cat(done)

    def forward(self, x: Tensor, colours: Tensor | None = None) -> Tensor:
        """Maps of at most `batch` windows in one forward pass.

        Fewer windows are padded to a full batch: with one shape, the same kernels always run.

        Parameters
        ----------
        x : torch.Tensor
            uint8 ``(N, H, W, 3)``.
        colours : torch.Tensor, optional
            The colour that replaces each colour, int32 ``(256**3,)``: `pipeline.kernels.stain.StainTransform.table`
            with its four bytes taken as one number. By default colours stay as they are.

        Returns
        -------
        torch.Tensor
            uint8 ``(N, C, H, W)``.
        """
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
        """Add the seconds that a batch took on the GPU to `busy`."""
        self._busy += seconds


class _BatchSlide:
    """`SlideMaps` of a `BatchPredictor`.

    Strips are copied to the device as they are. There, windows are cut out of them and their colours transformed.
    """

    def __init__(self, predictor: BatchPredictor, grid: PatchGrid, transform: StainTransform) -> None:
        self._predictor = predictor
        self._grid = grid
        self._blender = DeviceBlender(grid, isinstance(predictor.network, FindsInstances), predictor.device)
        self._colours: Tensor | None = None
        if transform.method != "none":
            # Look colours up in a table computed on the CPU: logarithms and powers round differently on a GPU.
            with ThreadPoolExecutor(predictor.threads) as pool:
                table = transform.table(pool.map)
            self._colours = torch.from_numpy(table.view(np.int32).reshape(-1)).to(predictor.device)
        # A stream of their own lets strips be copied while the batch before them is computed.
        self._copies = torch.cuda.Stream(predictor.device) if predictor.on_gpu else None

    def prepare(self, strips: Sequence[Strip]) -> Callable[[], Finish]:
        """See `SlideMaps`."""
        if self._predictor.on_gpu:
            # Pinned memory, from which the GPU copies by itself. All full batches have one size, so torch reuses it.
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
        places = [place for strip in strips for place in strip.places]
        try:
            return self._begun(places, strips)
        except (RuntimeError, MemoryError) as error:  # not from a forward pass: that halves the batch itself
            if not out_of_memory(error):
                raise
            raise PipelineError(
                f"{self._predictor.device} is out of memory: {len(places)} windows at once do not fit",
                f"set infer.batch to {max(1, len(places) // 4)} or less",
            ) from None

    def _begun(self, places: Places, strips: Sequence[Strip]) -> Finish:
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

        def finish(_copied_from: Sequence[Strip] = strips) -> Iterator[np.ndarray]:  # keeps the strips alive
            ended.synchronize()
            self._predictor.computed(started.elapsed_time(ended) / 1000)
            return iter(np.asarray(done))

        return finish

    def _windows(self, strips: Sequence[Strip]) -> Tensor:
        """Copy strips to the device and cut the windows out of them, uint8 ``(N, H, W, 3)``."""
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
