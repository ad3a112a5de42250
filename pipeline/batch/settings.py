"""Checks of a run's settings and of its model package before any job runs.

Imported while Snakemake parses the workflow, so it has no heavy imports.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

SHIPPED = Path(__file__).parents[2] / "models"
"""Folder of the model packages that ship with the pipeline."""

CHANGES_RESULTS = (
    "model", "mpp", "reader", "tissue.mpp", "tissue.min_area_um2", "tissue.min_hole_um2", "tiles.max_unreadable",
    "stain.method", "stain.strength", "infer.precision", "export.origin", "classifier",
)  # fmt: skip
"""Settings that change the results of slides."""


def load_schema(path: Path) -> dict[str, Any]:
    """Read a JSON schema from a YAML file; a ``$ref`` to another file is replaced by that file's schema.

    Parameters
    ----------
    path : pathlib.Path
        The schema.
    """
    import yaml

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if str(value.get("$ref", "")).endswith(".yaml"):
                return load_schema(path.parent / value["$ref"])
            return {key: resolve(item) for key, item in value.items()}
        return [resolve(item) for item in value] if isinstance(value, list) else value

    schema: dict[str, Any] = resolve(yaml.safe_load(path.read_text(encoding="utf-8")))
    return schema


def _from_text(value: str) -> Any:
    text = value.strip()
    if text.lower() in ("true", "false", "null"):  # may be written with capitals
        text = text.lower()
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError:
        return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _coerced(value: Any, schema: dict[str, Any]) -> Any:
    """Return `value` with the schema's defaults, and with text and numbers converted to the types of the schema.

    ``snakemake --config 'tiles={tile: 512}'`` passes every nested value as text. A leading ``~/`` is expanded.
    """
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema.get("additionalProperties")
        other = other if isinstance(other, dict) else {}
        filled = {key: _coerced(item, known.get(key, other)) for key, item in value.items()}
        for key, sub in known.items():
            if key not in filled and "default" in sub:
                filled[key] = _coerced(copy.deepcopy(sub["default"]), sub)
        return filled
    if isinstance(value, list):
        return [_coerced(item, schema.get("items", {})) for item in value]
    # Not every shell expands ~/ in an argument such as slides=~/scans, and nothing expands it in a settings file.
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    if not schema and isinstance(value, str):  # a value that the schema does not describe
        return _from_text(value)
    types = schema.get("type", [])
    types = {types} if isinstance(types, str) else set(types)
    if not types or not isinstance(value, (str, int, float)) or isinstance(value, bool):
        return value
    if isinstance(value, str) and "string" not in types:
        return _from_text(value)
    if isinstance(value, int) and types == {"string"}:
        return str(value)  # a folder called 2024
    return value


def _lines(error: Any) -> Iterator[str]:
    path = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "additionalProperties":
        properties = error.schema.get("properties", {})
        known, above = sorted(properties), f"{path}." if path else ""
        for key in sorted(set(error.instance) - set(known)):
            name = f"{above}{key}"
            # Suggest settings of sections, in case the section was left out, or else a similar name.
            inner = [f"{section}.{key}" for section in known if key in properties[section].get("properties", {})]
            if likely := inner or difflib.get_close_matches(str(key), known, 1, 0.6):
                yield f"unknown setting {name!r} (did you mean {' or '.join(above + one for one in likely)}?)"
            else:
                yield f"unknown setting {name!r} (known: {', '.join(known)})"
    elif error.validator == "required":
        yield f"setting missing: {path or 'configuration'}: {error.message}"
    elif error.validator == "type" and error.validator_value == "object" and error.schema.get("properties"):
        example = next(iter(error.schema["properties"]))
        yield f"setting {path!r} holds others, as '{path}={{{example}: …}}', got {error.instance!r}"
    elif error.validator == "type":
        types = error.validator_value
        wanted = types if isinstance(types, str) else " or ".join(types)
        yield f"setting {path!r} must be {wanted}, got {error.instance!r}"
    elif error.validator == "pattern" and error.validator_value.startswith("^[^{}<>"):
        yield f"setting {path!r}: no path may hold braces, angle brackets or line breaks, got {error.instance!r}"
    else:
        yield f"setting {path!r}: {error.message}"


def _not_finite(value: Any, path: str = "") -> Iterator[str]:
    """Yield a message for each number that is not finite: NaN passes all limits of a schema."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"setting {path!r} must be a number, got {value}"


def check_settings(config: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with defaults filled in, after checking them.

    Parameters
    ----------
    config : dict
        The configuration as merged by Snakemake.
    schema : dict
        JSON schema (2020-12).

    Raises
    ------
    PipelineError
        When a key is unknown or a value is wrong; one line that names the first.
    """
    from jsonschema import Draft202012Validator

    filled: dict[str, Any] = _coerced(config, schema)
    errors = sorted(
        Draft202012Validator(schema).iter_errors(filled),
        # Unknown keys first: a typo explains the rest.
        key=lambda error: (error.validator != "additionalProperties", [str(part) for part in error.absolute_path]),
    )
    lines = [*_not_finite(filled), *(line for error in errors for line in _lines(error))]
    if lines:
        more = f"; and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise PipelineError(lines[0] + more, "config.yaml lists the settings")
    return filled


def check_folder(setting: str, path: Path) -> None:
    """Refuse a path for a folder if it, or one of its parents, is a file, or if it would keep Snakemake from starting.

    Parameters
    ----------
    setting : str
        Name of the setting.
    path : pathlib.Path
        Its value. The folder need not exist.

    Raises
    ------
    PipelineError
        When it is such a path; one line that names it.
    """
    whole = Path(os.path.abspath(path))
    if Path.cwd() / "default" in (whole, *whole.parents):
        raise PipelineError(
            f"setting {setting!r}: {str(path)!r}: Snakemake takes a folder 'default' where it starts for a profile",
            f"choose another name: --config {setting}=FOLDER",
        )
    for place in (path, *path.parents):
        try:
            found = place.stat()
        except OSError:
            continue  # missing, or unreachable because of a parent, which is looked at next
        if not stat.S_ISDIR(found.st_mode):
            raise PipelineError(
                f"setting {setting!r}: {str(place)!r} is a file, not a folder",
                f"choose another: --config {setting}=FOLDER",
            )
        return


def check_same_results(made: Path, config: dict[str, Any]) -> None:
    """Refuse to continue a run whose results were made with other settings.

    It is for results of which Snakemake has no records: it would take them for up to date, and add slides that are
    processed differently.

    Parameters
    ----------
    made : pathlib.Path
        The settings that the results were made with, ``settings.json`` in the results folder.
    config : dict
        The current settings.

    Raises
    ------
    PipelineError
        When one of `CHANGES_RESULTS` differs; one line that names the first. For model and classifier, only the name of
        the folder or file counts, not where it lies.
    """
    try:
        earlier = json.loads(made.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{made} cannot be read: {error}", "delete it and run again") from None
    for name in CHANGES_RESULTS:
        section, _, key = name.rpartition(".")
        then, now = (settings.get(section, {}) if section else settings for settings in (earlier, config))
        # The setting may be newer than the results. Without a classifier then or now, results of two cannot mix.
        if key not in then or (name == "classifier" and None in (then[key], now[key])):
            continue
        was, given = (Path(one[key]).name if name in ("model", "classifier") else one[key] for one in (then, now))
        if was != given:
            raise PipelineError(
                f"results: {str(made.parent)!r} was made with {name} {json.dumps(was)}, not {json.dumps(given)}",
                "Snakemake has no records of it here: start where that run was started, with results= as it was then; "
                "or choose another folder, --config results=FOLDER; or have all of it done again, --forceall",
            )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_passed(arguments: Sequence[str]) -> None:
    """Check that settings of the command line reach the jobs of a cluster unchanged.

    Snakemake repeats them on each job's command line, quoted as Python does and not the shell.

    Parameters
    ----------
    arguments : sequence of str
        The values of ``--config``, such as ``slides=FOLDER``.

    Raises
    ------
    PipelineError
        When one of them would arrive changed.

    >>> check_passed(["slides=/data/my slides", 'export={"labels": true}', "slides=/data/O'Brien"])
    """
    for argument in arguments:
        if repr(argument)[1:-1] != argument or set("$`").intersection(argument):
            raise PipelineError(
                f"--config {argument}: Snakemake cannot pass this on to the jobs of a cluster as it is",
                "write the setting into a file: --configfile FILE",
            )


def check_model(folder: Path) -> dict[str, Any]:
    """Return the card of a model package, after checking the card and the checksum of the weights.

    Parameters
    ----------
    folder : pathlib.Path
        The package, with ``model.json`` and ``weights.safetensors``.

    Raises
    ------
    PipelineError
        When a file is missing, the card is damaged or wrong, or the weights do not match it; one line.
    """
    card_path, weights = folder / "model.json", folder / "weights.safetensors"
    for path in (card_path, weights):
        if not path.is_file():
            known = ", ".join(sorted(f"models/{card.parent.name}" for card in SHIPPED.glob("*/model.json")))
            raise PipelineError(
                f"model {str(folder)!r}: {path.name} is missing",
                "give the folder of a model package: --config model=FOLDER" + (f", as {known}" if known else ""),
            )
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
        stated = str(card["sha256"])
    except OSError as error:
        raise PipelineError(
            f"model {str(folder)!r}: cannot read {card_path.name}: {error.strerror}", "check the file"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise PipelineError(f"model {str(folder)!r}: {card_path.name} is damaged", "get the package again") from None
    try:
        found = file_sha256(weights)
    except OSError as error:
        raise PipelineError(
            f"model {str(folder)!r}: cannot read {weights.name}: {error.strerror}", "check the file"
        ) from None
    if found != stated:
        raise PipelineError(
            f"model {str(folder)!r}: {weights.name} has sha256 {found[:12]}…, its card says {stated[:12]}…",
            "the package is damaged or was changed: get it again",
        )
    assert isinstance(card, dict)
    try:
        from pipeline.models.package import ModelPackage
    except ImportError:  # NumPy and OpenCV may be installed only in the environment of the jobs
        return card
    ModelPackage.load(folder)
    return card


def check_stain(card: dict[str, Any], folder: Path, method: str, strength: float | None) -> None:
    """Refuse a method of stain normalisation for which the model has no reference.

    Parameters
    ----------
    card : dict
        The model's card.
    folder : pathlib.Path
        The package.
    method, strength : str, float or None
        The settings ``stain.method`` and ``stain.strength``.

    Raises
    ------
    PipelineError
        When the model has none; one line.
    """
    reference = (card.get("stain") or {}).get("reference") or {}
    # Vahadane can use a Macenko reference: both describe the same two dyes.
    enough = {method, "macenko"} if method == "vahadane" else {method}
    if method not in ("model", "none") and strength != 0 and enough.isdisjoint(reference):
        raise PipelineError(
            f"setting 'stain.method': model {str(folder)!r} carries no stain reference for {method}",
            "method model takes the one that it was trained with",
        )


def check_licence(card: dict[str, Any], folder: Path, accepted: Sequence[str]) -> None:
    """Refuse a model whose weights have a licence that is not accepted.

    Parameters
    ----------
    card : dict
        The model's card.
    folder : pathlib.Path
        The package.
    accepted : sequence of str
        Accepted licences, as named in the card, in upper or lower case, with ``*`` for any text. If empty, all are
        accepted.

    Raises
    ------
    PipelineError
        When the model's licence is not among them; one line.
    """
    licence = str(card.get("licence") or "not stated")
    if accepted and not any(fnmatch(licence.lower(), pattern.lower()) for pattern in accepted):
        raise PipelineError(
            f"model {str(folder)!r}: its licence is {licence}, the setting licences accepts {', '.join(accepted)}",
            "choose another model, or add its licence if you may use it",
        )
