"""Fixtures that more than one test file uses."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, so that a change is judged and not the draw; HYPOTHESIS_PROFILE=search draws new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes an hour, unless it is asked for by its marker."""
    if "faults_long" in config.getoption("-m"):
        return
    long = [item for item in items if item.get_closest_marker("faults_long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data, which is not part of the project; tests that need it are skipped without it."""
    root = Path(__file__).resolve().parent.parent
    folder = (root / os.environ.get("NUCLEI_DATA", "../shared/data")).resolve()
    if not (folder / "slides").is_dir():
        pytest.skip(f"no real data in {folder} (set NUCLEI_DATA)")
    return folder
