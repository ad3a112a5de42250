"""One training experiment from data to model package.

Steps: read the data, hold patients out, choose a stain reference, train, tune the thresholds on the validation
fields, score the test fields once, train on with all fields, pack. Each step leaves its result in the experiment's
folder and is not repeated by a later run, so a killed experiment goes on where it was.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.kernels.instances import InstanceRules
from pipeline.training.data import Field, load_fields, source_name
from pipeline.training.experiment import HEADS, Experiment
from pipeline.training.files import read_json, save_json
from pipeline.training.fit import fit, predict_field, resize_to_model
from pipeline.training.pack import pack
from pipeline.training.reference import choose_reference, normalise
from pipeline.training.samples import PreparedField, prepare_field
from pipeline.training.scoring import evaluate
from pipeline.training.splits import Split, make_split
from pipeline.training.tuning import tune_rules

log = logging.getLogger(__name__)


def _prepare(fields: list[Field], experiment: Experiment, reference: dict[str, Any]) -> list[PreparedField]:
    prepared = []
    for one in fields:
        version = normalise(one.image, experiment.stain, reference)
        prepared.append(prepare_field(one, experiment.mpp, () if version is None else (version,)))
    return prepared


def _weights(fields: list[Field], experiment: Experiment) -> np.ndarray:
    share = {source_name(source): float(source.get("weight", 1.0)) for source in experiment.data}
    count = {name: sum(f.source == name for f in fields) for name in share}
    return np.array([share[f.source] / count[f.source] for f in fields])


def own_folder(experiment: Experiment, work: Path) -> None:
    """Note whose training a folder holds.

    Raises
    ------
    PipelineError
        When it is that of another experiment.
    """
    owner = work / "experiment.json"
    if owner.is_file():
        recorded = read_json(owner)
        del recorded["fingerprint"]  # settings may have been added since it was made
        if Experiment.from_json(recorded).fingerprint != experiment.fingerprint:
            raise PipelineError(
                f"{work} holds the training of another experiment called {experiment.name!r}",
                "give this one another train.name, or delete that folder",
            )
    save_json(owner, {"fingerprint": experiment.fingerprint, **asdict(experiment)})


def run_experiment(experiment: Experiment, work: Path, out: Path, accelerator: str = "auto") -> dict[str, Any]:
    """Run an experiment, or what is left of it.

    Parameters
    ----------
    experiment : Experiment
        What to train.
    work : pathlib.Path
        Checkpoints, logs, split and scores.
    out : pathlib.Path
        The model package.
    accelerator : str
        ``auto``, ``cpu`` or ``gpu``.

    Returns
    -------
    dict
        The evaluation on the held-out patients.

    Raises
    ------
    PipelineError
        When data are missing or do not fit.
    """
    work.mkdir(parents=True, exist_ok=True)
    own_folder(experiment, work)
    fields = load_fields(list(experiment.data))
    by_name = {f.name: f for f in fields}
    split = make_split(fields, experiment.split, experiment.holdout, experiment.seed, experiment.validation)
    save_json(work / "split.json", split.to_json(fields))
    used = {*split.train, *split.validation, *split.test}
    fields = [f for f in fields if f.name in used]
    train = [by_name[name] for name in split.train]
    main = [f for f in train if f.source == experiment.holdout] or train
    chosen, reference = choose_reference(main)
    log.info("stain reference: %s", chosen.name)
    common: dict[str, Any] = {
        "network": experiment.network,
        "network_args": experiment.network_args,
        "heads": list(HEADS),
        "mpp": experiment.mpp,
        "augmentation": experiment.augmentation,
        "accelerator": accelerator,
    }
    network = fit(
        _prepare(train, experiment, reference),
        _weights(train, experiment),
        [by_name[name] for name in split.validation],
        schedule=experiment.schedule,
        folder=work / "heldout",
        **common,
    )
    steps = experiment.schedule.steps
    evaluation_file = work / f"evaluation-{steps}.json"
    if evaluation_file.is_file():
        evaluation = read_json(evaluation_file)
        rules = InstanceRules(**evaluation["rules"])
    else:
        evaluation, rules = _tune_and_test(network, experiment, split, by_name, reference)
        save_json(evaluation_file, evaluation)
    if experiment.final_steps:
        network = fit(
            _prepare(fields, experiment, reference),
            _weights(fields, experiment),
            [],
            schedule=replace(
                experiment.schedule,
                steps=experiment.final_steps,
                seed=experiment.schedule.seed + 1,
                learning_rate=experiment.schedule.learning_rate / 4,  # the network has learned already
            ),
            folder=work / f"final-{steps}",
            start_from=network.state_dict(),
            **common,
        )
    pack(network, experiment, evaluation, rules, {"name": chosen.name, **reference}, fields, out)
    return evaluation


def _tune_and_test(
    network: Any, experiment: Experiment, split: Split, by_name: dict[str, Field], reference: dict[str, Any]
) -> tuple[dict[str, Any], InstanceRules]:
    validation = [by_name[name] for name in split.validation]
    test = [by_name[name] for name in split.test]
    maps = []
    for one in validation:
        version = normalise(one.image, experiment.stain, reference)
        maps.append(
            predict_field(network, resize_to_model(one.image if version is None else version, one.mpp, experiment.mpp))
        )
    rules, tuned = tune_rules(maps, validation) if validation else (InstanceRules(), {})
    log.info("thresholds: %s (%s)", rules, tuned)
    evaluation = evaluate(network, test, experiment, reference, rules)
    protocol = (
        f"{experiment.split.describe(experiment.holdout)} (seed {split.seed}, {len(test)} fields); checkpoint and "
        f"thresholds chosen on {len(validation)} fields of other patients"
    )
    evaluation |= {"protocol": protocol, "rules": asdict(rules), "test": list(split.test)}
    return evaluation, rules
