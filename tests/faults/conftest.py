"""Fixtures for faults; runs of the workflow are started as in tests/workflow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow"))

from runs import ROOT


@pytest.fixture(scope="session")
def model() -> Path:
    """The classical model, which needs no torch: the network is not the point here."""
    return ROOT / "models" / "hematoxylin"
