"""``python -m pipeline train``: one experiment, from annotated fields to a model package."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

from pipeline.errors import PipelineError

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config-json", type=Path, required=True, help="the train section of the configuration")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, logs and scores")
    parser.add_argument("--out", type=Path, required=True, help="model package to write")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument(
        "--max-minutes", type=float, default=0, help="stop after this time, to go on when run again; 0: as configured"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    try:
        section = json.loads(args.config_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{args.config_json} cannot be read: {error}", "give the train section as JSON") from None
    import torch

    from pipeline.training.experiment import Experiment
    from pipeline.training.run import run_experiment
    from pipeline.training.schedule import Deadline

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    accelerator = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[args.device]
    experiment = Experiment.from_json(section)
    deadline = Deadline(args.max_minutes or experiment.schedule.max_minutes)
    evaluation = run_experiment(experiment, args.work, args.out, accelerator, deadline)
    mean = evaluation["mean"]
    log.info(
        "%s: AJI %.3f, PQ %.3f, Dice %.3f, F1 %.3f on unseen patients", args.out,
        *(mean[k] for k in ("aji", "pq", "dice", "f1")),
    )  # fmt: skip
    return 0
