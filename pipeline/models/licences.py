"""Terms of licences, as far as they can be told from their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

FREE = re.compile(r"CC0|CC BY|MIT|BSD|Apache", re.IGNORECASE)
"""Licences whose names tell their terms; they need no mention beside one that asks for the same and more."""


def restrictions(licence: str) -> set[str]:
    """Terms beyond attribution: no commercial use (NC), no changes (ND), the same licence (SA, LGPL, GPL, AGPL).

    >>> sorted(restrictions("CC BY-NC-SA 4.0")), sorted(restrictions("GPLv3")), sorted(restrictions("MIT"))
    (['NC', 'SA'], ['GPL'], [])
    """
    # A version may follow without a space, as in GPLv3.
    return set(re.findall(r"\b(NC|ND|SA|LGPL|GPL|AGPL)(?![A-UW-Z])", licence.upper()))


def strictest(licences: Sequence[str]) -> str:
    """Return the licence of a work that is made of parts under `licences`.

    This is the licence that includes the terms of all others. If there is none, it is all licences whose terms no other
    one exceeds, joined by "and". A licence whose name does not tell its terms is always kept.

    >>> strictest(["CC0 1.0", "CC BY-NC-SA 4.0", "CC BY 4.0"])
    'CC BY-NC-SA 4.0'
    >>> strictest(["CC BY 4.0", "unknown", "CC0 1.0"])
    'CC BY 4.0 and unknown'
    """

    def asks(licence: str) -> set[str]:
        return restrictions(licence) | (set() if licence.upper().startswith("CC0") else {"BY"})

    distinct = list(dict.fromkeys(licences))
    kept = [one for one in distinct if not FREE.match(one) or not any(asks(one) < asks(other) for other in distinct)]
    return " and ".join(sorted(kept))
