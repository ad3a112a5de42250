"""GPUs lent to one process each, tried with devices that are only names."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.machine import gpus

HOLD = """
import os, sys
from pipeline.machine.gpus import borrow
with borrow("auto", int(sys.argv[1])):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that the user lets the pipeline have, and locks of our own."""
    for name in (*gpus.SCHEDULER, gpus.LENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(gpus.VISIBLE, "3,5")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpus, "TRY_EVERY_S", 0.01)


class Job:
    """A process that holds GPUs until it is told to end."""

    def __init__(self, count: int = 1) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def has(self) -> str:
        """Its GPUs; waits until it has them."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        self.process.communicate()


def test_two_jobs_have_one_each_and_a_third_waits() -> None:
    first, second = Job(), Job()
    assert sorted([first.has, second.has]) == ["3", "5"]
    third = Job()
    with pytest.raises(subprocess.TimeoutExpired):
        third.process.wait(0.5)
    first.end(kill=True)  # what a killed job had is free again
    assert third.has in ("3", "5")
    second.end()
    third.end()


def test_job_with_all_gpus_waits_for_all_and_leaves_none_locked() -> None:
    one = Job()
    taken = one.has
    both = Job(2)
    other = Job()  # while one is held, the job that wants two holds none for long
    assert other.has != taken
    one.end()
    other.end()
    assert both.has == "3,5"
    both.end()


def test_environment_is_as_before() -> None:
    with gpus.borrow("cuda") as mine:
        assert mine == ["3"]
        assert os.environ[gpus.VISIBLE] == "3"
        with gpus.borrow("cuda", 2) as again:  # a process of a training on several GPUs
            assert again == []
    assert os.environ[gpus.VISIBLE] == "3,5"
    assert gpus.LENT not in os.environ


def test_lock_that_was_cleared_away_is_no_error() -> None:
    """As by what empties /tmp during a training of days."""
    with gpus.borrow("cuda"):
        for lock in gpus.lock_folder().iterdir():
            lock.unlink()
    assert os.environ[gpus.VISIBLE] == "3,5"


def test_jobs_inside_one_job_of_a_scheduler_share_its_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where snakemake itself was submitted, or several slides go into one job. Others may have the same numbers."""
    taken = []
    for job, step in (("17", "0"), ("17", "0"), ("18", "0"), ("17", "1")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_STEP_ID", step)
        taken.append(Job())
    first, second, *others = (job.has for job in taken)
    assert sorted([first, second]) == ["3", "5"]
    assert others == ["3", "3"]
    for job in taken:
        job.end()
    assert list(gpus.lock_folder().iterdir()) == []


def test_cpu_jobs_take_none() -> None:
    with gpus.borrow("cpu") as mine:
        assert mine == []


def test_more_than_there_are() -> None:
    with pytest.raises(PipelineError, match="3 GPUs are wanted, and there are 2"), gpus.borrow("auto", 3):
        pass


@pytest.mark.parametrize(
    ("visible", "found"), [("0, 1", ["0", "1"]), ("", []), ("-1", []), ("1,-1,0", ["1"]), ("GPU-8f", ["GPU-8f"])]
)
def test_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str, found: list[str]) -> None:
    monkeypatch.setenv(gpus.VISIBLE, visible)
    assert gpus.present() == found


def test_devices_of_the_machine_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(gpus.VISIBLE)
    for name in ("nvidia3", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia0abc"):
        (tmp_path / name).touch()
    assert gpus.present(tmp_path) == ["0", "1"]


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(gpus.fcntl, "flock", flock)
    with gpus.borrow("auto") as mine:
        assert len(mine) == 1
    assert "no locks on this file system" in caplog.text
