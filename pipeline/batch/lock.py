"""File locks that are released when the process that holds them ends, however it ends.

Imported while Snakemake parses the workflow.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pipeline.errors import PipelineError
from pipeline.machine.locks import NO_LOCKS

log = logging.getLogger(__name__)

RUN_LOCK = ".lock"
"""Name of the file in a results folder that the folder's run holds locked."""

OWNER = "NUCLEI_RUN"
"""Environment variable of a run's jobs with the text that the run has written into its lock file."""

RESULTS = "NUCLEI_RESULTS"
"""Environment variable of a run's jobs with the folder of that lock file."""

_LOOKING_ONLY = {
    "-n", "--dry-run", "--dryrun", "--unlock", "--lint", "--report", "--summary", "-S", "-D", "--detailed-summary",
    "--dag", "--rulegraph", "--filegraph", "--d3dag", "--list", "--list-rules", "-l", "--list-target-rules", "--lt",
    "--list-changes", "--lc", "--list-input-changes", "--li", "--list-params-changes", "--lp", "--list-code-changes",
    "--list-untracked", "--lu", "--list-conda-envs", "--conda-create-envs-only", "--generate-unit-tests",
    "--archive", "--print-compilation", "--containerize", "--draft-notebook", "--edit-notebook", "-h", "--help",
}  # fmt: skip
"""Snakemake options with which it runs no jobs."""

_GONE = {errno.ESTALE, errno.ENOENT}
"""Error numbers for a lock file that its holder, perhaps on another machine, removed after it had been opened."""

_ATTEMPTS, _PAUSE_S = 600, 0.1


def runs_jobs(arguments: Sequence[str]) -> bool:
    """Whether Snakemake runs jobs if it is given these arguments.

    >>> [runs_jobs(line.split()) for line in ("--cores 2", "-n", "-np all", "-pnj1", "-c2 --config name=-n", "--dag")]
    [True, False, False, False, True, False]
    """
    return not any(
        argument.split("=")[0] in _LOOKING_ONLY or re.match("-[pqFfkrtR]*n", argument) for argument in arguments
    )


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return " ".join(file.read(200).split()) or "a process that did not give its name"


def _sign(file: IO[str]) -> str:
    file.seek(0)
    file.truncate()
    # The time distinguishes runs with the same process number: a restarted run keeps it, and in containers all have 1.
    text = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC).isoformat()}\n"
    file.write(text)
    file.flush()
    return text


def lock_run(folder: Path) -> IO[str] | None:
    """Lock a results folder for a run, for as long as this process lives.

    Parameters
    ----------
    folder : pathlib.Path
        The results folder; created if missing.

    Returns
    -------
    file or None
        The lock file; the caller keeps it open. None if the file system has no locks. The run is named in the file all
        the same, so that jobs of an earlier run end.

    Raises
    ------
    PipelineError
        When another run holds the lock, or the folder cannot be written or locked.
    """
    path = folder / RUN_LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise PipelineError(
            f"results: {str(folder)!r} cannot be written: {error.strerror}",
            "make room or set its permissions, or choose another folder: --config results=FOLDER",
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except BlockingIOError:
        holder = _holder(file)
        file.close()
        raise PipelineError(
            f"results: another run is at work in {str(folder)!r} ({holder})",
            "wait until it ends, or choose another folder: --config results=FOLDER",
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise PipelineError(
                f"results: {str(path)!r} cannot be locked: {error.strerror}",
                "check the file system, or choose another folder: --config results=FOLDER",
            ) from None
        locked = False
    try:
        _sign(file)
        os.fsync(file.fileno())  # for jobs on other machines
    except OSError as error:
        file.close()
        raise PipelineError(
            f"results: {str(folder)!r} cannot be written: {error.strerror}", "make room on that disk"
        ) from None
    if locked:
        return file
    file.close()
    return None


def owner(folder: Path) -> str:
    """Return the text that the last run in a results folder has written into its lock file; empty if there is none."""
    try:
        return " ".join((folder / RUN_LOCK).read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return ""


def check_owner() -> None:
    """Check that this job belongs to the last run in its results folder, by the variables `OWNER` and `RESULTS`.

    A job that outlives its run would remove and overwrite results of a later run.

    Raises
    ------
    PipelineError
        When another run has begun since then.
    """
    mine, folder = os.environ.get(OWNER), os.environ.get(RESULTS)
    if mine and folder and (last := owner(Path(folder))) and mine != last:
        raise PipelineError(
            f"this job is of a run ({mine}) that another one ({last}) has followed in {folder!r}",
            "nothing is lost: that one does the same; cancel jobs that are left of earlier runs",
        )


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock file, after waiting for any process that holds it. The file is removed afterwards.

    Parameters
    ----------
    path : pathlib.Path
        The file; its folder must exist. If the file system has no locks, nothing is held.

    Raises
    ------
    PipelineError
        When another run has begun in the meantime, see `check_owner`.
    """
    file = None
    for left in reversed(range(_ATTEMPTS)):
        try:
            file = _take(path)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                break
            if error.errno not in _GONE or not left:
                raise
        time.sleep(_PAUSE_S)
    try:
        check_owner()
        yield
    finally:
        path.unlink(missing_ok=True)
        if file is not None:
            file.close()


def _take(path: Path) -> IO[str]:
    """Wait for a lock file and return it locked. Raises an error of `_GONE` if its holder has removed it meanwhile."""
    with ExitStack() as opened:
        file = opened.enter_context(path.open("a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for %s, left over from an earlier run: it works on the same", _holder(file))
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            mine = _sign(file)
        except OSError as error:
            if error.errno not in _GONE:  # a full disk
                path.unlink(missing_ok=True)
            raise
        # Check that the path still leads to the locked file. Inode numbers are not compared, because some file systems
        # answer them from a cache or by name.
        if path.read_text(encoding="utf-8") != mine:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        opened.pop_all()
        return file
