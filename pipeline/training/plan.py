"""Plans of the trainings that make up a protocol (cross-validation, comparison, transfer), and of synthetic fields.

The plans are made while Snakemake parses the workflow: they turn settings into settings and import nothing heavy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.batch.settings import check_settings
from pipeline.errors import PipelineError
from pipeline.training.inherit import inherited


@dataclass(frozen=True)
class PlannedRun:
    """One training of a protocol.

    Parameters
    ----------
    settings : dict
        The training's ``train:`` section.
    start : str, optional
        Name of the run whose model the training starts from.
    """

    settings: dict[str, Any]
    start: str | None = None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` overridden by `over`; mappings are merged recursively, other values replaced.

    A length in ``steps`` replaces one in ``epochs``, which would count before it.

    >>> merged({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2]})
    {'a': {'b': 3, 'c': 2}, 'd': [2]}
    >>> merged({"schedule": {"epochs": 9, "batch": 2}}, {"schedule": {"steps": 5}})
    {'schedule': {'epochs': None, 'batch': 2, 'steps': 5}}
    """
    result = copy.deepcopy(dict(base))
    if "steps" in over and result.get("epochs") is not None:
        result["epochs"] = None
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def plan_synthesis(train: Mapping[str, Any], synthesis: Mapping[str, Any], fields: Path) -> dict[str, Any]:
    """Settings from which the synthetic fields for an experiment are made.

    Parameters
    ----------
    train, synthesis : mapping
        Settings of the experiment and of the synthesis.
    fields : pathlib.Path
        Folder of the synthetic fields; it is removed from the data sources, as the fields cannot be learned from
        themselves.

    Returns
    -------
    dict
        ``synthesis``, and ``train`` with only the settings that the fields depend on: data, split, pixel size, stain.
    """
    kept = ("mpp", "holdout", "split", "validation", "seed", "stain", "reference", "start_from")
    sources = [source for source in train["data"] if Path(source["path"]) != fields]
    data = [{key: value for key, value in source.items() if key != "weight"} for source in sources]
    return {"synthesis": dict(synthesis), "train": {"data": data, **{key: train[key] for key in kept if key in train}}}


def plan_crossval(train: Mapping[str, Any], crossval: Mapping[str, Any]) -> dict[str, PlannedRun]:
    """Plan a training for each fold of a cross-validation and, if wanted, one with all fields.

    Parameters
    ----------
    train : mapping
        Settings of the experiment.
    crossval : mapping
        ``folds`` (their number) and ``final`` (whether to train with all fields as well).

    Returns
    -------
    dict of str to PlannedRun
        Runs by name: ``fold-0`` and so on, ``final``.
    """
    runs = {}
    for fold in range(crossval["folds"]):
        change = {
            "name": f"{train['name']}-fold-{fold}",
            "split": {"method": "folds", "folds": crossval["folds"], "fold": fold},
            "final_steps": 0,
        }
        runs[f"fold-{fold}"] = PlannedRun(merged(train, change))
    if crossval["final"]:
        change = {
            "name": f"{train['name']}-cv",
            "split": {"method": "all-train"},
            "validation": 0,
            "final_steps": 0,
            "schedule": {"keep": "last"},
        }
        runs["final"] = PlannedRun(merged(train, change))
    return runs


def plan_compare(
    compare: Mapping[str, Any], folders: list[Path], schema: dict[str, Any], place: Callable[[str], str] = str
) -> dict[str, PlannedRun]:
    """Plan a training for each experiment of a comparison.

    Parameters
    ----------
    compare : mapping
        ``experiments``: names of files in `folders`, or paths of files, or mappings with ``experiment`` (name or path),
        ``name`` and ``train`` (settings that override all others); ``common``: settings that override those of every
        file.
    folders : list of pathlib.Path
        Folders that are searched for experiments.
    schema : dict
        Schema of the ``train:`` section.

    Returns
    -------
    dict of str to PlannedRun
        Runs by the experiments' names.

    Raises
    ------
    PipelineError
        When a file is missing or damaged, a setting is wrong, or two experiments have one name.
    """
    runs: dict[str, PlannedRun] = {}
    for entry in compare["experiments"]:
        one: Mapping[str, Any] = {"experiment": entry} if isinstance(entry, str) else entry
        wanted = one["experiment"]
        section = merged(merged(_read_experiment(wanted, folders), compare["common"]), one.get("train", {}))
        name = str(one.get("name", section.get("name", Path(wanted).stem)))
        if name in runs:
            raise PipelineError(f"compare: two experiments are called {name!r}", "give one of them a name")
        try:
            runs[name] = PlannedRun(check_settings(inherited(section | {"name": name}, place), schema))
        except PipelineError as error:
            raise PipelineError(f"compare: experiment {name!r}: {error.reason}", error.hint) from None
    return runs


def _read_experiment(wanted: str, folders: list[Path]) -> dict[str, Any]:
    import yaml

    places = [Path(wanted)] if Path(wanted).suffix else [folder / f"{wanted}.yaml" for folder in folders]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise PipelineError(f"compare: no experiment {wanted!r}", "give a name in config/experiments, or a file's path")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PipelineError(f"experiment {path} cannot be read: {error}", "correct it") from None
    if not isinstance(content, dict) or not isinstance(content.get("train"), dict):
        raise PipelineError(
            f"experiment {path} has no train section", "compare it with config/experiments/default.yaml"
        )
    section: dict[str, Any] = content["train"]
    return section


def plan_transfer(train: Mapping[str, Any], transfer: Mapping[str, Any]) -> dict[str, PlannedRun]:
    """Plan the trainings that show how much pre-training on other data sources helps on a target source.

    Parameters
    ----------
    train : mapping
        Settings of the experiment, with the target and the other data sources.
    transfer : mapping
        ``source`` (name of the target's data source), ``exclude`` (organs left out of pre-training), ``folds`` (of the
        target's patients), ``validation`` (number of validation patients), ``rate`` (factor on the learning rate when
        fine-tuning), ``schedule`` (settings that override the schedule on the target).

    Returns
    -------
    dict of str to PlannedRun
        ``pretrain``: training on all sources but the target; ``zero-shot``: its model scored on all of the target's
        fields; for each fold K ``scratch-K`` and ``finetune-K``, trained on the target's other folds without and with
        pre-training.

    Raises
    ------
    PipelineError
        When the target or anything to pre-train on is missing.
    """
    target = [s for s in train["data"] if s.get("name", s["kind"]) == transfer["source"]]
    others = [s for s in train["data"] if s not in target]
    if train["data"] and not (target and others):
        raise PipelineError(
            f"transfer: data source {transfer['source']!r} and another are needed", "list both under train.data"
        )
    name = train["name"]
    split = {"exclude": [*train["split"]["exclude"], *transfer["exclude"]]}
    pretrain = {"name": f"{name}-pretrain", "data": others, "split": split, "final_steps": 0}
    runs = {"pretrain": PlannedRun(merged(train, pretrain))}
    side = {"data": target, "holdout": transfer["source"], "final_steps": 0, "validation": transfer["validation"]}
    zero = side | {"name": f"{name}-zero-shot", "split": {"method": "all-test", "exclude": []}, "validation": 0}
    runs["zero-shot"] = PlannedRun(merged(train, zero), "pretrain")
    for fold in range(transfer["folds"]):
        part = {"method": "folds", "folds": transfer["folds"], "fold": fold, "exclude": []}
        one = merged(merged(train, side | {"split": part}), {"schedule": transfer["schedule"]})
        scratch = {"name": f"{name}-scratch-{fold}", "start_from": None, "start_share": 0}
        args = one.get("network_args", {})
        encoder = args.get("encoder_weights")
        if one.get("start_from") and encoder not in (None, "imagenet", "coco") and not Path(encoder).is_file():
            # The card of the package tells only the name of the file that its encoder began with.
            scratch["network_args"] = args | {"encoder_weights": None}
        runs[f"scratch-{fold}"] = PlannedRun(one | scratch)
        rate = one["schedule"]["learning_rate"] * transfer["rate"]
        tuned = merged(one, {"name": f"{name}-finetune-{fold}", "schedule": {"learning_rate": rate}})
        runs[f"finetune-{fold}"] = PlannedRun(tuned, "pretrain")
    return runs
