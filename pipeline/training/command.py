"""Commands ``train`` (one experiment, from annotated fields to a model package) and ``training-summary``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.batch.lock import held
from pipeline.batch.settings import check_settings, load_schema
from pipeline.errors import PipelineError
from pipeline.machine.allocator import keep_freed_memory
from pipeline.machine.cores import available_cores
from pipeline.training.inherit import inherited

log = logging.getLogger(__name__)

SCHEMA = Path(__file__).parents[2] / "workflow" / "schemas" / "train.schema.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline train``."""
    parser.add_argument("--config-json", type=Path, required=True, help="the train section of the configuration")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, logs and scores")
    parser.add_argument("--out", type=Path, required=True, help="model package to write")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to train, before the settings' device")
    parser.add_argument(
        "--max-minutes", type=float, default=0, help="stop after this time, to go on when run again; 0: as configured"
    )
    parser.add_argument("--start-from", type=Path, help="model package to start from; before the settings'")
    parser.add_argument("--scores", type=Path, help="scores of a cross-validation, for a model of all fields")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline train``."""
    from pipeline.machine.gpus import borrow

    section = read_section(args.config_json)
    schedule = section.get("schedule", {})
    with in_turn(args.work), borrow(args.device or schedule.get("device", "auto"), schedule.get("devices", 1)):
        return _train(args, section)


@contextmanager
def in_turn(work: Path) -> Iterator[None]:
    """Hold the lock of a training's folder, as a job that has outlived its run may still be writing there.

    On several devices only the main process takes the lock; the processes that it starts work under the same lock.
    """
    if int(os.environ.get("LOCAL_RANK", "0")):
        yield
        return
    work.mkdir(parents=True, exist_ok=True)
    with held(work / ".lock-train"):
        yield


def read_section(path: Path) -> dict[str, Any]:
    """Read the ``train`` section from a JSON file and check it against the schema, as Snakemake does.

    Raises
    ------
    PipelineError
        When the file cannot be read, or a setting is unknown or wrong.
    """
    hint = "give the train section as JSON"
    try:
        section = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} cannot be read: {error}", hint) from None
    return checked_section(inherited(section) if isinstance(section, dict) else section, path, hint)


def checked_section(section: Any, path: Path, hint: str, schema: Path = SCHEMA) -> dict[str, Any]:
    """Check a section of the configuration against its schema, as Snakemake does.

    Parameters
    ----------
    section : object
        Content of the section.
    path : pathlib.Path
        The file that the section is from, for messages.
    hint : str
        What to do if the section is not a mapping.
    schema : pathlib.Path
        Schema of the section; that of ``train`` by default.

    Returns
    -------
    dict
        The section with defaults filled in; as it is if the schema file does not exist.

    Raises
    ------
    PipelineError
        When a setting is unknown or wrong.
    """
    if not isinstance(section, dict):
        raise PipelineError(f"{path} holds no settings, but {str(section)[:40]!r}", hint)
    if not schema.is_file():  # a package installed without its checkout
        return section
    try:
        return check_settings(section, load_schema(schema))
    except PipelineError as error:
        raise PipelineError(f"{path}: {error.reason}", error.hint) from None


def prepare_process(threads: int) -> None:
    """Prepare this process for a training: keep freed memory, silence Lightning, and set the CPU threads (0: all)."""
    keep_freed_memory()
    import lightning.pytorch  # noqa: F401  (which sets the levels of its loggers)
    import torch

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # they concern its developers, not users
    torch.set_num_threads(threads or available_cores())


def _train(args: argparse.Namespace, section: dict[str, Any]) -> int:
    prepare_process(args.threads)

    from pipeline.training.experiment import Experiment
    from pipeline.training.run import run_experiment
    from pipeline.training.schedule import Deadline, accelerator_of

    if args.start_from is not None:
        section["start_from"] = str(args.start_from)
    experiment = Experiment.from_json(section)
    accelerator = accelerator_of(args.device or experiment.schedule.device)
    deadline = Deadline(args.max_minutes or experiment.schedule.max_minutes)
    evaluation = run_experiment(experiment, args.work, args.out, accelerator, deadline, args.scores)
    mean = evaluation["mean"]
    log.info(
        "%s: AJI %.3f, PQ %.3f, Dice %.3f, F1 %.3f on unseen patients: %s", evaluation.get("scores_of", args.out),
        *(mean[k] for k in ("aji", "pq", "dice", "f1")), evaluation["protocol"],
    )  # fmt: skip
    if before := evaluation.get("before"):
        scores = (f"{title} {before['mean'][key]:.3f}" for title, key in (("AJI", "aji"), ("PQ", "pq"), ("F1", "f1")))
        log.info("%s, from which it was trained on, has %s on the same fields", before["model"], ", ".join(scores))
    return 0


def add_summary_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline training-summary``."""
    parser.add_argument("kind", choices=("crossval", "compare", "transfer"), help="the protocol")
    parser.add_argument(
        "--run", action="append", required=True, metavar="NAME=FOLDER", help="a training of the protocol, in order"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write KIND.tsv and KIND.json to")


def main_summary(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline training-summary``."""
    from pipeline.training.protocols import write_summary

    folders = {}
    for entry in args.run:
        name, separator, folder = entry.partition("=")
        if not separator:
            raise PipelineError(f"--run {entry}", "give NAME=FOLDER")
        folders[name] = Path(folder)
    summary = write_summary(args.kind, folders, args.out)
    for row in summary["rows"]:
        log.info("%s", ", ".join(f"{key} {value}" for key, value in row.items() if value not in (None, "")))
    for note in summary.get("notes", []):
        log.warning("%s", note)
    return 0
