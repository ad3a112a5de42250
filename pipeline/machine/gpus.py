"""Assign the GPUs of this machine to processes, each to one at a time.

Snakemake limits how many GPU jobs run at a time, but does not assign a GPU to each. Here each job takes a GPU that no
other job has, by locking a file; the system releases the lock when the process ends, however it ends. Jobs that run
beside each other in one SLURM job share its GPUs in the same way.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.machine.locks import NO_LOCKS

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
SCHEDULER = ("SLURM_JOB_ID", "SLURM_STEP_ID")
"""Environment variables with a scheduler's job and step, each of which may number its GPUs from 0."""

LENT = "NUCLEUS_PIPELINE_GPUS"
"""Environment variable that is set once a job has its GPUs, for child processes as in a training on several GPUs."""

TRY_EVERY_S = 0.5
SAY_EVERY_S = 60.0


def present(devices: Path = Path("/dev")) -> list[str]:
    """Return the GPUs that this process may use: those that CUDA_VISIBLE_DEVICES names, else all of the machine.

    Parameters
    ----------
    devices : pathlib.Path
        Folder of the machine's devices.

    Returns
    -------
    list of str
        Numbers, or names that NVIDIA's driver gives (``GPU-...``, ``MIG-...``); empty without a GPU.
    """
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA ignores all entries from the first invalid one on, such as -1 or an empty one.
        return names[: next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))]
    # CUDA numbers the devices that it finds from 0, whatever the numbers in their names are.
    found = [path for path in devices.glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    return [str(index) for index in range(len(found))]


def lock_folder() -> Path:
    """Return the folder of this user's lock files, which is created if missing.

    Raises
    ------
    PipelineError
        When it belongs to somebody else.
    """
    # The folder of temporary files may be shared by several machines.
    folder = Path(tempfile.gettempdir(), f"nucleus-pipeline-gpus-{os.getuid()}-{socket.gethostname()}")
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
        except OSError as error:
            if error.errno == errno.ESTALE:  # removed by its holder
                return False
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s: no locks on this file system: GPU %s may be used by another job as well", path, name)
            mine = True
        if mine:  # locked, and the path still leads to this file: the previous holder may have removed it meanwhile
            stack.push(opened.pop_all())
            stack.callback(path.unlink, missing_ok=True)  # a cleaner of /tmp may have removed it
        return mine


@contextmanager
def borrow(device: str, count: int = 1) -> Iterator[list[str]]:
    """Reserve GPUs for this process: CUDA_VISIBLE_DEVICES names only these until the context ends.

    Enter it before the first use of CUDA. It waits while too few GPUs are free. It does nothing if the machine has no
    GPU, if `device` is ``"cpu"``, and in a child process of a job that has its GPUs already.

    Parameters
    ----------
    device : {"auto", "cuda", "cpu"}
        The setting ``device``.
    count : int
        Number of GPUs wanted.

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
        # All or none: two jobs that each hold one GPU and want two would wait for ever.
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
