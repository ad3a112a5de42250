"""A run that lost a store to damage starts once more, and no more than that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.batch.again import NOTES

RUN = """\
import atexit, os, signal, sys
from pathlib import Path
from pipeline.batch.again import Restart, clear_marks, note_damage

with open("starts", "a") as stream:
    stream.write(f"{os.getpid()} {sys.argv[1:]}\\n")
start = len(Path("starts").read_text().splitlines())
signal.signal(signal.SIGTERM, lambda *_: None)  # as Snakemake does
signal.signal(signal.SIGINT, signal.default_int_handler)  # which those started in the background lack
notes = Path(os.environ["NUCLEI_DAMAGED"])
clear_marks(notes)
print(sorted(path.name for path in Path().glob("*.zarr")))
restart = Restart(notes)
restart.begin()
atexit.register(print, "cleaned up")
if "damage" in sys.argv and (start == 1 or "always" in sys.argv):
    for name in ("tiles.zarr", "tiles.zarr", "maps.zarr"):
        note_damage(Path(name))
    Path("maps.zarr", "DAMAGED.txt").unlink()  # as when it was made again
try:
    for name in {"INT", "TERM"}.intersection(sys.argv):
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
except KeyboardInterrupt:
    pass
print(*restart.end())
sys.exit(start)
"""


@pytest.mark.parametrize(
    ("arguments", "starts"),
    [(["a b"], 1), (["damage", "a b"], 2), (["damage", "always"], 2), (["damage", "INT"], 1), (["damage", "TERM"], 1)],
)
def test_a_run_starts_once_more_where_it_should(tmp_path: Path, arguments: list[str], starts: int) -> None:
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "notes").write_text("of an earlier run")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), NOTES: "notes"}
    line = [sys.executable, "run.py", *arguments]
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=60)
    assert (tmp_path / "starts").read_text().splitlines() == [f"{process.pid} {arguments}"] * starts
    assert process.returncode == starts  # that of the last one
    once = ["[]", "tiles.zarr", "cleaned up"]
    there = ["maps.zarr"] if starts == 2 else []
    assert output.splitlines() == (once if starts == 2 else []) + [f"{there}", "", "cleaned up"]
