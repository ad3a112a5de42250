"""What continuous integration runs: without SLURM it fails, unless it is told that there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAKE = """\
#!/bin/sh
echo "$1 ${NUCLEI_NEED_SLURM:-}" >> made
[ "$1" = slurm ] && [ "$(grep -c slurm made)" -le "$FAILURES" ] && exit 2
exit 0
"""


@pytest.mark.parametrize(
    ("failures", "without", "code", "made"),
    [
        (0, "", 0, ["slurm ", "test 1"]),
        (1, "", 0, ["slurm ", "slurm ", "test 1"]),
        (9, "", 2, ["slurm ", "slurm "]),
        (9, "1", 0, ["test "]),
    ],
)
def test_slurm_has_to_be_there(tmp_path: Path, failures: int, without: str, code: int, made: list[str]) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    make = tmp_path / "bin" / "make"
    make.write_text(MAKE)
    make.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "FAILURES": str(failures),
        "NUCLEI_WITHOUT_SLURM": without,
    }
    environment.pop("NUCLEI_NEED_SLURM", None)
    done = subprocess.run([tmp_path / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "made").read_text().splitlines() == made
    assert ("NUCLEI_WITHOUT_SLURM is set" in done.stderr) == bool(without)
