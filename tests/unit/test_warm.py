"""Stages started warm do what they do when started afresh, and end with whoever asked for them."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3
import numpy as np
import pytest

from pipeline.batch import warm

pytestmark = pytest.mark.skipif(not warm.possible(), reason="needs Linux")

START = """
import sys, time
from pipeline.batch.warm import start_server
print(start_server().process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[warm.Server]:
    found = warm.start_server()
    assert found is not None
    yield found
    found.stop()
    assert warm.ADDRESS not in os.environ
    assert not found.folder.exists()


def inspect(folder: Path, out: str, *options: str) -> list[str]:
    path = folder / "a.png"
    if not path.exists():
        imageio.v3.imwrite(path, np.full((64, 80, 3), 200, np.uint8))
    command = [sys.executable, "-m", "pipeline", "inspect", "--slide=a", f"--path={path}", "--mpp=0.5"]
    return [*command, f"--out={out}", *options]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_command_runs_in_a_child_of_the_server(server: warm.Server, tmp_path: Path) -> None:
    # The lock of the manifest keeps the stage waiting, so that there is time to look.
    with (tmp_path / ".lock-slide.json").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = subprocess.Popen(inspect(tmp_path, "slide.json"), cwd=tmp_path)
        until(lambda: children(server.process.pid))
        assert not (tmp_path / "slide.json").exists()
    assert command.wait(60) == 0
    assert (tmp_path / "slide.json").is_file()
    until(lambda: not children(server.process.pid))


def test_killed_command_ends_its_stage(server: warm.Server, tmp_path: Path) -> None:
    with (tmp_path / ".lock-slide.json").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = subprocess.Popen(inspect(tmp_path, "slide.json"), cwd=tmp_path)
        until(lambda: children(server.process.pid))
        (child,) = children(server.process.pid)
        command.kill()
        command.wait()
        until(lambda: not alive(child))
    assert not (tmp_path / "slide.json").exists()


def test_killed_stage_ends_its_command(server: warm.Server, tmp_path: Path) -> None:
    with (tmp_path / ".lock-slide.json").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = subprocess.Popen(inspect(tmp_path, "slide.json"), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        until(lambda: children(server.process.pid))
        (child,) = children(server.process.pid)
        os.kill(child, signal.SIGKILL)
        _, said = command.communicate(timeout=60)
    assert command.returncode == 128 + signal.SIGKILL
    # Before that, where it came so far, it waited for the lock.
    assert said.splitlines()[-1].startswith("error: inspect: its process was killed")


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [(["--reader=unheard-of"], 2, "invalid choice"), (["--out=/proc/no/slide.json"], 1, "error: inspect: ")],
)
def test_errors_are_those_of_the_command(
    server: warm.Server, tmp_path: Path, options: list[str], status: int, said: str
) -> None:
    done = subprocess.run(
        inspect(tmp_path, "slide.json", *options), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert said in done.stderr


def test_command_without_a_server_runs_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(warm.ADDRESS, str(tmp_path / "nobody"))
    assert warm.ask_server(["--version"]) is None
    assert subprocess.run(inspect(tmp_path, "slide.json"), cwd=tmp_path, check=False).returncode == 0


def test_half_a_request_holds_nothing_open(server: warm.Server, tmp_path: Path) -> None:
    assert subprocess.run(inspect(tmp_path, "slide.json"), cwd=tmp_path, check=False).returncode == 0  # it is ready
    until(lambda: not children(server.process.pid))
    open_files = Path(f"/proc/{server.process.pid}/fd")
    before = len([*open_files.iterdir()])
    for sent in (b"\0", b"\0\0\0\x09{", b"\0\0\0\x02{]"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.environ[warm.ADDRESS])
            socket.send_fds(connection, [sent], [0, 1, 2])
    until(lambda: len([*open_files.iterdir()]) == before, 10)


def test_a_command_that_says_nothing_does_not_keep_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_PATIENCE_S", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(TimeoutError):
            warm._receive(theirs)
        before = len(os.listdir("/proc/self/fd"))
        socket.send_fds(ours, [b"\0\0\0\x09{"], [0, 1, 2])
        with pytest.raises(TimeoutError):
            warm._receive(theirs)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_command_that_the_server_turns_away_runs_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        monkeypatch.setenv(warm.ADDRESS, str(tmp_path / "socket"))
        turned_away = threading.Thread(target=lambda: listener.accept()[0].close())
        turned_away.start()
        assert warm.ask_server(["x" * (1 << 24)]) is None  # more than a socket holds
        turned_away.join()


def test_a_command_in_the_queue_of_a_server_that_goes_runs_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    monkeypatch.setenv(warm.ADDRESS, str(tmp_path / "socket"))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(warm.ask_server, ["--version"])
        assert select.select([listener], [], [], 60)[0]  # it is in the queue
        time.sleep(0.2)
        listener.close()
        assert asked.result(60) is None


@pytest.mark.parametrize("name", ["x" * 100, "missing"])
def test_a_run_does_without_where_no_socket_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.delenv(warm.ADDRESS, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    assert warm.start_server() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no warm start: ")
    assert warm.ADDRESS not in os.environ
    assert not [*(tmp_path / ("x" * 100)).iterdir()]


def test_server_ends_with_the_process_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", START], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        until(lambda: "warm-server" in Path(f"/proc/{pid}/cmdline").read_text())
        process.kill()
    until(lambda: not alive(pid))
