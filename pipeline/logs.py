"""Logging of the command line: messages to standard error, third parties kept quiet."""

from __future__ import annotations

import logging
import sys


def configure(verbose: bool = False) -> None:
    """Send the pipeline's messages to standard error.

    Parameters
    ----------
    verbose : bool
        Show debug messages too.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("pipeline").setLevel(logging.DEBUG if verbose else logging.INFO)
    for name in ("tifffile", "tiffslide", "PIL"):  # what matters of damaged images ends in an error of ours
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
