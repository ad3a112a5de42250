"""``python -m benchmarks``: measure, print a table, write JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks import exactness, peer, scale, speed
from benchmarks.harness import Figure, table
from benchmarks.speed import DEFAULT, Options
from pipeline.machine.allocator import share_heap
from pipeline.machine.cores import available_cores
from pipeline.networks.precision import PRECISIONS

ROWS: dict[str, Callable[[Options], Iterator[Figure]]] = {
    "tiles": speed.tiles_row,
    "infer": speed.infer,
    "infer-host": speed.infer_host,
    "infer-gpu": speed.infer_gpu,
    "instances": speed.instances,
    "measure": speed.measure,
    "export": speed.export,
    "slide": speed.whole,
    "slide-gpu": speed.whole_gpu,
    "startup": speed.startup,
    "cohort": speed.cohort,
    "seams": exactness.seams,
    "tiatoolbox": peer.tiatoolbox,
    "memory": scale.memory,
    "million": scale.million,
}
"""Benchmarks by name."""

NOT_ALWAYS = ("cohort", "memory", "million")
"""Benchmarks that take minutes each and run only when named."""


def environment() -> dict[str, object]:
    """Describe what the figures depend on besides the code: machine, load and versions of libraries."""
    names = ("numpy", "opencv-python-headless", "scikit-image", "torch", "zarr", "shapely", "pyarrow", "orjson")
    return {
        "machine": platform.machine(),
        "cores": available_cores(),
        "python": platform.python_version(),
        "load": [round(value, 2) for value in os.getloadavg()],
        **{name: version(name) for name in names},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; `argv` defaults to the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"what to measure: {', '.join(ROWS)}; default: all but the long ones")
    parser.add_argument("--quick", action="store_true", help="small inputs, two minutes for all")
    parser.add_argument("--model", type=Path, default=DEFAULT, help="model package of the rows with a network")
    parser.add_argument(
        "--slide", type=Path, help="slide for the rows tiles, slide, slide-gpu and tiatoolbox (default: synthetic)"
    )
    parser.add_argument("--peer", type=Path, help="Python of an environment with tiatoolbox, for the row of that name")
    parser.add_argument("--count", type=int, default=40, help="tiny slides of the row cohort (default: 40)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="numbers that networks compute with")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="JSON to write")
    parser.add_argument("--folder", type=Path, help="where to work (some GB for the long ones; default: temporary)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    rows = args.rows or [name for name in ROWS if name not in NOT_ALWAYS]
    figures: list[Figure] = []
    # Set up memory in this process as the stages' commands do, but do not pass it on to the processes started here.
    if share_heap():
        del os.environ["MALLOC_ARENA_MAX"]
    start = time.perf_counter()
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmarks-") as folder:
        options = Options(
            Path(folder), args.quick, args.model, args.slide, args.peer, precision=args.precision, count=args.count
        )
        for name in rows:
            print(f"{name} ...", file=sys.stderr, flush=True)
            for figure in ROWS[name](replace(options, folder=Path(folder) / name)):
                figures.append(figure)
                print(table([figure], head=False), file=sys.stderr, flush=True)
    around, seconds = environment(), round(time.perf_counter() - start, 1)
    value = {"environment": around, "quick": args.quick, "seconds": seconds}
    args.out.write_text(json.dumps(value | {"figures": [f.to_json() for f in figures]}, indent=1) + "\n")
    print(table(figures))
    print(f"\n{seconds} s, load {around['load']}; details in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
