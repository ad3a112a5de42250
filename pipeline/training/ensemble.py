"""Command ``ensemble``: join trained models to one model, which predicts the mean of their maps."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.layout import folder_name
from pipeline.models.licences import strictest
from pipeline.models.package import CARD, ModelPackage
from pipeline.networks.registry import NETWORKS, stride_of
from pipeline.prediction.predictors import channel_names

if TYPE_CHECKING:
    from pipeline.training.experiment import Experiment

log = logging.getLogger(__name__)

ENSEMBLE = "ensemble"
"""Network name of an ensemble, in a package and in the registry."""

SHARED = ("network", "heads", "classes", "stain")
"""Entries of a card that an ensemble has once, and not in the cards of its members."""


def factor_of(member: ModelPackage, mpp: float) -> int:
    """Return the side of a member's pixel in pixels of `mpp` µm.

    Raises
    ------
    PipelineError
        When this is not a whole number.
    """
    factor = round(member.mpp / mpp)
    if abs(member.mpp / mpp - factor) > 1e-6:
        raise PipelineError(
            f"model {member.folder} works at {member.mpp:g} µm/px, which is not a whole multiple of {mpp:g}",
            "join models whose pixel sizes are multiples of the finest one",
        )
    return factor


def check_alike(members: Sequence[ModelPackage]) -> None:
    """Refuse models whose maps cannot be averaged.

    Raises
    ------
    PipelineError
        When there are fewer than two models, one finds instances itself or is not a network, or they differ in heads,
        classes or stain normalisation.
    """
    if len(members) < 2:
        raise PipelineError(f"an ensemble of {len(members)} model", "name at least two")

    def traits(one: ModelPackage) -> dict[str, Any]:
        stain = (one.stain["method"], float(one.stain.get("strength", 1)), one.stain["reference"])
        return {"heads": one.heads, "classes": [c.name for c in one.classes], "stain normalisation": stain}

    first = traits(members[0])
    for one in members:
        if one.network in NETWORKS and NETWORKS[one.network].instances:
            raise PipelineError(
                f"model {one.folder}: {one.network} finds instances itself, there is no mean of them",
                "join models that give maps",
            )
        if one.network not in NETWORKS and one.network != ENSEMBLE:
            raise PipelineError(f"model {one.folder}: {one.network} is not a network", "join trained networks")
        for what, value in traits(one).items():
            if value != first[what]:
                raise PipelineError(
                    f"models {members[0].folder} and {one.folder} differ in {what}",
                    "join models that were trained alike (start_from gives both one stain reference)",
                )


def join(members: Sequence[ModelPackage], name: str) -> tuple[ModelPackage, bytes]:
    """Join several models to an ensemble.

    The ensemble works at the finest pixel size of its members, with the thresholds of the first member of that pixel
    size.

    Parameters
    ----------
    members : sequence of ModelPackage
        The models.
    name : str
        Name of the ensemble.

    Returns
    -------
    package : ModelPackage
        Card of the ensemble.
    weights : bytes
        Its weights, as safetensors.

    Raises
    ------
    PipelineError
        When the models cannot be joined, see `check_alike` and `factor_of`.
    """
    from safetensors.torch import load_file, save

    from pipeline.training.pack import learned_from

    check_alike(members)
    lead = min(members, key=lambda one: one.mpp)  # the first, if several are the finest
    factors = [factor_of(one, lead.mpp) for one in members]
    args = {
        "maps": list(channel_names(lead)),
        "members": [
            {"network": one.network, "args": one.network_args, "tta": one.tta, "factor": factor}
            for one, factor in zip(members, factors, strict=True)
        ],
    }
    state: dict[str, Any] = {}
    for index, one in enumerate(members):
        state |= {f"members.{index}.{key}": value for key, value in load_file(one.weights).items()}
    weights = save(state)
    names = " and ".join(one.name for one in members)
    package = replace(
        lead,
        name=name,
        # Windows are multiples of every member's stride, and begin at borders of every member's pixels.
        patch=up(max(one.patch * f for one, f in zip(members, factors, strict=True)), stride_of(ENSEMBLE, args)),
        overlap=up(max(one.overlap * f for one, f in zip(members, factors, strict=True)), lcm(*factors)),
        network=ENSEMBLE,
        network_args=args,
        licence=strictest([one.licence for one in members]),
        description=f"Mean of the maps of {names}.",
        data=learned_from((), (), members),
        metrics={"protocol": f"not scored; thresholds of {lead.name}"},
        sha256=hashlib.sha256(weights).hexdigest(),
        tta="none",  # each member applies its own
        members=tuple({k: v for k, v in one.to_json().items() if k not in SHARED} for one in members),
    )
    return package, weights


def take_apart(package: ModelPackage) -> list[tuple[ModelPackage, bytes]]:
    """Return the models that an ensemble was joined from, each as its card and its weights (safetensors).

    Raises
    ------
    PipelineError
        When the model is not an ensemble.
    """
    from safetensors.torch import load, save

    if package.network != ENSEMBLE or not package.members:
        raise PipelineError(
            f"model {package.folder} is not an ensemble", "name a package that `python -m pipeline ensemble` has packed"
        )
    state, card = load(package.weights.read_bytes()), package.to_json()
    found = []
    for index, own in enumerate(package.members):
        entry, prefix = package.network_args["members"][index], f"members.{index}."
        weights = save({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        network = {"network": {"name": entry["network"], "args": entry["args"]}}
        member = ModelPackage.from_json({key: card[key] for key in SHARED} | own | network, package.folder)
        found.append((replace(member, sha256=hashlib.sha256(weights).hexdigest()), weights))
    return found


def up(value: int, multiple: int) -> int:
    """Round `value` up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple


def tune_and_score(
    package: ModelPackage, members: Sequence[ModelPackage], experiment: Experiment, accelerator: str
) -> ModelPackage:
    """Tune an ensemble's thresholds on an experiment's validation fields, and score it on the test fields.

    Parameters
    ----------
    package : ModelPackage
        The ensemble, written to its folder.
    members : sequence of ModelPackage
        The models that it was joined from.
    experiment : Experiment
        Names the data and the patients held out, and says what is tuned and how fields are predicted. Pixel size,
        windows and stain normalisation are those of the ensemble.
    accelerator : str
        ``auto``, ``cpu`` or ``gpu``.

    Returns
    -------
    ModelPackage
        The card with the tuned thresholds, the scores and the data used for tuning.

    Raises
    ------
    PipelineError
        When a member has learned from a patient who is held out for testing, or there is nothing to score.
    """
    from pipeline.models.weights import load_network
    from pipeline.networks.outputs import Outputs
    from pipeline.training.begin import check_licences, check_unseen, load_data
    from pipeline.training.data import source_name
    from pipeline.training.evaluate import Evaluator
    from pipeline.training.experiment import protocol
    from pipeline.training.losses import CombinedLoss
    from pipeline.training.pack import METRICS, learned_from
    from pipeline.training.targets import Targets
    from pipeline.training.tuning import tune_rules

    experiment = replace(
        experiment, mpp=package.mpp, patch=package.patch, overlap=package.overlap, final_steps=0,
        stain=package.stain["method"], stain_strength=float(package.stain.get("strength", 1)), licence=package.licence,
    )  # fmt: skip
    data = load_data(experiment)
    test, tuning = data.part("test"), data.part("validation")
    if not test:
        raise PipelineError("train: split.method all-train leaves nothing to score", "hold patients out")
    known = set().union(*(check_unseen(one, data, "ensemble: member") for one in members))
    check_licences(experiment)
    settings = experiment.evaluation
    own = [f for f in data.part("train") if settings.tune_on_training and f.source == experiment.holdout]
    tuning = tuning + own if settings.tune else []
    classes = tuple(c.name for c in package.classes) if "type" in package.heads else ()
    evaluator = Evaluator(
        experiment,
        Targets(package.heads, classes),
        Outputs(channel_names(package), package.tta),
        package.stain["reference"],
        CombinedLoss((), package.heads, classes),
        accelerator,
    )
    network = load_network(package)
    rules = package.thresholds
    if tuning:
        rules, tuned = tune_rules(evaluator.maps(network, tuning), tuning, rules, evaluator.channels, package.mpp)
        log.info("thresholds: %s (%s)", rules, tuned)
    scores, _ = evaluator.score(network, test, rules)
    # No training fields, as the ensemble is scored as it is.
    scores["protocol"] = protocol(experiment, replace(data.split, train=()), len(own), package.name, len(known))
    used = {f.source for f in tuning}
    sources = [one for one in experiment.data if source_name(one) in used]
    return replace(
        package,
        thresholds=rules,
        metrics={key: scores[key] for key in METRICS if key in scores},
        data=learned_from(tuning, sources, [package]),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline ensemble``."""
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="packages to join, two or more")
    parser.add_argument("--out", type=Path, required=True, help="package to write; its folder's name is the model's")
    parser.add_argument(
        "--apart", action="store_true", help="write the members of one ensemble into folders below --out instead"
    )
    parser.add_argument(
        "--experiment", type=Path, metavar="FILE",
        help="settings of an experiment (YAML, config/experiments): tune thresholds on its validation fields and score "
        "its test fields; without, thresholds are those of the first model at the finest pixel size",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to score")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline ensemble``."""
    if args.apart:
        return _apart(args.models, args.out)
    _check_free(args.out)
    experiment = None if args.experiment is None else read_experiment(args.experiment)
    members = [ModelPackage.load(folder, verify=True) for folder in args.models]
    package, weights = join(members, args.out.name)
    if experiment is not None:
        package = _scored(package, weights, members, experiment, args)
    package.write(args.out, weights)
    log.info("packed %s (%.1f MB)", args.out, len(weights) / 1e6)
    return 0


def _check_free(folder: Path) -> None:
    if (folder / CARD).exists():
        raise PipelineError(f"{folder} holds a model", "give --out another folder, or move that model away")


def _apart(models: Sequence[Path], out: Path) -> int:
    if len(models) != 1:
        raise PipelineError(f"--apart with {len(models)} models", "name one ensemble")
    members = take_apart(ModelPackage.load(models[0], verify=True))
    names = [folder_name(one.name) for one, _ in members]
    folders = [out / (name if names.count(name) == 1 else f"{name}-{i}") for i, name in enumerate(names, 1)]
    for folder in folders:
        _check_free(folder)
    for folder, (one, weights) in zip(folders, members, strict=True):
        one.write(folder, weights)
        log.info("packed %s (%.1f MB)", folder, len(weights) / 1e6)
    return 0


def _scored(
    package: ModelPackage,
    weights: bytes,
    members: Sequence[ModelPackage],
    experiment: Experiment,
    args: argparse.Namespace,
) -> ModelPackage:
    import tempfile

    import torch

    from pipeline.machine.cores import available_cores
    from pipeline.machine.gpus import borrow
    from pipeline.training.schedule import accelerator_of

    torch.set_num_threads(args.threads or available_cores())
    with borrow(args.device), tempfile.TemporaryDirectory() as folder:
        package.write(Path(folder), weights)
        package = tune_and_score(
            replace(package, folder=Path(folder)), members, experiment, accelerator_of(args.device)
        )
    mean = package.metrics["mean"]
    log.info("%s: AJI %.3f, PQ %.3f, Dice %.3f, F1 %.3f on unseen patients", args.out,
             *(mean[k] for k in ("aji", "pq", "dice", "f1")))  # fmt: skip
    return package


def read_experiment(path: Path) -> Experiment:
    """Read an experiment from the ``train`` section of a configuration file (YAML).

    Raises
    ------
    PipelineError
        When the file cannot be read, or a setting is unknown or wrong.
    """
    import yaml

    from pipeline.training.command import checked_section
    from pipeline.training.experiment import Experiment

    hint = "give the settings of an experiment, as those in config/experiments"
    try:
        section = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("train")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())[:120]
        raise PipelineError(f"{path} cannot be read: {first}", hint) from None
    return Experiment.from_json(checked_section(section, path, hint))
