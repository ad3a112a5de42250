"""One training experiment from data to model package.

Steps: read the data, hold patients out, choose a stain reference, train, tune the thresholds on the validation
fields, score the test fields once, train on with all fields, pack. Each step leaves its result in the experiment's
folder and is not repeated by a later run, so a killed experiment goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.kernels.instances import InstanceRules
from pipeline.kernels.stain import METHODS
from pipeline.models.package import CARD, WEIGHTS, ModelPackage, NucleusClass, sha256_of
from pipeline.networks.registry import NETWORKS
from pipeline.stage import write_json
from pipeline.training.data import Field, Split, load_fields, source_name, split_by_organ
from pipeline.training.fit import (
    Schedule,
    fit,
    predict_field,
    resize_to_model,
    score_maps,
)
from pipeline.training.reference import choose_reference, normalise
from pipeline.training.samples import Augmentation, PreparedField, prepare_field

log = logging.getLogger(__name__)

TUNING_GRID = {
    "nucleus": (96, 112, 128, 144, 160),
    "marker": (90, 110, 130, 150, 170, 190),
    "min_area": (12, 20, 30),
}
"""Thresholds tried on the validation fields (map values 0 to 255, pixels)."""

HEADS = ("nucleus", "distance")
"""Heads that are trained."""

SCORES = ("aji", "aji_plus", "pq", "sq", "dq", "dice", "iou", "f1")


@dataclass(frozen=True)
class Experiment:
    """The ``train:`` section of the configuration.

    Parameters
    ----------
    name : str
        Name of the model that comes out.
    data : tuple of dict
        Data sources: ``kind``, ``path``, optional ``mpp``, ``mpp_of``, ``weight`` (share of the samples) and
        ``licence``.
    mpp : float
        The model's pixel size in µm.
    network, network_args
        The network.
    patch, overlap : int
        The window that inference uses.
    stain : str
        Normalisation of the slides: ``none``, ``macenko``, ``reinhard`` or ``histogram``. In training the network sees
        fields as they are and normalised.
    holdout : str
        Data set from which one patient an organ is held out for testing.
    validation : int
        Patients for validation.
    seed : int
        Seed of the split.
    schedule : Schedule
        Training with patients held out.
    final_steps : int
        Steps of training on with all fields; 0 packs the first network.
    augmentation : Augmentation
        Changes to the samples.
    licence, description : str
        For the card.
    """

    name: str
    data: tuple[dict[str, Any], ...]
    mpp: float = 0.5
    network: str = "resunet"
    network_args: dict[str, Any] = field(default_factory=dict)
    patch: int = 320
    overlap: int = 32
    stain: str = "macenko"
    holdout: str = "monuseg"
    validation: int = 4
    seed: int = 42
    schedule: Schedule = field(default_factory=Schedule)
    final_steps: int = 1000
    augmentation: Augmentation = field(default_factory=Augmentation)
    licence: str = "unknown"
    description: str = ""

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise PipelineError(
                f"train: unknown network {self.network!r}", f"choose from {', '.join(sorted(NETWORKS))}"
            )
        stride = NETWORKS[self.network].stride
        for name, side in (("patch", self.patch), ("schedule.size", self.schedule.size)):
            if side % stride:
                raise PipelineError(f"train: {name} {side} does not suit {self.network}", f"use a multiple of {stride}")
        if self.stain not in METHODS or self.stain == "vahadane":
            raise PipelineError(f"train: stain {self.stain!r}", "use none, macenko, reinhard or histogram")

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the checkpoints depend on, the number of steps apart."""
        kept = asdict(self)
        for name in ("final_steps", "patch", "overlap", "licence", "description"):
            del kept[name]
        for name in ("steps", "workers", "validate_every"):
            del kept["schedule"][name]
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Experiment:
        """Build an experiment from the configuration.

        Raises
        ------
        PipelineError
            When a key is unknown or a value does not fit.
        """
        value = dict(value)
        try:
            augmentation = dict(value.pop("augmentation", {}))
            if "scale" in augmentation:
                augmentation["scale"] = tuple(augmentation["scale"])
            return cls(
                data=tuple(value.pop("data")),
                schedule=Schedule(**value.pop("schedule", {})),
                augmentation=Augmentation(**augmentation),
                **value,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PipelineError(f"train: {error}", "compare the section with config.yaml") from None


def bootstrap_interval(values: np.ndarray, seed: int = 0, rounds: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (percentile method)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(rounds, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def tune_rules(maps: list[np.ndarray], fields: list[Field]) -> tuple[InstanceRules, dict[str, float]]:
    """Thresholds with the best mean of AJI and PQ, one at a time around the defaults.

    Parameters
    ----------
    maps : list of numpy.ndarray
        uint8 ``(C, H, W)`` maps of each field.
    fields : list of Field
        Validation fields.
    """

    def quality(rules: InstanceRules) -> float:
        results = [score_maps(m, f, rules) for m, f in zip(maps, fields, strict=True)]
        return float(np.mean([(r["aji"] + r["pq"]) / 2 for r in results]))

    rules = InstanceRules()
    best = quality(rules)
    for _ in range(2):
        for name, values in TUNING_GRID.items():
            for value in values:
                tried = replace(rules, **{name: value})
                if tried != rules and (found := quality(tried)) > best:
                    best, rules = found, tried
    return rules, {"aji_pq_mean": best}


def evaluate(
    network: Any, fields: list[Field], experiment: Experiment, reference: dict[str, Any], rules: InstanceRules
) -> dict[str, Any]:
    """Scores of each field, their mean and its bootstrap interval."""
    images: dict[str, Any] = {}
    for one in fields:
        version = normalise(one.image, experiment.stain, reference)
        image = resize_to_model(one.image if version is None else version, one.mpp, experiment.mpp)
        result = score_maps(predict_field(network, image), one, rules)
        images[one.name] = {name: round(float(result[name]), 4) for name in SCORES} | {"organ": one.organ}
        log.info(
            "%s (%s): AJI %.3f, PQ %.3f, Dice %.3f", one.name, one.organ, *(result[k] for k in ("aji", "pq", "dice"))
        )
    mean = {name: round(float(np.mean([i[name] for i in images.values()])), 4) for name in SCORES}
    interval = {
        name: [round(v, 4) for v in bootstrap_interval(np.array([i[name] for i in images.values()]))]
        for name in ("aji", "pq", "dice")
    }
    return {"mean": mean, "interval_95": interval, "images": images}


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
    owner = work / "experiment.json"
    if owner.is_file() and json.loads(owner.read_text(encoding="utf-8"))["fingerprint"] != experiment.fingerprint:
        raise PipelineError(
            f"{work} holds the training of another experiment called {experiment.name!r}",
            "give this one another train.name, or delete that folder",
        )
    write_json(owner, {"fingerprint": experiment.fingerprint, **asdict(experiment)})
    fields = load_fields(list(experiment.data))
    by_name = {f.name: f for f in fields}
    if len(by_name) != len(fields):
        raise PipelineError("two training fields have the same name", "rename one")
    split = split_by_organ(fields, experiment.holdout, experiment.seed, experiment.validation)
    write_json(work / "split.json", asdict(split))
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
        evaluation = json.loads(evaluation_file.read_text(encoding="utf-8"))
        rules = InstanceRules(**evaluation["rules"])
    else:
        evaluation, rules = _tune_and_test(network, experiment, split, by_name, reference)
        write_json(evaluation_file, evaluation)
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
    if not test:
        raise PipelineError(f"no patients of {experiment.holdout!r} to hold out", "set train.holdout to a data source")
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
        f"one {experiment.holdout} patient an organ held out (seed {split.seed}, {len(test)} fields); checkpoint and "
        f"thresholds chosen on {len(validation)} other patients"
    )
    evaluation |= {"protocol": protocol, "rules": asdict(rules), "test": list(split.test)}
    return evaluation, rules


def pack(
    network: Any,
    experiment: Experiment,
    evaluation: dict[str, Any],
    rules: InstanceRules,
    reference: dict[str, Any],
    fields: list[Field],
    out: Path,
) -> ModelPackage:
    """Write a model package.

    Parameters
    ----------
    network : torch.nn.Module
        The trained network.
    experiment : Experiment
        Where it comes from.
    evaluation : dict
        Scores on unseen patients.
    rules : InstanceRules
        Tuned thresholds.
    reference : dict
        Stain reference.
    fields : list of Field
        The training data.
    out : pathlib.Path
        Folder of the package.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    staged = out / f".part-{WEIGHTS}"
    save_file(state, staged)
    package = ModelPackage(
        name=experiment.name,
        mpp=experiment.mpp,
        patch=experiment.patch,
        overlap=experiment.overlap,
        network=experiment.network,
        network_args=experiment.network_args,
        heads=HEADS,
        classes=(NucleusClass("Nucleus", (46, 160, 67)),),
        stain={"method": experiment.stain, "reference": reference},
        thresholds=rules,
        licence=experiment.licence,
        description=experiment.description,
        data=tuple(
            {
                "name": source_name(source),
                "licence": source.get("licence", "unknown"),
                "fields": sum(f.source == source_name(source) for f in fields),
            }
            for source in experiment.data
        ),
        metrics={k: evaluation[k] for k in ("protocol", "mean", "interval_95", "images")},
        sha256=sha256_of(staged),
    )
    staged.chmod(0o644)  # safetensors keeps its files to their owner
    staged.rename(out / WEIGHTS)
    write_json(out / CARD, package.to_json())
    log.info("packed %s (%.1f MB)", out, (out / WEIGHTS).stat().st_size / 1e6)
    return package
