"""One training experiment from data to model package.

Steps: read the data, hold patients out, choose a stain reference, train, tune the thresholds on the validation
fields, score the test fields once, continue training with all fields, pack. Training and evaluation leave their results
in the experiment's folder and are not repeated by a later run, so a killed experiment resumes where it was.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
import torch.distributed
from torch import nn

from pipeline.errors import PipelineError
from pipeline.kernels.instances import InstanceRules
from pipeline.models.package import ModelPackage
from pipeline.models.weights import load_network, load_weights, weights_for
from pipeline.networks.outputs import Outputs, map_names
from pipeline.networks.registry import NETWORKS, build_network
from pipeline.prediction.predictors import channel_names
from pipeline.report.training import write_training_report
from pipeline.training.balance import classes_present, repeats
from pipeline.training.begin import (
    check_classes,
    check_licences,
    check_unchanged,
    check_unseen,
    digest_of,
    load_data,
    own_folder,
    stain_reference,
)
from pipeline.training.data import Field, source_name
from pipeline.training.evaluate import Evaluator
from pipeline.training.experiment import Experiment, protocol
from pipeline.training.files import read_json, save_json
from pipeline.training.fit import Examined, Job, fit
from pipeline.training.losses import CombinedLoss
from pipeline.training.owner import check_place
from pipeline.training.pack import pack, round_weights
from pipeline.training.panel import write_panel
from pipeline.training.reference import normalise
from pipeline.training.samples import PreparedField, prepare_field
from pipeline.training.schedule import Deadline, Schedule
from pipeline.training.targets import Targets, classes_of
from pipeline.training.teacher import Teacher
from pipeline.training.tuning import tune_rules

log = logging.getLogger(__name__)

FEW_NUCLEI = 300
"""With fewer nuclei than this, a warning is logged when thresholds are tuned on them."""


def leads() -> bool:
    """Whether this process is the one of a distributed training that writes the shared results."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def all_here() -> None:
    """Wait for the other processes of a distributed training."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def digest_of_weights(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Run:
    """An experiment in its folder.

    Parameters
    ----------
    experiment : Experiment
        The experiment to run.
    work : pathlib.Path
        Folder for checkpoints, logs, split and scores.
    accelerator : str
        ``auto``, ``cpu`` or ``gpu``.
    deadline : Deadline, optional
        When to stop, to be resumed later.
    """

    def __init__(
        self, experiment: Experiment, work: Path, accelerator: str = "auto", deadline: Deadline | None = None
    ) -> None:
        own_folder(experiment, work)
        self.work = work
        self.accelerator = accelerator
        self.deadline = deadline or Deadline()
        self.data = load_data(experiment)
        self.known: set[str] = set()
        """Names of the validation fields whose patients the starting package or the teacher has learned from."""
        self.start = self._known_package(experiment, "start_from")
        self.teacher = self._known_package(experiment, "teacher")
        self.origin = {
            "data": digest_of(self.data.fields),
            "start_from": self.start.sha256 if self.start else None,
            "teacher": self.teacher.sha256 if self.teacher else None,
        }
        check_unchanged(self.data.split, self.origin, work, experiment.name)
        save_json(work / "split.json", self.data.split.to_json(self.data.fields) | self.origin)
        check_licences(experiment)
        train = self.data.part("train")
        self.area = area = sum(f.labels.size * (f.mpp / experiment.mpp) ** 2 for f in train)
        self.experiment = replace(experiment, schedule=experiment.schedule.resolved(area))
        self.reference = stain_reference(experiment, train, self.start, work)
        log.info("stain reference: %s", self.reference.get("name"))
        classes: tuple[str, ...] = ()
        if "type" in experiment.heads:
            classes = experiment.classes or classes_of(self.data.fields, experiment.class_names)
            if not classes:
                raise PipelineError("train: a type head, but no field has classes", "set train.heads without it")
            check_classes(experiment, self.data.fields)
        self.targets = Targets(experiment.heads, classes, NETWORKS[experiment.network].instances)
        self.outputs = Outputs(map_names(experiment.heads, classes), experiment.evaluation.tta)
        if experiment.start_share and self.start is not None:
            self._check_same_network(self.start)
        self.loss = CombinedLoss(experiment.loss, experiment.heads, classes)
        self.evaluator = Evaluator(self.experiment, self.targets, self.outputs, self.reference, self.loss, accelerator)

    def _check_same_network(self, start: ModelPackage) -> None:
        """Refuse ``start_share`` where the package lacks weights: those would be averaged with random ones."""
        # A card has only the name of the file that the encoder began with.
        before, now = (
            {key: value for key, value in args.items() if key != "encoder_weights"}
            for args in (start.network_args, self.experiment.network_args)
        )
        if (channel_names(start), before) != (self.outputs.names, now):
            raise PipelineError(
                f"train: start_share {self.experiment.start_share:g}, but {start.folder} lacks weights of the network",
                "train with its heads, classes and network_args, or set start_share to 0",
            )

    def _known_package(self, experiment: Experiment, role: str) -> ModelPackage | None:
        """Load the package of ``start_from`` or ``teacher``, if any, and check it with `check_unseen`."""
        folder = getattr(experiment, role)
        if folder is None:
            return None
        package = ModelPackage.load(Path(folder), verify=True)
        self.known |= check_unseen(package, self.data, f"train: {role}")
        if package.licence != experiment.licence:
            log.warning(
                "the licence of %s, %s, holds for what is trained from it, too; this training states %s",
                package.folder, package.licence, experiment.licence,
            )  # fmt: skip
        return package

    def build(self) -> nn.Module:
        """Build the network with the weights that training starts from."""
        one = self.experiment
        lightning.seed_everything(one.schedule.seed, verbose=False)
        # A package contains the encoder's weights, so pretrained ones need not be loaded.
        pretrained = self.start is None
        network = build_network(one.network, len(self.outputs.names), one.network_args, pretrained=pretrained)
        if (start := self.start) is not None:
            weights = weights_for(start, self.outputs.names)
            try:
                load_weights(network, weights, grow=True)
            except PipelineError:
                raise PipelineError(
                    f"train: start_from {start.folder} is another network than {one.network} with {one.network_args}",
                    f"set train.network to {start.network} and train.network_args to {start.network_args}",
                ) from None
        return network

    def before(self) -> dict[str, Any]:
        """Score the package of ``start_from`` on the same test fields, to show what further training has gained.

        Returns
        -------
        dict
            ``before``: its name, mean scores and intervals, with its own thresholds, stain and flips. Empty without
            such a package, without further training, or when its thresholds do not fit.
        """
        start = self.start
        if start is None or not self.data.split.train or not self._keeps_maps(start):
            return {}
        log.info("the same fields with %s, from which this training went on:", start.name)
        stain, one = start.stain, self.experiment
        own = replace(
            one,
            stain=stain["method"],
            stain_strength=float(stain.get("strength", 1)),
            evaluation=replace(one.evaluation, tta=start.tta),
        )
        evaluator = replace(
            self.evaluator,
            experiment=own,
            outputs=Outputs(self.outputs.names, start.tta),
            reference=stain.get("reference", {}),
        )
        scored, _ = evaluator.score(load_network(start), self.data.part("test"), start.thresholds)
        return {"before": {"model": start.name, **{key: scored[key] for key in ("mean", "interval_95")}}}

    def _keeps_maps(self, start: ModelPackage) -> bool:
        """Whether a package's thresholds fit, i.e. its maps and pixel size are those of the experiment."""
        return (start.mpp, channel_names(start)) == (self.experiment.mpp, self.outputs.names)

    @property
    def rules(self) -> InstanceRules:
        """Thresholds before tuning.

        Without training, those of the package of ``start_from``. Otherwise the same when its pixel size and markers
        are the experiment's, overridden by ``evaluation.rules``; else those of the experiment.
        """
        one, start = self.experiment, self.start
        if start is not None and not self.data.split.train:
            return start.thresholds  # without training, the package is scored as it is
        if start is None or (start.mpp, start.thresholds.markers) != (one.mpp, one.rules.markers):
            return one.rules
        return replace(start.thresholds, **one.evaluation.rules)

    def prepare(self, fields: Sequence[Field]) -> list[PreparedField]:
        """Prepare fields for training, each as scanned and in the model's stain."""
        one = self.experiment
        teacher = None if self.teacher is None else Teacher.of(self.teacher, self.accelerator)
        prepared = []
        for field in fields:
            version = normalise(field.image, one.stain, self.reference)
            prepared.append(
                prepare_field(
                    field,
                    one.mpp,
                    () if version is None else (version,),
                    self.targets,
                    one.class_names,
                    styled=one.augmentation.style > 0,
                    # In a field annotated as empty, anything that the teacher finds is likely wrong.
                    taught=teacher.maps(field) if teacher is not None and field.labels.any() else None,
                    share=one.teacher_share,
                )
            )
        return prepared

    def weights(self, fields: Sequence[Field]) -> np.ndarray:
        """Return the relative frequency with which each field is drawn, float64 ``(fields,)``.

        Each data source has its ``weight`` in total. Within a source, fields with rare classes are drawn more often.
        """
        share = {source_name(source): float(source.get("weight", 1.0)) for source in self.experiment.data}
        often = np.ones(len(fields))
        known = np.array([field.types is not None for field in fields])
        if (rare := self.experiment.rare_classes) and known.any():
            with_classes = [field for field in fields if field.types is not None]
            present = classes_present(with_classes, self.targets.classes, self.experiment.class_names)
            often[known] = repeats(present, rare)
        total = {name: sum(often[[f.source == name for f in fields]]) for name in share}
        found = np.array([share[f.source] * one / total[f.source] for f, one in zip(fields, often, strict=True)])
        if not found.any():
            raise PipelineError("train: the weight of every source with training fields is 0", "give one a weight")
        return found

    def fit(
        self,
        network: nn.Module,
        fields: Sequence[Field],
        validation: Sequence[Field],
        schedule: Schedule,
        folder: Path,
    ) -> nn.Module:
        """Train a network in a folder, resuming or reusing an earlier run there."""
        one = self.experiment
        job = Job(
            network, self.loss, self.targets, replace(self.outputs, tta="none"), self.rules, self.evaluator.window,
            one.augmentation, one.adversarial,
        )  # fmt: skip
        examined = []
        for field in validation:
            prepared = prepare_field(field, one.mpp, spec=self.targets, class_names=one.class_names)
            examined.append(Examined(field, replace(prepared, images=(self.evaluator.normalised(prepared.images[0]),))))
        return fit(
            job,
            self.prepare(fields),
            self.weights(fields),
            examined,
            schedule=schedule,
            folder=folder,
            accelerator=self.accelerator,
            deadline=self.deadline,
        )

    def train(self) -> nn.Module:
        """Train on the training fields; if there are none, return the network with its starting weights."""
        if not self.data.split.train:
            return self.build().eval()
        train, validation = self.data.part("train"), self.data.part("validation")
        return self.fit(self.build(), train, validation, self.experiment.schedule, self.work / "heldout")

    def train_on(self, network: nn.Module) -> nn.Module:
        """Continue training with all fields, for ``final_steps`` steps."""
        one = self.experiment
        schedule = replace(
            one.schedule,
            steps=one.final_steps,
            seed=one.schedule.seed + 1,
            learning_rate=one.schedule.learning_rate / 4,  # lower, as the network is already trained
        )
        folder = self.work / f"final-{one.schedule.steps}"
        start, begun = digest_of_weights(network), folder / "begun.json"
        stale = begun.is_file() and read_json(begun) != start
        all_here()
        if leads():
            if stale:
                log.warning("%s started from other weights, and begins again", folder)
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            save_json(begun, start)
        all_here()
        return self.fit(network, self.data.fields, [], schedule, folder)

    def finished(self, network: nn.Module) -> nn.Module:
        """Return a copy of a trained network as it is scored and packed.

        Its weights are averaged with those it started from (``start_share``) and rounded (``half_weights``), where the
        experiment says so.
        """
        one, network = self.experiment, copy.deepcopy(network)
        if one.start_share:
            before = self.build().state_dict()
            state = network.state_dict()
            network.load_state_dict(
                {k: torch.lerp(v, before[k], one.start_share) if v.is_floating_point() else v for k, v in state.items()}
            )
        if one.half_weights:
            round_weights(network)
        return network

    def tuning_fields(self) -> list[Field]:
        """Fields on which the thresholds are tuned; empty without tuning."""
        one = self.experiment
        if not one.evaluation.tune:
            return []
        more = self.data.part("train") if one.evaluation.tune_on_training else []
        return self.data.part("validation") + [f for f in more if f.source == one.holdout]

    def protocol(self) -> str:
        """Describe in words how the scores were obtained."""
        own = len({f.name for f in self.tuning_fields()} & {*self.data.split.train})
        return protocol(self.experiment, self.data.split, own, self.start.name if self.start else "", len(self.known))

    def evaluate(self, network: nn.Module) -> dict[str, Any]:
        """Tune the thresholds on the validation fields and score the test fields.

        The evaluation is kept in the experiment's folder and reused as long as its settings are the same.
        """
        one = self.experiment
        file = self.work / f"evaluation-{one.schedule.steps}.json"
        rules = self.rules
        # Everything that the scores depend on.
        settings = {
            **asdict(one.evaluation),
            "rules": asdict(rules),
            **{
                name: getattr(one, name)
                for name in ("patch", "overlap", "stain_strength", "half_weights", "start_share")
            },
            **self.origin,
            "weights": digest_of_weights(network),
        }
        panel = self.work / "panel.png"
        if file.is_file() and panel.is_file():
            known: dict[str, Any] = read_json(file)
            if known.get("settings") == settings:
                return known | {"protocol": self.protocol()}
        network = self.finished(network)
        test = self.data.part("test")
        tuning = self.tuning_fields()
        if tuning:
            if (count := sum(np.count_nonzero(np.unique(field.labels)) for field in tuning)) < FEW_NUCLEI:
                log.warning(
                    "thresholds are tuned on only %d nuclei and may suit no others (evaluation.tune: false keeps those "
                    "from which the training starts)", count,
                )  # fmt: skip
            maps = self.evaluator.maps(network, tuning)
            rules, tuned = tune_rules(maps, tuning, rules, self.evaluator.channels, one.mpp)
            log.info("thresholds: %s (%s)", rules, tuned)
        evaluation, found = self.evaluator.score(network, test, rules)
        if leads():
            write_panel(panel, test, found, evaluation["images"])
        spent = self.work / "heldout" / "time.json"
        evaluation |= self.before()
        evaluation |= {
            "test": list(self.data.split.test),
            "settings": settings,
            "steps": one.schedule.steps if self.data.split.train else 0,
            "parameters_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 3),
            "time": read_json(spent) if spent.is_file() else {},
        }
        save_json(file, evaluation)
        return evaluation | {"protocol": self.protocol()}

    def scores_before(self) -> dict[str, Any]:
        """Return scores and thresholds of the package of ``start_from``, for a training that leaves no field to score.

        Raises
        ------
        PipelineError
            When there is no such package, it has no scores, or its thresholds do not fit.
        """
        start = self.start
        if start is None or not start.metrics.get("mean"):
            raise PipelineError(
                "train: split.method all-train leaves nothing to score",
                "use it in cross-validation, or with start_from, whose scores the card then tells",
            )
        if not self._keeps_maps(start):
            raise PipelineError(
                f"train: split.method all-train, but the thresholds of {start.folder} are for {start.mpp:g} µm/px and "
                f"heads {', '.join(start.heads)}",
                "train with the same mpp, heads and classes, or hold patients out",
            )
        share, final = self.experiment.start_share, self.experiment.final_steps
        fields = str(len(self.data.split.train)) if self.data.split.validation else "all"
        then = f", then {final} with all" if final else ""
        mixed = f", and their weights averaged with its ({share:g})" if share else ""
        return start.metrics | {
            "rules": asdict(start.thresholds),
            "scores_of": start.name,
            "protocol": f"{start.metrics.get('protocol', '')}; these are the scores of {start.name}, from which the "
            f"packed weights were trained on for {self.experiment.schedule.steps} steps with {fields} fields{then}"
            f"{mixed}",
        }

    def pack(self, network: nn.Module, evaluation: dict[str, Any], out: Path) -> ModelPackage:
        """Write the model package."""
        rules = InstanceRules(**evaluation["rules"])
        classes = self.targets.classes
        # Validation fields count as seen, since the checkpoint and the thresholds were chosen on them.
        known = self.data.part("train") + self.data.part("validation")
        fields = self.data.fields if self.experiment.final_steps else known
        earlier = [one for one in (self.start, self.teacher) if one is not None]
        one, reference = self.experiment, self.reference
        return pack(network, one, evaluation, rules, reference, fields, self.work, out, classes, earlier)


def run_experiment(
    experiment: Experiment,
    work: Path,
    out: Path,
    accelerator: str = "auto",
    deadline: Deadline | None = None,
    scores: Path | None = None,
) -> dict[str, Any]:
    """Run an experiment, resuming where an earlier run stopped.

    Parameters
    ----------
    experiment : Experiment
        The experiment to run.
    work : pathlib.Path
        Folder for checkpoints, logs, split and scores.
    out : pathlib.Path
        Folder for the model package.
    accelerator : str
        ``auto``, ``cpu`` or ``gpu``.
    deadline : Deadline, optional
        When to stop, to be resumed later.
    scores : pathlib.Path, optional
        Evaluation (with thresholds) to use for an experiment that holds nobody out, from its cross-validation.

    Returns
    -------
    dict
        The evaluation: on the held-out patients, or the given or earlier one when nobody is held out.

    Raises
    ------
    PipelineError
        When data are missing or do not fit, or `out` holds another training's package.
    pipeline.training.schedule.Unfinished
        When the deadline has passed; the last checkpoint is kept.
    """
    check_place(out, work)
    run = Run(experiment, work, accelerator, deadline)
    if not run.data.split.train and run.start is None:
        raise PipelineError("train: split.method all-test without start_from", "name the model package to score")
    known = read_json(scores) if scores is not None else None if run.data.split.test else run.scores_before()
    network = run.train()
    evaluation = run.evaluate(network) if known is None else known
    save_json(work / "evaluation.json", evaluation)
    if experiment.final_steps:
        network = run.train_on(network)
    if leads():
        run.pack(run.finished(network), evaluation, out)
        write_training_report(work, run.area or None)
    return evaluation
