"""Packing of a trained network as a model package."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.kernels.instances import InstanceRules
from pipeline.models.package import ModelPackage, NucleusClass
from pipeline.training.data import Field, source_name
from pipeline.training.experiment import Experiment
from pipeline.training.origin import origins_of
from pipeline.training.owner import check_place, note_package

log = logging.getLogger(__name__)

METRICS = ("protocol", "mean", "interval_95", "organs", "types", "batchwise", "images")
"""Entries of an evaluation that are copied to the model card."""

COLORS = ((46, 160, 67), (214, 69, 65), (52, 120, 200), (240, 170, 40), (140, 90, 190), (60, 180, 180), (120, 120, 120))
"""RGB colours of the classes in their order; repeated when there are more classes."""


def recorded_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's arguments for the model card, with only the file name of the encoder weights."""
    weights = args.get("encoder_weights")
    return {**args, "encoder_weights": Path(weights).name} if weights else dict(args)


def learned_from(
    fields: Sequence[Field],
    sources: Sequence[Mapping[str, Any]],
    earlier: Sequence[ModelPackage] = (),
    encoder: tuple[str, str] | None = None,
) -> tuple[dict[str, Any], ...]:
    """Return the training data for the model card: name, licence, number of fields and patients of each source.

    Parameters
    ----------
    fields : sequence of Field
        Fields that the network was trained on, or on which its checkpoint and thresholds were chosen.
    sources : sequence of mapping
        The experiment's ``data``.
    earlier : sequence of ModelPackage
        The model that the training started from and its teacher; their training data are included.
    encoder : (str, str), optional
        Name of the weights that the encoder started from, and their licence.
    """
    entries: dict[str, dict[str, Any]] = {}
    for package in earlier:
        for one in package.data:
            known = entries.setdefault(one["name"], dict(one))
            known["patients"] = sorted({*known.get("patients", ()), *one.get("patients", ())})
            known["fields"] = max(known.get("fields", 0), one.get("fields", 0))
    if encoder is not None:
        name = f"encoder weights {encoder[0]}"
        entries[name] = {"name": name, "licence": encoder[1], "fields": 0, "patients": []}
    for source in sources:
        name = source_name(source)
        own = [f for f in fields if f.source == name]
        before = entries.get(name, {})
        entries[name] = {
            "name": name,
            "licence": source.get("licence") or before.get("licence", "unknown"),
            "fields": max(len(own), before.get("fields", 0)),
            "patients": sorted({f.patient for f in own} | set(before.get("patients", ()))),
        }
        for origin in origins_of(source):  # sources that synthetic fields were learned from
            known = entries.setdefault(origin["name"], {**origin, "fields": 0})
            known["patients"] = sorted({*known.get("patients", ()), *origin["patients"]})
    return tuple(entries.values())


def round_weights(network: Any) -> None:
    """Round a network's kernels to float16 values, in place; one-dimensional parameters (biases, norms) are kept."""
    import torch

    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.copy_(weight.half())


def pack(
    network: Any,
    experiment: Experiment,
    evaluation: dict[str, Any],
    rules: InstanceRules,
    reference: dict[str, Any],
    fields: list[Field],
    work: Path,
    out: Path,
    classes: Sequence[str] = (),
    earlier: Sequence[ModelPackage] = (),
) -> ModelPackage:
    """Write a trained network as a model package, see `ModelPackage.write`.

    Parameters
    ----------
    network : torch.nn.Module
        The trained network; with ``half_weights`` it is rounded in place.
    experiment : Experiment
        The experiment that the network was trained in.
    evaluation : dict
        Scores on unseen patients.
    rules : InstanceRules
        Tuned thresholds.
    reference : dict
        Stain reference.
    fields : list of Field
        Fields that the network has learned from, see `learned_from`.
    work : pathlib.Path
        Folder of the training.
    out : pathlib.Path
        Folder of the package.
    classes : sequence of str
        Classes of the type head.
    earlier : sequence of ModelPackage
        The model that the training started from and its teacher.

    Returns
    -------
    ModelPackage
        The package.

    Raises
    ------
    PipelineError
        When `out` holds a package that the training has not made.
    """
    from safetensors.torch import save

    check_place(out, work)
    args = recorded_args(experiment.network_args)
    encoder = (args["encoder_weights"], experiment.encoder_licence) if args.get("encoder_weights") else None
    state = {k: v.contiguous() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    if experiment.half_weights:
        round_weights(network)
        state = {k: v.half() if v.ndim > 1 else v for k, v in state.items()}
    weights = save(state)
    package = ModelPackage(
        name=experiment.name,
        mpp=experiment.mpp,
        patch=experiment.patch,
        overlap=experiment.overlap,
        network=experiment.network,
        network_args=args,
        heads=experiment.heads,
        classes=tuple(
            NucleusClass(name, COLORS[index % len(COLORS)]) for index, name in enumerate(classes or ["Nucleus"])
        ),
        stain={"method": experiment.stain, "strength": experiment.stain_strength, "reference": reference},
        thresholds=rules,
        licence=experiment.licence,
        description=experiment.description,
        data=learned_from(fields, experiment.data, earlier, encoder),
        metrics={k: evaluation[k] for k in METRICS if k in evaluation},
        sha256=hashlib.sha256(weights).hexdigest(),
        tta=experiment.evaluation.tta,
    )
    note_package(work, package.sha256)
    package.write(out, weights)
    log.info("packed %s (%.1f MB)", out, len(weights) / 1e6)
    return package
