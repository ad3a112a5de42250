"""Run work in a separate process with a time limit, so that a library that hangs or crashes does no further harm."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import pickle
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from pipeline.errors import PipelineError, SlideError

log = logging.getLogger(__name__)

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""Signals that end a process when a library crashes on data that it cannot handle."""

SHARE = 0.9
"""Share of a job's time limit that the work may take, so that it ends before the scheduler kills the job."""

_PR_SET_PDEATHSIG = 1
_TELL = signal.SIGUSR1  # makes the child print its stack traces
_SLICE = 1.0


def tried_again(attempt: str) -> bool:
    """Whether a job is tried again if this attempt fails, which is given as ``NUMBER/TOTAL``.

    >>> tried_again("1/3"), tried_again("3/3"), tried_again("1/1")
    (True, False, False)
    """
    number, _, attempts = attempt.partition("/")
    return int(number) < int(attempts)


def guarded(work: Callable[[], Any], minutes: float | None, again: bool = False) -> Any:
    """Run some work on a slide in a forked process.

    Parameters
    ----------
    work : callable
        The work; its return value must be picklable.
    minutes : float or None
        Minutes that the job may take. The work gets nine tenths of them, not counting time for which the machine or the
        whole job was suspended. If None, there is no limit, and the work runs in this process.
    again : bool
        Whether the job is tried again with more time if it fails. If so, running out of time is not the slide's fault.

    Returns
    -------
    object
        What `work` returns.

    Raises
    ------
    SlideError
        When the time is over, or when a library crashed.
    PipelineError
        When the process was killed from outside, e.g. for lack of memory, or when the time is over and the job is tried
        again.
    """
    if minutes is None:
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _in_child(work, os.fdopen(writer, "wb"), parent)
    os.close(writer)
    try:
        answer = _receive(reader, SHARE * 60 * minutes)
        if answer is None:
            os.kill(child, _TELL)
            time.sleep(_SLICE)
            what = f"was not finished in {SHARE * minutes:g} minutes"
            if again:
                raise PipelineError(f"the slide {what}", "the job is tried again, with more time")
            raise SlideError(
                what,
                "copy or export the slide again; if it is whole, delete its results and give the rule more time: "
                "--set-resources RULE:runtime=MINUTES (with a profile, under its set-resources)",
            )
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not answer:
        raise _ended(status)
    done, value = pickle.loads(answer)
    if not done:
        raise value
    return value


def _ended(status: int) -> PipelineError:
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    if -status in CRASHES:
        return SlideError(f"a library that reads it crashed ({name})", "copy or export the slide again")
    why = ", as when memory runs out" if status == -signal.SIGKILL else ""
    return PipelineError(f"the process that read the slide was ended ({name}{why})", "run again, with more memory")


def _receive(reader: int, seconds: float) -> bytes | None:
    """Read a pipe to its end, or return None if the time runs out first."""
    parts: list[bytes] = []
    while seconds > 0:
        start = time.monotonic()
        ready = select.select([reader], [], [], min(seconds, _SLICE))[0]
        # If a slice took much longer, this process was suspended in the meantime: do not count that time.
        seconds -= min(time.monotonic() - start, 2 * _SLICE)
        if ready:
            part = os.read(reader, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None


def _in_child(work: Callable[[], Any], pipe: IO[bytes], parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux: end with the parent, however it ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above
        os._exit(1)
    # Print where a library crashed or hangs to the log, whatever `sys.stderr` is. Disable it first: if it is already
    # enabled, enabling it again would not restore signal handlers that a library has reset (Lightning does).
    faulthandler.disable()
    faulthandler.enable(file=2)
    faulthandler.register(_TELL, file=2)
    status = 1
    try:
        try:
            answer = True, work()
        except BaseException as error:
            if not isinstance(error, (PipelineError, OSError, KeyboardInterrupt)):
                log.exception("a crash")
            answer = False, error
        try:
            sent = pickle.dumps(answer)
        except Exception as error:  # an exception of a library may hold what cannot be sent: send its words
            words = f"{type(answer[1]).__name__}: {answer[1]}"
            sent = pickle.dumps((False, RuntimeError(f"{words} (it cannot be sent: {error})")))
        with pipe:
            pipe.write(sent)
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
