"""A run that has lost a store to damage starts once more by itself, so that the store is made again.

The stage that finds a store damaged removes it and fails. Within a run Snakemake would not make it again: the stage
that did is finished. A mark stays in its place, at which further tries of the job end at once. When the run has ended,
its process becomes the same command once more, with its number, its terminal, and in the end its exit code. Imported
while Snakemake parses the workflow.
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
"""Environment variable with the file in which stages note what they have removed."""

_SECOND = "NUCLEI_SECOND_RUN"


_MARK = "DAMAGED.txt"


def note_damage(store: Path) -> None:
    """Note that a damaged store has been removed, where a run wants to know of it, and leave a mark in its place.

    Without one, each time that the job is tried again it would wait until the store appears.
    """
    if os.environ.get(NOTES):
        with open(os.environ[NOTES], "a", encoding="utf-8") as stream:
            stream.write(f"{store}\n")
        with suppress(FileNotFoundError):  # another job that found the same takes the mark away, and leaves its own
            store.mkdir(exist_ok=True)
            (store / _MARK).write_text("The next run makes this store again.\n", encoding="utf-8")


def how_anew() -> str:
    """What to do where a store was damaged."""
    if os.environ.get(NOTES):
        return "run the same command again, where it does not start by itself: then it is made again"
    return "run the stage that makes it again, then this one"


def is_marked(store: Path) -> bool:
    """Whether a store was damaged, and has not been made again yet."""
    return (store / _MARK).is_file()


def _noted(notes: Path) -> list[Path]:
    try:
        stores = {Path(line) for line in notes.read_text(encoding="utf-8").splitlines()}
    except FileNotFoundError:
        return []
    return sorted(store for store in stores if is_marked(store))


def clear_marks(notes: Path) -> None:
    """Before a run looks at what there is: take away what stands for damaged stores.

    Parameters
    ----------
    notes : pathlib.Path
        The file of `NOTES`; it goes, too.
    """
    for store in _noted(notes):
        shutil.rmtree(store)
    notes.unlink(missing_ok=True)


class Restart:
    """Starts this process' command once more.

    Parameters
    ----------
    notes : pathlib.Path
        The file of `NOTES`.
    command : sequence of str, optional
        The command, by default the one that this process was started with.
    """

    def __init__(self, notes: Path, command: Sequence[str] = tuple(sys.orig_argv)) -> None:
        self.notes = notes
        self.command = list(command)
        self._begun = self._wanted = self._stopped = False

    def begin(self) -> None:
        """When the jobs of a run are about to start."""
        self._begun = True
        atexit.register(self._start)  # what is registered after it is done before it
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
        """When a run has ended with failures.

        Returns
        -------
        list of pathlib.Path
            The stores because of which it starts again as soon as this process ends. None: it does not, as when it was
            stopped or is the second one.
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
