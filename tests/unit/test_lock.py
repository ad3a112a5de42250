"""Locks of runs and stages."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch.lock import OWNER, RESULTS, RUN_LOCK, check_owner, held, lock_run, owner, runs_jobs
from pipeline.batch.stage import run_stage
from pipeline.errors import PipelineError
from pipeline.training.command import in_turn

HOLD = "import sys, time; from pathlib import Path; from pipeline.batch.lock import *; "


def holder(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process that takes a lock, says so, and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + code, str(folder)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_run_is_refused_in_one_line_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "out put"
    with holder("lock = lock_run(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)", folder) as other:
        with pytest.raises(PipelineError, match=rf"another run is at work in .*out put' \(process {other.pid} on") as e:
            lock_run(folder)
        assert "\n" not in str(e.value)
        other.kill()
    lock = lock_run(folder)
    assert lock is not None
    assert (folder / RUN_LOCK).read_text().startswith(f"process {os.getpid()} on ")
    lock.close()


def test_jobs_of_a_run_that_another_one_has_followed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OWNER, "process 1 on node7")
    monkeypatch.setenv(RESULTS, str(tmp_path))
    check_owner()  # nobody has run here
    lock = lock_run(tmp_path)
    assert lock is not None
    with pytest.raises(
        PipelineError, match=rf"of a run \(process 1 on node7\) that .* \(process {os.getpid()} on"
    ) as e:
        check_owner()
    assert "\n" not in str(e.value)
    for mine in (owner(tmp_path), ""):
        monkeypatch.setenv(OWNER, mine)
        check_owner()
    lock.close()
    check_owner()  # jobs may outlive their run


def test_a_run_of_the_same_number_and_machine_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the second start of a run, which keeps its number, and runs in containers, which all have the same."""
    monkeypatch.setenv(RESULTS, str(tmp_path))
    for _ in range(2):
        lock = lock_run(tmp_path)
        assert lock is not None
        lock.close()
        monkeypatch.setenv(OWNER, os.environ.get(OWNER) or owner(tmp_path))
    with pytest.raises(PipelineError, match="another one"):
        check_owner()


def test_a_stage_that_waited_until_another_run_began_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OWNER, "process 1 on node7")
    monkeypatch.setenv(RESULTS, str(tmp_path))
    (tmp_path / "tiles.json").write_text("the other run's")
    done: list[str] = []

    def stage() -> None:
        try:
            run_stage("tiles", "a", manifest=tmp_path / "tiles.json", body=lambda staged: {})
        except PipelineError as error:
            done.append(str(error))

    with held(tmp_path / ".lock-tiles.json"):
        thread = threading.Thread(target=stage)
        thread.start()
        thread.join(0.3)
        assert not done
        lock = lock_run(tmp_path)
    thread.join(60)
    assert lock is not None
    lock.close()
    assert "process 1 on node7" in done[0]
    assert (tmp_path / "tiles.json").read_text() == "the other run's"
    assert not (tmp_path / ".lock-tiles.json").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"results: .*/file/out' cannot be written: Not a directory \(make room"):
        lock_run(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--cores 2", True), ("-n", False), ("-np", False), ("-pn --cores 2", False), ("--dry-run", False),
        ("--report=x.html", False), ("--summary", False), ("-c2 train", True), ("--cores 2 --config results=-n", True),
        ("--unlock", False), ("--latency-wait 3 --keep-going", True), ("--sdm conda --conda-create-envs-only", False),
        ("--list-untracked", False), ("--sdm conda", True),
    ],
)  # fmt: skip
def test_what_runs_jobs(line: str, expected: bool) -> None:
    assert runs_jobs(line.split()) is expected


def test_a_stage_waits_for_one_that_a_killed_run_left_behind(tmp_path: Path) -> None:
    """Else the two would take each other's half-written files away."""
    lock = tmp_path / ".lock-tiles.json"
    code = "\nwith held(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    ends: list[float] = []

    def stage() -> None:
        run_stage("tiles", "a", manifest=tmp_path / "tiles.json", body=lambda staged: {})
        ends.append(time.monotonic())

    with holder(code, lock) as other:
        thread = threading.Thread(target=stage)
        thread.start()
        thread.join(0.5)
        assert not ends
        other.kill()
    thread.join(60)
    assert ends
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiles.json"]


def test_a_training_waits_for_one_that_a_killed_run_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "\nfrom pipeline.training.command import in_turn"
    code += "\nwith in_turn(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    ends: list[float] = []

    def training() -> None:
        with in_turn(tmp_path / "new"):
            ends.append(time.monotonic())

    with holder(code, tmp_path / "new") as other:
        thread = threading.Thread(target=training)
        thread.start()
        thread.join(0.5)
        assert not ends
        with monkeypatch.context() as patch:  # a further process of the one that has it
            patch.setenv("LOCAL_RANK", "1")
            training()
            assert len(ends) == 1
        other.kill()
    thread.join(60)
    assert len(ends) == 2
    assert not any((tmp_path / "new").iterdir())


@pytest.mark.parametrize("step", ["flock", "open", "read_text"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
def test_a_lock_file_that_another_machine_has_just_removed_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    """As file servers tell of it whose clients remember names."""
    owner_of: Any = fcntl if step == "flock" else Path
    done = getattr(owner_of, step)
    left = [1, 1]

    def fails_at_first(*args: Any, **options: Any) -> Any:
        if left:
            left.pop()
            raise OSError(number, os.strerror(number))
        return done(*args, **options)

    monkeypatch.setattr(owner_of, step, fails_at_first)
    with held(tmp_path / "lock"):
        assert not left
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_stays_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.batch.lock._PAUSE_S", 0)
    with pytest.raises(FileNotFoundError), held(tmp_path / "none" / "lock"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_jobs_of_an_earlier_run_end_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def none(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    assert lock_run(tmp_path) is None
    monkeypatch.setenv(RESULTS, str(tmp_path))
    monkeypatch.setenv(OWNER, owner(tmp_path))
    with held(tmp_path / ".lock-tiles.json"):
        pass
    assert lock_run(tmp_path) is None
    with pytest.raises(PipelineError, match="another one"), held(tmp_path / ".lock-tiles.json"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [RUN_LOCK]


@pytest.mark.parametrize("inodes", ["told", "by name"])
def test_many_hold_one_lock_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inodes: str) -> None:
    if inodes == "by name":  # an open file that was removed has the inode of the one that has its name now
        monkeypatch.setattr(os.path, "samestat", lambda one, other: True)
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with held(tmp_path / "lock"):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.001)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not (tmp_path / "lock").exists()
