"""Logging of the command line: the pipeline's messages go to standard error, noisy libraries are silenced."""

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
    for name in ("tifffile", "tiffslide", "PIL"):  # damaged images that matter raise an error of the pipeline
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
