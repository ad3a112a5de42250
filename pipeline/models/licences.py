"""What licences ask for, as far as their names tell."""

from __future__ import annotations

import re
from collections.abc import Sequence

FREE = re.compile(r"CC0|CC BY|MIT|BSD|Apache", re.IGNORECASE)
"""Licences of which nothing stays to be said where a stricter one holds."""


def restrictions(licence: str) -> set[str]:
    """What a licence asks for beyond naming the authors: not commercial, no changes, the same terms."""
    return set(re.findall(r"\b(NC|ND|SA|GPL|AGPL)\b", licence.upper()))


def strictest(licences: Sequence[str]) -> str:
    """The licence of what is made of parts under these licences.

    The one that asks for all that the others ask for; where there is none, all that count, joined by "and". A licence
    that is not known by its name always counts.

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
