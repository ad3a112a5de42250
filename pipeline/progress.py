"""Progress of long stages: a bar with rate and ETA on a terminal, else a log message once a minute."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

log = logging.getLogger(__name__)

LOG_EVERY_S = 60.0
"""Seconds between progress messages when there is no terminal."""


def duration(seconds: float | None) -> str:
    """Format seconds for people, in at most two units.

    >>> [duration(s) for s in (None, 59.4, 61, 7300, 200000)]
    ['–', '59 s', '1 min 1 s', '2 h 1 min', '2 d 7 h']
    """
    if seconds is None:
        return "–"
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {small_unit}"
    return f"{whole} s"


class Progress:
    """Count finished work and show the progress.

    Parameters
    ----------
    total : float
        Amount of work, in `unit`.
    label : str
        What is being done, e.g. ``"tiles"``.
    unit : str
        Unit of `total` and of the rate shown, e.g. ``"MP"``.
    """

    def __init__(self, total: float, label: str, unit: str) -> None:
        self.total = total
        self.label = label
        self.unit = unit
        self.done = 0.0
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                desc=label,
                unit=unit,
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc}: {percentage:3.0f}% |{bar}| {rate_fmt} ETA {remaining}",
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Work per second so far."""
        return self.done / max(self.seconds, 1e-9)

    def advance(self, amount: float) -> None:
        """Add `amount` of finished work."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_EVERY_S:
            self._last_line = now
            left = (self.total - self.done) / max(self.rate, 1e-9)
            log.info(
                "%s: %.0f %% (%.1f of %.1f %s, %.2f %s/s, %.0f s left)",
                self.label,
                100 * self.done / max(self.total, 1e-9),
                self.done,
                self.total,
                self.unit,
                self.rate,
                self.unit,
                left,
            )
