"""Errors that users see: one line that names what is wrong, its value and what to do."""

from __future__ import annotations

import errno
from pathlib import Path

_OF_THE_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "ENOMEM", "EMFILE", "ENFILE", "EAGAIN", "ENOTCONN", "ECONNRESET", "EHOSTDOWN",
        "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO",
    )
    if hasattr(errno, name)
)  # fmt: skip


def of_the_machine(error: BaseException) -> bool:
    """Whether an error comes from a disk, a file server or a system limit, so that the file itself is not to blame."""
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


class PipelineError(Exception):
    """A wrong setting, file or environment; the run cannot go on with it.

    Parameters
    ----------
    message : str
        One line: what is wrong, with its name and value.
    hint : str
        One line: what the user can do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def reason(self) -> str:
        """The message without its hint, on one line."""
        return " ".join(super().__str__().split())

    def __str__(self) -> str:
        return f"{self.reason} ({self.hint})" if self.hint else self.reason


class SlideError(PipelineError):
    """One slide's data cannot be processed. The slide is listed in ``failed.tsv``, and the others go on."""


class DamagedStore(PipelineError):
    """A store between two stages is not as it was written. The stage that finds out removes it, to be made again.

    Parameters
    ----------
    path : pathlib.Path
        The store's folder.
    why : str
        What is damaged, in one line.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged: {' '.join(why.split())[:300]}", "delete it and run again")
        self.path = path
        self.why = why

    def __reduce__(self) -> tuple[type[DamagedStore], tuple[Path, str]]:
        return type(self), (self.path, self.why)  # so that it can be pickled, to be sent between processes
