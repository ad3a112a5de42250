"""The settings of a training experiment."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.batch.settings import check_model
from pipeline.errors import PipelineError
from pipeline.kernels.instances import Channels, InstanceRules
from pipeline.kernels.stain import METHODS
from pipeline.networks.outputs import TTA, map_names
from pipeline.networks.registry import NETWORKS, build_network, head_channels, stride_of
from pipeline.training.samples import Augmentation
from pipeline.training.schedule import Schedule
from pipeline.training.splits import Split, SplitSettings


@dataclass(frozen=True)
class EvaluationSettings:
    """How the network is scored. The package records the test-time augmentation and the thresholds for inference.

    Parameters
    ----------
    tta : str
        Test-time augmentation: ``none``, ``flips`` or ``dihedral``.
    windows : bool
        Predict fields in the windows of inference (`patch`, `overlap`) instead of in one pass.
    rules : dict
        Initial thresholds, see `pipeline.kernels.instances.InstanceRules`.
    tune : bool
        Tune thresholds on the validation fields.
    tune_on_training : bool
        Tune thresholds also on the training fields of the `holdout` source. This is more stable if there are few
        validation fields, but only sound for a network that has not overfitted to its training fields.
    count_within : int
        Side in pixels of the central square of a field: the R² of class counts takes only nuclei with a pixel in this
        square. 0: all nuclei.
    """

    tta: str = "none"
    windows: bool = False
    rules: dict[str, Any] = field(default_factory=dict)
    tune: bool = True
    tune_on_training: bool = False
    count_within: int = 0

    def __post_init__(self) -> None:
        if self.tta not in TTA:
            raise PipelineError(f"train: evaluation.tta {self.tta!r}", f"choose from {', '.join(TTA)}")


GAN_LOSSES = ("vanilla", "lsgan")


@dataclass(frozen=True)
class AdversarialSettings:
    """Settings of a discriminator that learns to tell predicted from true maps, and that the network learns to deceive.

    The discriminator sees the image together with the maps; with three layers it judges patches of 70 x 70 pixels.
    Every convolution has spectral normalisation. Learning rate, betas and decay are those of the schedule.

    Parameters
    ----------
    weight : float
        Weight of the adversarial term in the network's loss, beside the terms of ``loss``; 0: no discriminator.
    loss : str
        ``vanilla`` (binary cross-entropy) or ``lsgan`` (squared error).
    width, layers : int
        Number of channels of the first layer, and number of convolutions of stride 2.
    pool : int
        Number of earlier predictions to keep, which take the place of about half of the newest; 0 for none.
    gradient_penalty : float
        Weight of the penalty on the discriminator's gradient; 0 for none.

    References
    ----------
    Mahmood et al., "Deep adversarial training for multi-organ nuclei segmentation in histopathology images", IEEE TMI
    2020.
    """

    weight: float = 0.0
    loss: str = "vanilla"
    width: int = 64
    layers: int = 3
    pool: int = 64
    gradient_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in GAN_LOSSES:
            raise PipelineError(f"train: adversarial.loss {self.loss!r}", f"choose from {', '.join(GAN_LOSSES)}")
        if min(self.weight, self.pool, self.gradient_penalty) < 0 or min(self.width, self.layers) < 1:
            raise PipelineError(
                "train: adversarial: weight, pool and gradient_penalty are 0 or more, width and layers 1 or more"
            )


RESULT_ONLY = (
    "final_steps",
    "patch",
    "overlap",
    "licence",
    "description",
    "encoder_licence",
    "evaluation",
    "stain_strength",
    "half_weights",
    "start_share",
)
"""Settings that do not change how weights are trained, only how networks are scored, trained further and packed."""

SPEED_ONLY = ("steps", "epochs", "workers", "validate_every", "precision", "device", "devices", "max_minutes")
"""Settings of the schedule that may change when a training is resumed: its length, speed and place."""


@dataclass(frozen=True)
class Experiment:
    """The ``train:`` section of the configuration.

    Parameters
    ----------
    name : str
        Name of the trained model.
    data : tuple of dict
        Data sources: ``kind``, ``path``, optional ``mpp``, ``mpp_of``, ``weight`` (share of the samples) and
        ``licence``.
    mpp : float
        Pixel size of the model in µm.
    network, network_args
        Name of the network in `pipeline.networks.registry.NETWORKS`, and its arguments.
    heads : tuple of str
        Heads of the network, nucleus first, type last; empty: the network's default heads.
    classes : tuple of str
        Classes of the type head; empty: all classes in the data.
    class_names : dict
        Class of the type head by class in the data, where the two differ.
    loss : tuple of dict
        Terms of the loss, see `pipeline.training.losses.loss_terms`; empty: the defaults of the heads.
    start_from : str, optional
        Model package that supplies the initial weights and the stain reference.
    start_share : float
        Share of the initial weights in the weights that are scored and packed; the trained weights have the rest.
    teacher : str, optional
        Model package whose maps are mixed into the training targets, see `pipeline.training.teacher`.
    teacher_share : float
        Share of the teacher's maps in the targets; the annotations have the rest.
    rare_classes : float
        A class is rare if fewer than this share of the fields with known classes have it. Fields with rare classes are
        drawn more often, see `pipeline.training.balance.repeats`.
    half_weights : bool
        Round the weights to 16 bits, which halves the package.
    patch, overlap : int
        Side and overlap of the windows in inference.
    stain : str
        Stain normalisation in inference, one of `pipeline.kernels.stain.METHODS`. In training the network sees fields
        both as they are and normalised.
    stain_strength : float
        How far inference normalises towards the reference, 0 to 1; training uses both 0 and 1.
    reference : str
        Name of the field that is the stain reference, or ``auto`` to choose one.
    holdout : str
        Data source from which patients are held out.
    split : SplitSettings
        How patients are held out.
    validation : int
        Number of patients for validation.
    seed : int
        Seed of the split.
    schedule : Schedule
        Schedule of the training with patients held out.
    final_steps : int
        Steps of further training on all fields before packing; 0: pack the network trained with patients held out.
    augmentation : Augmentation
        Augmentation of the samples.
    adversarial : AdversarialSettings
        Settings of the discriminator.
    evaluation : EvaluationSettings
        How the network is scored.
    licence, description : str
        Licence and description of the model, for its card.
    encoder_licence : str
        Licence of the pretrained weights that the encoder starts from, if any, for the card.
    """

    name: str
    data: tuple[dict[str, Any], ...]
    mpp: float = 0.5
    network: str = "resunet"
    network_args: dict[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    class_names: dict[str, str] = field(default_factory=dict)
    loss: tuple[dict[str, Any], ...] = ()
    start_from: str | None = None
    start_share: float = 0.0
    teacher: str | None = None
    teacher_share: float = 0.5
    rare_classes: float = 0.0
    half_weights: bool = False
    patch: int = 512
    overlap: int = 32
    stain: str = "macenko"
    stain_strength: float = 1.0
    reference: str = "auto"
    holdout: str = "monuseg"
    validation: int = 4
    seed: int = 42
    split: SplitSettings = field(default_factory=SplitSettings)
    schedule: Schedule = field(default_factory=Schedule)
    final_steps: int = 1000
    augmentation: Augmentation = field(default_factory=Augmentation)
    adversarial: AdversarialSettings = field(default_factory=AdversarialSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    licence: str = "unknown"
    description: str = ""
    encoder_licence: str = "unknown"

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise PipelineError(
                f"train: unknown network {self.network!r}", f"choose from {', '.join(sorted(NETWORKS))}"
            )
        if not self.heads:
            object.__setattr__(self, "heads", NETWORKS[self.network].heads)
        drawn = self.heads == ("nucleus", "distance") and self.evaluation.tta == "none"
        if NETWORKS[self.network].instances and not drawn:
            raise PipelineError(
                f"train: {self.network} with heads {', '.join(self.heads)} and evaluation.tta {self.evaluation.tta}",
                "it finds instances itself: use heads nucleus, distance and tta none",
            )
        if self.adversarial.weight and (NETWORKS[self.network].instances or "type" in self.heads):
            raise PipelineError(
                f"train: adversarial.weight with network {self.network}, heads {', '.join(self.heads)}",
                "a discriminator needs maps whose truth is known everywhere: set it to 0, or leave the type head out",
            )
        rate = self.schedule.encoder_rate
        if rate != 1 and not NETWORKS[self.network].pretrained:
            raise PipelineError(
                f"train: schedule.encoder_rate {rate:g}, but {self.network} has no pretrained encoder",
                "set it to 1, or take a network with encoder_weights",
            )
        stride = stride_of(self.network, self.network_args)
        for name, side in (("patch", self.patch), ("schedule.size", self.schedule.size)):
            if side % stride:
                raise PipelineError(f"train: {name} {side} does not suit {self.network}", f"use a multiple of {stride}")
        if not 0 < 2 * self.overlap <= self.patch:
            raise PipelineError(
                f"train: overlap {self.overlap} with patch {self.patch}", "use at least 1 and at most half of patch"
            )
        if self.stain not in METHODS:
            raise PipelineError(f"train: stain {self.stain!r}", f"choose from {', '.join(METHODS)}")
        if not 0 <= self.stain_strength <= 1:
            raise PipelineError(f"train: stain_strength {self.stain_strength}", "use a number from 0 to 1")
        if not 0 <= self.rare_classes <= 1:
            raise PipelineError(f"train: rare_classes {self.rare_classes}", "use a share of the fields, from 0 to 1")
        if self.rare_classes and "type" not in self.heads:
            raise PipelineError("train: rare_classes without a type head", "add the head, or leave rare_classes out")
        for name in ("teacher_share", "start_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise PipelineError(f"train: {name} {getattr(self, name)}", "use a number from 0 to 1")
        if self.start_share and self.start_from is None:
            raise PipelineError(f"train: start_share {self.start_share:g} without start_from", "name the model package")
        map_names(self.heads, self.classes)
        try:
            rules = self.rules
        except (TypeError, ValueError) as error:
            raise PipelineError(f"train: evaluation.rules: {error}", "see docs/models.md for the thresholds") from None
        if rules.markers != "nucleus" and rules.markers not in self.heads:
            raise PipelineError(
                f"train: evaluation.rules.markers {rules.markers!r}", f"the heads are {', '.join(self.heads)}"
            )

    @property
    def rules(self) -> InstanceRules:
        """Initial thresholds: the defaults for the markers and pixel size, changed by ``evaluation.rules``."""
        markers = self.evaluation.rules.get("markers", Channels.of(map_names(self.heads)).marker_source)
        return InstanceRules(**{**asdict(InstanceRules.default_for(markers, self.mpp)), **self.evaluation.rules})

    @property
    def learned(self) -> dict[str, Any]:
        """Settings that decide how weights are trained, as JSON values: all but `RESULT_ONLY` and `SPEED_ONLY`."""
        kept = asdict(self)
        for name in RESULT_ONLY:
            del kept[name]
        for name in SPEED_ONLY:
            del kept["schedule"][name]
        value: dict[str, Any] = json.loads(json.dumps(kept))
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Experiment:
        """Build an experiment from the configuration.

        Raises
        ------
        PipelineError
            When a key is unknown or a value does not fit.
        """
        if not value.get("data"):
            raise PipelineError("train: no data", "list data sources under train.data, see config/experiments")
        parts: dict[str, Any] = {
            "schedule": Schedule,
            "augmentation": Augmentation,
            "split": SplitSettings,
            "adversarial": AdversarialSettings,
            "evaluation": EvaluationSettings,
        }
        try:
            built: dict[str, Any] = {
                key: parts[key](**_tuples(part)) if key in parts else part for key, part in _tuples(value).items()
            }
            return cls(**built)
        except (TypeError, ValueError) as error:
            raise PipelineError(f"train: {error}", "compare the section with config.yaml") from None


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


def check_parts(experiment: Experiment) -> None:
    """Check the model packages and the network of an experiment before its training begins.

    Raises
    ------
    PipelineError
        When a model package is missing or damaged, or the network cannot be built.
    """
    for role in ("start_from", "teacher"):
        if (folder := getattr(experiment, role)) is not None:
            try:
                check_model(Path(folder))
            except PipelineError as error:
                raise PipelineError(f"train: {role}: {error.reason}", "name the folder of a model package") from None
    if not experiment.network_args:
        return
    try:
        channels = head_channels(experiment.heads, len(experiment.classes) or 1)
        build_network(experiment.network, channels, experiment.network_args, pretrained=False)
    except ImportError:  # PyTorch may be installed only in the environment of the jobs
        return
    except PipelineError as error:
        raise PipelineError(f"train: network_args: {error.reason}", error.hint) from None


def protocol(experiment: Experiment, split: Split, tuned: int, start: str, known: int = 0) -> str:
    """Describe in words how the scores of an experiment were obtained.

    Parameters
    ----------
    experiment : Experiment
        The experiment.
    split : Split
        Names of the fields for training, validation and testing.
    tuned : int
        Number of training fields on which thresholds are tuned.
    start : str
        Name of the model that the training starts from; without training, of the model that is scored.
    known : int
        Number of validation fields whose patients an earlier model (the start, the teacher or a member of an ensemble)
        has learned from.
    """
    before = f" ({known} of them known before)" if known else ""
    others = [f"{len(split.validation)} fields of other patients{before}"] if split.validation else []
    own = [f"{tuned} training fields"] if tuned else []
    chosen = bool(split.train and others) and experiment.schedule.keep != "last"
    if not split.train:
        checkpoint = f"{start} as it is"
    else:
        checkpoint = f"checkpoint chosen on {others[0]}" if chosen else "the last checkpoint"
    if not (experiment.evaluation.tune and others + own):
        thresholds = "; thresholds not tuned"
    elif chosen:
        thresholds = f", thresholds on {' and '.join(['these', *own])}"
    else:
        thresholds = f"; thresholds chosen on {' and '.join(others + own)}"
    held_out = f"{experiment.split.describe(experiment.holdout)} (seed {experiment.seed}, {len(split.test)} fields)"
    share = experiment.start_share if split.train else 0
    mixed = f", its weights averaged with those of {start} ({share:g})" if share else ""
    more = experiment.final_steps
    final = f"; the packed weights were then trained {more} steps on all fields" if more else ""
    return f"{held_out}; {checkpoint}{mixed}{thresholds}{final}"
