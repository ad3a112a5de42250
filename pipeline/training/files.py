"""JSON files of a training folder, which are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.batch.stage import whole_files, write_json
from pipeline.errors import PipelineError


def save_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file and rename it; all processes of a training on several GPUs may do so at once."""
    with whole_files(path, shared=True) as (staged,):
        write_json(staged, value)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    PipelineError
        When the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise PipelineError(f"{path} cannot be read: {error}", "delete it and run again") from None
