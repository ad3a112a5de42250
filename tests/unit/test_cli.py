"""The command line: its table of commands, exit codes and one-line errors."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.errors import PipelineError, SlideError
from pipeline.layout import OPTIONAL_STAGES, STAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], int]], None]:
    """Put a function in the place of a command called ``fake``."""

    def install(main: Callable[[argparse.Namespace], int]) -> None:
        module = types.ModuleType("fake_stage")
        module.add_arguments = lambda parser: parser.add_argument("--slide")  # type: ignore[attr-defined]
        module.main = main  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_stage", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_stage", "does nothing"))

    return install


def test_every_stage_is_a_command() -> None:
    assert tuple(cli.STAGES) == (*STAGES, *OPTIONAL_STAGES, "cohort")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_has_a_module_with_options(name: str) -> None:
    command = cli.COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser()
    getattr(module, command.add_arguments)(parser)
    assert callable(getattr(module, command.main))
    assert parser.format_help()


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_shows_every_command_on_a_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name] and line.endswith(command.help)], name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nucleus-pipeline 0.")


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["tisue"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'tisue' (python -m pipeline --help lists them)\n"


@pytest.mark.parametrize("kind", [PipelineError, SlideError])
def test_our_errors_are_one_line(
    kind: type[PipelineError], fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(args: argparse.Namespace) -> int:
        raise kind(f"slide {args.slide!r}:\nbroken", "mend it")

    fake(main)
    assert cli.main(["fake", "--slide=-x"]) == 2
    assert capsys.readouterr().err == "error: slide '-x': broken (mend it)\n"


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.ENOSPC, "No space left on device (make room there and run the same command again)"),
        (errno.EIO, "Input/output error (check the disk or the file server and run the same command again)"),
        (errno.ESTALE, "Stale file handle (check the file server and run the same command again)"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    number: int, what: str, fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: argparse.Namespace) -> int:
        raise OSError(number, what.split(" (")[0], "/data/tiles.zarr")

    fake(main)
    assert cli.main(["fake"]) == 1
    assert capsys.readouterr().err == f"error: fake: /data/tiles.zarr: {what}\n"


def test_interrupt(fake: Callable[..., None]) -> None:
    def main(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    fake(main)
    assert cli.main(["fake"]) == 130


def test_a_bug_keeps_its_traceback(fake: Callable[..., None]) -> None:
    def main(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    fake(main)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_status_is_the_commands(fake: Callable[..., None]) -> None:
    fake(lambda _: 7)
    assert cli.main(["fake"]) == 7


def test_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline import cli, layout; from pipeline.batch import settings, slide_table;"
        "cli.main(['--help']);"
        "heavy = {'numpy', 'torch', 'pandas', 'scipy', 'zarr', 'openslide', 'cv2'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["inspect", "tissue", "tiles", "stain", "instances", "measure", "export", "labels", "cohort"]
)
def test_stage_modules_import_no_torch(name: str) -> None:
    code = f"import sys, {cli.COMMANDS[name].module}; sys.exit('torch' in sys.modules and 'imports torch')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads here")
def test_stages_start_no_threads_for_linear_algebra() -> None:
    code = """
import os
from contextlib import suppress
from pipeline import cli
with suppress(SystemExit):
    cli.run("measure", ["--help"])
print(len(os.listdir("/proc/self/task")))
"""
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "1"


def test_stages_start_without_what_they_do_not_use() -> None:
    # pyarrow alone would import pandas here, staintools pyplot and SPAMS.
    code = (
        "import sys; sys.argv = ['pipeline', 'stain']; import pipeline.__main__, pyarrow;"
        "assert pyarrow.array([1]).to_numpy()[0] == 1;"
        "from pipeline import staintools_backend; staintools_backend.extractors();"
        "found = [n for n in ('pandas', 'matplotlib.pyplot', 'spams', 'torch') if sys.modules.get(n)];"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_image_libraries_say_nothing_on_the_command_line() -> None:
    """What matters of a damaged image ends in an error of ours."""
    code = "import logging; from pipeline import logs; logs.configure(True); logging.getLogger('tifffile').error('x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
