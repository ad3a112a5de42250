"""Settings that a training takes over from the model package that it starts from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.networks.registry import NETWORKS


def inherited(section: Mapping[str, Any], place: Callable[[str], str] = str) -> dict[str, Any]:
    """Return a training's settings, with those that it leaves out taken from the package that it starts from.

    These are pixel size, licence, network and its arguments, heads, stain normalisation, window and test-time
    augmentation. A setting is taken over only if those that are stated allow it: heads and network arguments belong to
    a network, the window to a network and pixel size, the strength to a method of normalisation.

    Parameters
    ----------
    section : mapping
        The ``train:`` section as the user wrote it, without defaults.
    place : callable, optional
        Returns the folder that a ``start_from`` stands for; by default the path as it is.

    Returns
    -------
    dict
        The section, completed. Unchanged without ``start_from``, or if the card cannot be read or its network cannot
        be trained; the check of the package, which comes later, says so.
    """
    filled = dict(section)
    if not isinstance(start := section.get("start_from"), str):
        return filled
    folder = Path(place(start)).expanduser()
    try:
        card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        network, stain = card["network"], card["stain"]
        own = {"mpp": card["mpp"], "network": network["name"], "licence": card["licence"], "stain": stain["method"]}
        shape = {"network_args": network["args"], "heads": card["heads"]}
        window = {"patch": card["patch"], "overlap": card["overlap"]}
        known = network["name"] in NETWORKS
    except (OSError, KeyError, TypeError, ValueError):
        return filled
    if not known:  # an ensemble, or a rule
        return filled
    filled = own | filled
    if filled["stain"] == own["stain"]:
        filled.setdefault("stain_strength", stain.get("strength", 1.0))
    if filled["network"] != own["network"]:
        return filled
    filled = shape | filled
    if window.keys().isdisjoint(filled) and str(filled["mpp"]) == str(own["mpp"]):
        filled |= window
    evaluation = filled.get("evaluation", {})
    if isinstance(evaluation, Mapping):
        filled["evaluation"] = {"tta": card.get("tta", "none"), **evaluation}
    return filled
