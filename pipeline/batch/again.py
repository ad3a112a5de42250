"""Automatic restart of a run that has lost a store to damage, so that the store is made again.

The stage that finds a damaged store removes it and fails. Within the same run Snakemake would not make the store again,
because the stage that made it is finished. A mark is left in place of the store, at which retries of the job fail at
once. When the run has ended, its process replaces itself (``exec``) with the same command and so keeps its process
number and its terminal; its exit code is that of the second run. Imported while Snakemake parses the workflow.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

NOTES = "NUCLEI_DAMAGED"
"""Environment variable with the path of the file in which stages note the damaged stores that they have removed."""

_SECOND = "NUCLEI_SECOND_RUN"


_MARK = "DAMAGED.txt"


def note_damage(store: Path) -> None:
    """Note that a damaged store has been removed, and leave a mark in its place; without `NOTES`, do nothing.

    Without the mark, each retry of the job would wait for the store to appear.
    """
    if os.environ.get(NOTES):
        with open(os.environ[NOTES], "a", encoding="utf-8") as stream:
            stream.write(f"{store}\n")
        with suppress(FileNotFoundError):  # another job that found the same damage removes this mark and leaves its own
            store.mkdir(exist_ok=True)
            (store / _MARK).write_text("The next run makes this store again.\n", encoding="utf-8")


def how_anew() -> str:
    """Return a hint for the user on how to make a damaged store again."""
    if os.environ.get(NOTES):
        return "run the same command again, where it does not start by itself: then it is made again"
    return "run the stage that makes it again, then this one"


def is_marked(store: Path) -> bool:
    """Whether a mark stands in place of a store: it was damaged and has not been made again yet."""
    return (store / _MARK).is_file()


def _noted(notes: Path) -> list[Path]:
    try:
        stores = {Path(line) for line in notes.read_text(encoding="utf-8").splitlines()}
    except FileNotFoundError:
        return []
    return sorted(store for store in stores if is_marked(store))


def clear_marks(notes: Path) -> None:
    """Remove the marks of damaged stores, before a run looks at the existing files.

    Parameters
    ----------
    notes : pathlib.Path
        The file that `NOTES` names; it is removed, too.
    """
    for store in _noted(notes):
        shutil.rmtree(store)
    notes.unlink(missing_ok=True)


class Restart:
    """Run this process's command once more when it ends, if stores were damaged.

    Parameters
    ----------
    notes : pathlib.Path
        The file that `NOTES` names.
    command : sequence of str, optional
        The command, by default the one that this process was started with.
    """

    def __init__(self, notes: Path, command: Sequence[str] = tuple(sys.orig_argv)) -> None:
        self.notes = notes
        self.command = list(command)
        self._begun = self._wanted = self._stopped = False

    def begin(self) -> None:
        """Prepare for a restart. To be called when the jobs of a run are about to start."""
        self._begun = True
        atexit.register(self._start)  # functions that are registered later run before it
        for number in (signal.SIGINT, signal.SIGTERM):
            self._watch(number)

    def _watch(self, number: int) -> None:
        before = signal.getsignal(number)

        def noted(number: int, frame: FrameType | None) -> None:
            self._stopped = True
            assert callable(before)
            before(number, frame)

        if callable(before):
            signal.signal(number, noted)

    def end(self) -> list[Path]:
        """Decide whether to restart. To be called when a run has ended with failures.

        Returns
        -------
        list of pathlib.Path
            The damaged stores because of which the command starts once more as soon as this process ends. Empty if it
            does not, e.g. because the run was stopped or is itself the second one.
        """
        stores = _noted(self.notes)
        self._wanted = bool(stores) and self._begun and not self._stopped and _SECOND not in os.environ
        return stores if self._wanted else []

    def _start(self) -> None:
        if self._wanted and not self._stopped:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os.environ[_SECOND] = "1"
            os.execv(sys.executable, [sys.executable, *self.command[1:]])
