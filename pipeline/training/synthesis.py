"""Command ``synthesize``: synthetic H&E fields, painted around random nuclei.

A CycleGAN learns from the training fields of an experiment and from masks of random nuclei to paint H&E around such
nuclei. The painted fields need no annotation, since their nuclei are known, and serve as a data source like any other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

import pipeline
from pipeline.errors import PipelineError
from pipeline.kernels.random_nuclei import nucleus_shapes, random_nuclei
from pipeline.models.licences import strictest
from pipeline.models.package import ModelPackage
from pipeline.training.command import SCHEMA, checked_section, in_turn, prepare_process
from pipeline.training.data import Field, source_name
from pipeline.training.field import at_mpp
from pipeline.training.files import read_json, save_json
from pipeline.training.origin import RECORD, read_origin
from pipeline.training.panel import FOUND, outlined
from pipeline.training.plan import plan_synthesis
from pipeline.training.schedule import DEVICES, PRECISIONS, Deadline, Schedule, accelerator_of

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

NEVER_LEARNED = ("count", "steps", "save_every", "precision", "device", "workers", "max_minutes")
"""Settings that may be changed between runs of one CycleGAN, see `own_synthesis`."""

AREA_UM2 = 4096.0
"""Area in µm² that the counts in `SynthesisSettings.nuclei` refer to: 256 x 256 pixels of 0.25 µm."""

SHOWN = 8
"""Columns of the contact sheet."""


@dataclass(frozen=True)
class SynthesisSettings:
    """The ``synthesis:`` section of the configuration.

    Parameters
    ----------
    name : str
        The fields are written to ``RESULTS/synthesis/NAME/fields``.
    count, size : int
        Number of fields, and their side in pixels of the training's ``mpp``.
    nuclei : (int, int)
        Range of the number of nuclei per 64 x 64 µm.
    radius : (float, float)
        Range of the radii of drawn nuclei in µm.
    real_shapes : float
        Share of the nuclei that take the shape of a nucleus in the training fields; the others are drawn.
    steps, batch : int
        Training steps of the CycleGAN, and tiles per step.
    learning_rate : float
        Learning rate of generators and discriminators; falls linearly to 0 in the second half of the steps.
    width, blocks : int
        Size of the generators, see `pipeline.networks.gan.ResNetGenerator`.
    discriminator_width : int
        Width of the discriminators' first layer.
    cycle : float
        Weight of the cycle-consistency loss.
    identity : float
        Weight of the identity loss, as a share of `cycle`.
    pool : int
        Size of each discriminator's `pipeline.training.adversary.ImagePool`.
    save_every : int
        Steps between checkpoints.
    precision, device, workers, seed, max_minutes
        As in `pipeline.training.schedule.Schedule`.
    """

    name: str = "synthetic"
    count: int = 200
    size: int = 256
    nuclei: tuple[int, int] = (20, 60)
    radius: tuple[float, float] = (2.0, 5.0)
    real_shapes: float = 0.5
    steps: int = 60000
    batch: int = 1
    learning_rate: float = 2e-4
    width: int = 64
    blocks: int = 9
    discriminator_width: int = 64
    cycle: float = 10.0
    identity: float = 0.5
    pool: int = 50
    save_every: int = 500
    precision: str = "auto"
    device: str = "auto"
    workers: int = 1
    seed: int = 42
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.size % 4 or self.size < 32:
            raise PipelineError(f"synthesis: size {self.size}", "use a multiple of 4, 32 or more")
        for name in ("nuclei", "radius"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise PipelineError(f"synthesis: {name} {low}, {high}", "give a growing range above 0")
        for name, known in (("precision", PRECISIONS), ("device", tuple(DEVICES))):
            if getattr(self, name) not in known:
                raise PipelineError(f"synthesis: {name} {getattr(self, name)!r}", f"choose from {', '.join(known)}")

    @property
    def schedule(self) -> Schedule:
        """Schedule by which the CycleGAN is trained."""
        return Schedule(
            steps=self.steps,
            batch=self.batch,
            size=self.size,
            optimizer="adam",
            learning_rate=self.learning_rate,
            betas=(0.5, 0.999),
            decay="linear",
            floor=0.0,
            warmup=0.0,
            clip=0.0,
            ema=0.0,
            keep="last",
            validate_every=self.save_every,
            precision=self.precision,
            device=self.device,
            workers=self.workers,
            seed=self.seed,
        )


def nuclei_of(
    settings: SynthesisSettings, mpp: float, shapes: Sequence[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Return a label map of random nuclei, int32 ``(size, size)``.

    Parameters
    ----------
    settings : SynthesisSettings
        Size of the map, and number and size of the nuclei.
    mpp : float
        Pixel size in µm.
    shapes : sequence of numpy.ndarray
        Shapes of real nuclei at this pixel size.
    rng : numpy.random.Generator
        Source of randomness.
    """
    low, high = settings.nuclei
    count = round(int(rng.integers(low, high + 1)) * (settings.size * mpp) ** 2 / AREA_UM2)
    return random_nuclei(
        (settings.size, settings.size),
        rng,
        count=max(1, count),
        radius=(settings.radius[0] / mpp, settings.radius[1] / mpp),
        known=shapes,
        share=settings.real_shapes,
    )


@dataclass(frozen=True, eq=False)
class Originals:
    """Real fields that the CycleGAN learns from.

    Parameters
    ----------
    fields : list of Field
        Training fields of the experiment.
    images : list of numpy.ndarray
        Image of each field at the experiment's pixel size and in its stain.
    shapes : list of numpy.ndarray
        Shapes of the fields' nuclei.
    learned_from : list of dict
        Data sources of the fields: ``name``, ``licence``, ``fields``, ``patients``.
    mpp : float
        The experiment's pixel size in µm.
    """

    fields: list[Field]
    images: list[np.ndarray]
    shapes: list[np.ndarray]
    learned_from: list[dict[str, Any]]
    mpp: float


def read_originals(training: dict[str, Any], out: Path, size: int) -> tuple[Originals, dict[str, Any]]:
    """Read the fields for the CycleGAN: training fields of the experiment, none that it holds out.

    Parameters
    ----------
    training : dict
        The ``train:`` section.
    out : pathlib.Path
        Folder of the synthetic fields. Neither it nor any other folder of synthetic fields is learned from.
    size : int
        Side of the tiles in pixels at the experiment's ``mpp``; smaller fields are left out.

    Returns
    -------
    Originals
        The fields.
    dict
        Identity of the data: ``split``, ``data`` (digest of the fields) and, when the experiment starts from a model
        package, ``start_from`` (hash of its weights).

    Raises
    ------
    PipelineError
        When data are missing, or no field is large enough.
    """
    from pipeline.training.begin import digest_of, load_data, stain_reference
    from pipeline.training.experiment import Experiment
    from pipeline.training.reference import normalise

    kept = plan_synthesis({"data": (), **training}, {}, out)["train"]
    sources = [source for source in kept["data"] if not read_origin(Path(source["path"]).expanduser())]
    experiment = Experiment.from_json({"name": "synthesis", **kept, "data": sources})
    data = load_data(experiment)
    mpp = experiment.mpp
    train = [one for one in data.part("train") if one.labels.any()]
    fields = [one for one in train if min(one.labels.shape) * one.mpp / mpp >= size]
    if not fields:
        raise PipelineError(
            f"synthesis: no training field has {size} pixels of {mpp:g} µm to a side", "set a smaller synthesis.size"
        )
    start = ModelPackage.load(Path(experiment.start_from)) if experiment.start_from else None
    reference = stain_reference(experiment, data.part("train"), start) if experiment.stain != "none" else {}
    images, shapes = [], []
    for one in fields:
        normalised = normalise(one.image, experiment.stain, reference)
        images.append(at_mpp(one.image if normalised is None else normalised, one.mpp, mpp))
        sides = images[-1].shape[1::-1]
        labels = cv2.resize(one.labels.astype(np.float32), sides, interpolation=cv2.INTER_NEAREST_EXACT)
        shapes += nucleus_shapes(labels.astype(np.int32))
    learned_from = [
        {
            "name": source_name(source),
            "licence": source.get("licence", "unknown"),
            "fields": sum(one.source == source_name(source) for one in fields),
            "patients": sorted({one.patient for one in fields if one.source == source_name(source)}),
        }
        for source in sources
    ]
    whose: dict[str, Any] = {"split": data.split.to_json(data.fields), "data": digest_of(fields)}
    if start is not None:
        whose["start_from"] = start.sha256
    return Originals(fields, images, shapes, [one for one in learned_from if one["fields"]], mpp), whose


def own_synthesis(work: Path, settings: SynthesisSettings, training: dict[str, Any], whose: dict[str, Any]) -> None:
    """Record what a folder's CycleGAN learns from, and refuse to resume one that began with other data or settings.

    Raises
    ------
    PipelineError
        When the folder's CycleGAN began with something else.
    """
    learned = {key: value for key, value in asdict(settings).items() if key not in NEVER_LEARNED}
    stain = {key: training.get(key) for key in ("mpp", "stain", "reference")}
    own = json.loads(json.dumps({"settings": learned, "training": stain, **whose}, default=str))
    file = work / "began.json"
    if (work / "cyclegan" / "last.ckpt").is_file() and file.is_file() and read_json(file) != own:
        before = read_json(file)
        changed = next(key for key in {**own, **before} if before.get(key) != own.get(key))
        raise PipelineError(
            f"the {changed} of the synthesis {settings.name!r} changed after its CycleGAN in {work} began",
            "give the new one another synthesis.name, or delete that folder",
        )
    work.mkdir(parents=True, exist_ok=True)
    save_json(file, own)


def contact_sheet(real: Sequence[np.ndarray], nuclei: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> Image:
    """Return a picture of real tiles, random nuclei, the synthetic fields, and these with their nuclei outlined.

    Parameters
    ----------
    real, made : sequence of numpy.ndarray
        Real tiles and synthetic fields, uint8 ``(size, size, 3)``.
    nuclei : sequence of numpy.ndarray
        Label maps of `made`.
    """
    from PIL import Image, ImageDraw, ImageFont

    from pipeline.kernels.random_nuclei import mask_picture

    side, margin, gap, head = made[0].shape[0], 16, 8, 26
    rows = {
        "real tiles": real,
        "random nuclei": [np.repeat(mask_picture(one)[..., None], 3, axis=2) for one in nuclei],
        "synthetic": made,
        "synthetic, nuclei outlined": [outlined(a, b, FOUND) for a, b in zip(made, nuclei, strict=True)],
    }
    width = 2 * margin + SHOWN * (side + gap) - gap
    sheet = Image.new("RGB", (width, margin + len(rows) * (head + side + gap)), (250, 250, 252))
    draw = ImageDraw.Draw(sheet)
    for row, (title, pictures) in enumerate(rows.items()):
        y = margin + row * (head + side + gap)
        draw.text((margin, y), title, (34, 34, 40), ImageFont.load_default(15))
        for column, picture in enumerate(pictures[:SHOWN]):
            sheet.paste(Image.fromarray(picture), (margin + column * (side + gap), y + head))
    return sheet


def check_out(out: Path) -> None:
    """Refuse to overwrite anything but a folder of synthetic fields or an empty folder.

    Raises
    ------
    PipelineError
        When `out` is something else.
    """
    if out.exists() and not (out / RECORD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(f"{out} is there and holds no synthetic fields", "choose another folder, or move it away")


def write_fields(
    out: Path, made: Sequence[np.ndarray], nuclei: Sequence[np.ndarray], sheet: Image, record: dict[str, Any]
) -> None:
    """Write a folder of fields, whole or not at all: ``images/``, ``labels/``, the contact sheet and the record.

    Raises
    ------
    PipelineError
        When `out` is something else than a folder of synthetic fields or an empty folder.
    """
    check_out(out)
    staged = out.with_name(f".part-{os.getpid()}-{out.name}")
    try:
        for name in ("images", "labels"):
            (staged / name).mkdir(parents=True)
        for number, (image, labels) in enumerate(zip(made, nuclei, strict=True)):
            stem = f"{number:05d}.png"
            for path, picture in (
                (staged / "images" / stem, image[..., ::-1]),
                (staged / "labels" / stem, labels.astype(np.uint16)),
            ):
                path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
        sheet.save(staged / "sheet.png")
        save_json(staged / RECORD, record)
        if out.exists():
            shutil.rmtree(out)
        staged.replace(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def synthesize(
    settings: SynthesisSettings,
    training: dict[str, Any],
    work: Path,
    out: Path,
    accelerator: str = "auto",
    deadline: Deadline | None = None,
) -> dict[str, Any]:
    """Train a CycleGAN, resuming where an earlier run stopped, and paint fields with it.

    Parameters
    ----------
    settings : SynthesisSettings
        Settings of the synthesis.
    training : dict
        The ``train:`` section that the fields are for.
    work : pathlib.Path
        Folder for the checkpoint and logs.
    out : pathlib.Path
        Folder for the fields.
    accelerator : str
        ``auto``, ``cpu`` or ``gpu``.
    deadline : Deadline, optional
        When to stop, to be resumed later.

    Returns
    -------
    dict
        The record of the fields, as written to ``synthesis.json``.

    Raises
    ------
    PipelineError
        When data are missing or do not fit, or `out` holds something else.
    pipeline.training.schedule.Unfinished
        When the deadline has passed; the last checkpoint is kept.
    """
    from pipeline.training.cyclegan import Tiles, fit_cyclegan, paint

    check_out(out)
    originals, whose = read_originals(training, out, settings.size)
    own_synthesis(work, settings, training, whose)
    tiles = Tiles(originals.images, originals.shapes, settings, originals.mpp)
    painter = fit_cyclegan(tiles, settings, work / "cyclegan", accelerator, deadline)
    nuclei = [
        nuclei_of(settings, originals.mpp, originals.shapes, np.random.default_rng([settings.seed, number, 1]))
        for number in range(settings.count)
    ]
    made = [paint(painter, one) for one in nuclei]
    record = {
        "fields": settings.count,
        "nuclei": int(sum(one.max() for one in nuclei)),
        "mpp": originals.mpp,
        "seed": settings.seed,
        "licence": strictest([one["licence"] for one in originals.learned_from]),
        "learned_from": originals.learned_from,
        "settings": asdict(settings),
        "time": read_json(work / "cyclegan" / "time.json"),
        "pipeline": pipeline.__version__,
        "weights_sha256": _digest(painter),
    }
    sheet = contact_sheet([tiles[number][1] for number in range(SHOWN)], nuclei[:SHOWN], made[:SHOWN])
    write_fields(out, made, nuclei, sheet, record)
    return record


def _digest(network: Any) -> str:
    found = hashlib.sha256()
    for weight in network.state_dict().values():
        found.update(weight.contiguous().numpy().tobytes())
    return found.hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config-json", type=Path, required=True, help="the sections synthesis and train")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and logs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the fields")
    parser.add_argument("--device", choices=tuple(DEVICES), help="where to train, before the settings' device")
    parser.add_argument(
        "--max-minutes", type=float, default=0, help="stop after this time, to go on when run again; 0: as configured"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all")


def read_sections(path: Path) -> tuple[SynthesisSettings, dict[str, Any]]:
    """Read the sections ``synthesis`` and ``train`` of a JSON file, checked against the same schemas as by Snakemake.

    Raises
    ------
    PipelineError
        When the file cannot be read, or a setting is unknown or wrong; the message is one line.
    """
    hint = "give the sections synthesis and train as JSON"
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
        synthesis, training = dict(sections.get("synthesis", {})), dict(sections["train"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{path} cannot be read: {error!r}", hint) from None
    synthesis = checked_section(synthesis, path, hint, SCHEMA.with_name("synthesis.schema.yaml"))
    training = checked_section(training, path, hint)
    ranges: dict[str, Any] = {name: tuple(synthesis[name]) for name in ("nuclei", "radius") if name in synthesis}
    return SynthesisSettings(**{**synthesis, **ranges}), training


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from pipeline.machine.gpus import borrow

    settings, training = read_sections(args.config_json)
    device = args.device or settings.device
    with in_turn(args.work), borrow(device, 1):
        prepare_process(args.threads)
        deadline = Deadline(args.max_minutes or settings.max_minutes)
        record = synthesize(settings, training, args.work, args.out, accelerator_of(device), deadline)
    log.info("%s: %d fields with %d nuclei; look at sheet.png", args.out, record["fields"], record["nuclei"])
    return 0
