"""GPUs of this machine, lent to one process each.

Snakemake counts how many GPU jobs run at a time, but does not say which GPU is whose. Here each job takes one that no
other job has: a lock on a file, which the system gives up with the process, however that ends. So do those that run
beside each other in one SLURM job, among the GPUs that it was given.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
SCHEDULER = ("SLURM_JOB_ID", "SLURM_STEP_ID")
"""Variables that tell of a scheduler's job and step, each of which may number its GPUs from 0."""

LENT = "NUCLEUS_PIPELINE_GPUS"
"""Variable that tells the processes of a job, as those of a training on several GPUs, that it has its GPUs."""

TRY_EVERY_S = 0.5
SAY_EVERY_S = 60.0


def present(devices: Path = Path("/dev")) -> list[str]:
    """The GPUs that this process may use: what CUDA_VISIBLE_DEVICES names, else all of the machine.

    Parameters
    ----------
    devices : pathlib.Path
        Folder of the machine's devices.

    Returns
    -------
    list of str
        Numbers, or names as NVIDIA's driver gives them (``GPU-...``, ``MIG-...``); empty without a GPU.
    """
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA ignores what follows an invalid entry; -1 and nothing hide all GPUs.
        return names[: next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))]
    # CUDA counts the devices it finds, whatever their own numbers are.
    found = [path for path in devices.glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    return [str(index) for index in range(len(found))]


def lock_folder() -> Path:
    """Folder of the locks, this user's alone.

    Raises
    ------
    PipelineError
        When it belongs to somebody else.
    """
    folder = Path(tempfile.gettempdir(), f"nucleus-pipeline-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PipelineError(f"{folder} belongs to somebody else", "remove it, or set TMPDIR")
    return folder


def _take(name: str, stack: ExitStack) -> bool:
    whose = "".join(f"{os.environ[one]}-" for one in SCHEDULER if one in os.environ)
    path = lock_folder() / f"{whose}{name.replace('/', '_')}.lock"
    with ExitStack() as opened:
        stream = opened.enter_context(path.open("w"))
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(stream.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if mine:  # and not removed meanwhile by who had it before
            stack.push(opened.pop_all())
            stack.callback(path.unlink, missing_ok=True)  # what empties /tmp may have been there
        return mine


@contextmanager
def borrow(device: str, count: int = 1) -> Iterator[list[str]]:
    """Have GPUs for oneself: CUDA_VISIBLE_DEVICES names them alone, until the end.

    To be entered before CUDA is asked for anything. Waits while too few are free. Nothing is done where there is no
    GPU, where none is wanted, and inside another job's process.

    Parameters
    ----------
    device : {"auto", "cuda", "cpu"}
        The setting.
    count : int
        GPUs wanted.

    Yields
    ------
    list of str
        The GPUs; empty when nothing was done.

    Raises
    ------
    PipelineError
        When more are wanted than there are.
    """
    names = present()
    if device == "cpu" or not names or LENT in os.environ:
        yield []
        return
    if count > len(names):
        raise PipelineError(f"{count} GPUs are wanted, and there are {len(names)}", "ask for fewer")
    before = {name: os.environ.get(name) for name in (VISIBLE, LENT)}
    with ExitStack() as stack:
        mine = _wait(names, count, stack)
        os.environ[VISIBLE] = os.environ[LENT] = ",".join(mine)
        log.info("GPU %s", ", ".join(mine))
        try:
            yield mine
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _wait(names: list[str], count: int, stack: ExitStack) -> list[str]:
    start = said = time.monotonic()
    while True:
        # All or none: two jobs that hold one each and want two would wait for ever.
        with ExitStack() as attempt:
            mine: list[str] = []
            for name in names:
                if len(mine) < count and _take(name, attempt):
                    mine.append(name)
            if len(mine) == count:
                stack.push(attempt.pop_all())
                return mine
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            log.info("waiting for a free GPU of %s since %.0f s", ", ".join(names), said - start)
        time.sleep(TRY_EVERY_S)
