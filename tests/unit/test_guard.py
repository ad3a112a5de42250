"""Work in a process of its own: what it returns, raises, and what becomes of one that hangs or crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch.guard import guarded, tried_again
from pipeline.batch.stage import manifest_failure, run_stage
from pipeline.errors import PipelineError, SlideError


def die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)


def test_results_and_errors_come_back() -> None:
    assert guarded(lambda: {"pid": os.getpid()}, 1)["pid"] != os.getpid()
    assert guarded(lambda: {"pid": os.getpid()}, None)["pid"] == os.getpid()

    def bad() -> None:
        raise SlideError("tile 7 does not decode", "copy the slide again")

    with pytest.raises(SlideError, match=r"tile 7 does not decode \(copy the slide again\)"):
        guarded(bad, 1)

    def full() -> None:
        raise OSError(28, "No space left on device", "/x")

    with pytest.raises(OSError, match="No space left") as error:
        guarded(full, 1)
    assert (error.value.errno, error.value.filename) == (28, "/x")
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0, 1)

    def bound() -> None:
        raise ValueError("of a library", lambda: None)

    with pytest.raises(RuntimeError, match=r"ValueError: .*of a library.*pickle"):  # it holds what cannot be sent
        guarded(bound, 1)


def test_large_results_come_back() -> None:
    assert guarded(lambda: "x" * 10_000_000, 1) == "x" * 10_000_000


def test_hanging_work_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(SlideError, match=r"was not finished in 0.009 minutes"):
        guarded(lambda: time.sleep(600), 0.01)
    assert time.monotonic() - start < 30


def test_time_that_is_over_is_the_slides_fault_in_the_last_attempt_alone(tmp_path: Path) -> None:
    def stage(attempt: str) -> dict[str, Any]:
        (tmp_path / "out").mkdir(exist_ok=True)
        return run_stage(
            "tiles", "a", manifest=tmp_path / "out" / "tiles.json", body=lambda staged: time.sleep(600) or {},
            minutes=0.01, again=tried_again(attempt),
        )  # fmt: skip

    for attempt in ("1/3", "2/3"):
        with pytest.raises(PipelineError, match=r"not finished in 0.009 minutes \(the job is tried again") as error:
            stage(attempt)
        assert not isinstance(error.value, SlideError)
        assert not list((tmp_path / "out").iterdir())
    for attempt in ("3/3", "1/1"):
        failure = manifest_failure(stage(attempt))
        assert failure is not None
        assert failure.reason == "was not finished in 0.009 minutes"


@pytest.mark.parametrize(("stage", "module"), [("inspect", "slides.inspect"), ("tissue", "tissue"), ("tiles", "tiles")])
def test_stages_that_read_the_slide_know_the_attempt(stage: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import cli

    found = {}
    monkeypatch.setattr(f"pipeline.{module}.run_{stage}", lambda *args, **options: found.update(options))
    files = {"inspect": ["path"], "tissue": ["inspect", "geojson", "png"]}
    files["tiles"] = ["inspect", "tissue", "geojson", "model", "zarr"]
    line = [stage, "--slide=a", "--out=o", "--job-minutes=30", *(f"--{name}=x" for name in files[stage])]
    for attempt, again in ((["--attempt=2/3"], True), (["--attempt=3/3"], False), ([], False)):
        assert cli.main([*line, *attempt]) == 0
        assert (found["minutes"], found["again"]) == (30, again)


def test_log_tells_where_the_work_hangs(capfd: pytest.CaptureFixture[str]) -> None:
    def decode_forever() -> None:
        time.sleep(600)

    with pytest.raises(SlideError, match="was not finished"):
        guarded(decode_forever, 0.01)
    assert "in decode_forever" in capfd.readouterr().err


@pytest.mark.parametrize("reset", [False, True])
def test_log_tells_where_a_library_crashed(reset: bool, capfd: pytest.CaptureFixture[str]) -> None:
    if reset:  # as libraries do that put back the handlers that Python knows of
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)

    def decode_badly() -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(SlideError, match="crashed"):
        guarded(decode_badly, 1)
    assert "in decode_badly" in capfd.readouterr().err


def test_time_for_which_a_job_is_suspended_does_not_count(tmp_path: Path) -> None:
    job = (
        "import time; from pipeline.batch.guard import guarded; print(guarded(lambda: time.sleep(1.5) or 'done', 0.1))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", job], stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )
    time.sleep(1)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(7)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "done\n"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_crash_of_a_library_is_the_slides(number: int) -> None:
    with pytest.raises(SlideError, match=rf"a library that reads it crashed \({signal.Signals(number).name}\)"):
        guarded(lambda: die(number), 1)


def test_a_killed_process_is_no_fault_of_the_slide() -> None:
    with pytest.raises(PipelineError, match="SIGKILL, as when memory runs out") as error:
        guarded(lambda: die(signal.SIGKILL), 1)
    assert not isinstance(error.value, SlideError)


def test_stage_lists_a_slide_that_crashes(tmp_path: Path) -> None:
    def body(staged: dict[str, Path]) -> dict[str, Any]:
        staged["data"].write_text("half")
        die(signal.SIGSEGV)
        return {}

    record = run_stage(
        "tiles", "a", manifest=tmp_path / "tiles.json", outputs={"data": tmp_path / "data"}, body=body, minutes=1
    )
    failure = manifest_failure(record)
    assert failure is not None
    assert (failure.stage, failure.hint) == ("tiles", "copy or export the slide again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "tiles.json"]
    assert (tmp_path / "data").read_text().startswith("slide 'a' failed at tiles: a library")
