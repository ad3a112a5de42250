"""A SLURM for the tests of this folder; runs are started as in tests/workflow and compared as in tests/faults."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow"))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from cluster import Cluster, NoCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM of one node with two pretended GPUs."""
    # Not below pytest's folder: munge wants one that everybody may enter.
    found = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    try:
        found.start()
    except NoCluster as error:
        if os.environ.get("NUCLEI_NEED_SLURM"):
            pytest.fail(f"no SLURM: {error}")
        pytest.skip(f"no SLURM: {error}")
    yield found
    found.stop()
    shutil.rmtree(found.folder)
