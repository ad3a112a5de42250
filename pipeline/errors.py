"""Errors that users see: one line that names the thing, the value and what to do."""

from __future__ import annotations


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

    def __str__(self) -> str:
        message = " ".join(super().__str__().split())
        return f"{message} ({self.hint})" if self.hint else message


class SlideError(PipelineError):
    """One slide's data cannot be processed. The slide ends in ``failed.tsv``; the others go on."""

    @property
    def reason(self) -> str:
        """The message without its hint, on one line."""
        return " ".join(Exception.__str__(self).split())
