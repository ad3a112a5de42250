"""What every per-slide stage shares: whole outputs or none, failure as data, timing.

A stage writes into staged paths beside the final ones; they are renamed together once the stage has finished. A
slide whose data cannot be processed gets a manifest with ``"status": "failed"`` and, in place of each other output,
a stub that says why (no reader takes it for a result), so that the later stages pass the failure on and the run as
a whole goes on.
"""

from __future__ import annotations

import argparse
import errno
import glob
import json
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.again import how_anew, is_marked, note_damage
from pipeline.errors import DamagedStore, PipelineError, SlideError
from pipeline.guard import guarded, tried_again
from pipeline.lock import held
from pipeline.seal import check_kept, check_sealed, is_whole, which_store, write_seal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a slide could not be finished.

    Parameters
    ----------
    stage : str
        The stage that found out.
    reason : str
        One line.
    hint : str
        One line: what to do, may be empty.
    """

    stage: str
    reason: str
    hint: str = ""


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the JSON manifest that a stage wrote.

    Raises
    ------
    PipelineError
        When the file is missing or no manifest.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing", "run the stage before this one first") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PipelineError(f"{path} is damaged: {error}", "delete it and run again") from None
    if not isinstance(manifest, dict) or manifest.get("status") not in ("ok", "failed"):
        raise PipelineError(f"{path} is not a stage manifest", "delete it and run again")
    return manifest


def stage_costs(manifests: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of each stage by its name."""
    return {
        str(manifest["stage"]): {"seconds": manifest["seconds"], "peak_rss_mb": manifest["peak_rss_mb"]}
        for manifest in manifests
    }


def manifest_failure(manifest: Mapping[str, Any]) -> Failure | None:
    """The failure a manifest tells of, or None when its stage went well."""
    return Failure(**manifest["failure"]) if manifest["status"] == "failed" else None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing happens when there is none.

    On NFS a folder stays, with a warning, as long as a process of this machine has a file in it open.
    """
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                raise
            log.warning("%s cannot be removed yet: %s", path, error.strerror)
    else:
        path.unlink(missing_ok=True)


def peak_rss_mb() -> float:
    """Peak resident memory of this process and its finished children, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = _peak_kb() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(own, children) * unit / 1e6


def _peak_kb() -> int | None:
    """Peak of this program alone: on Linux `getrusage` goes on counting from the process that started it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def _is_store(path: Path) -> bool:
    return path.suffix == ".zarr"


def _staged(path: Path) -> Path:
    # The suffix stays last: writers choose the format by it.
    return path.with_name(f".part-{os.getpid()}-{path.name}")


def _set_aside(path: Path) -> None:
    """Remove a folder that is in the way, in such a way that its name never stands for half of it."""
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(f".part-{os.getpid()}.old-{path.name}")
        with suppress(FileNotFoundError):  # another job that found the same damage was faster
            path.rename(old)
        remove(old)


_STUB = "slide "  # no parquet, GeoJSON or gzip file begins so


def _write_stub(staged: Path, text: str) -> None:
    remove(staged)  # what there is of it
    staged.parent.mkdir(parents=True, exist_ok=True)
    if _is_store(staged):
        staged.mkdir()
        staged = staged / "FAILED.txt"
    staged.write_text(text + "\n", encoding="utf-8")


def stub_text(path: Path) -> str | None:
    """What stands in place of an output whose slide failed, None where the output is there."""
    with path.open("rb") as file:
        start = file.read(4096)
    return start.decode("utf-8", "replace").strip() if start.startswith(_STUB.encode()) else None


def remove_leftovers(outputs: Iterable[Path]) -> None:
    """Remove what killed processes have left of outputs that they staged."""
    for path in outputs:
        for leftover in path.parent.glob(f".part-*-{glob.escape(path.name)}"):
            remove(leftover)


def clear_remains(store: Path, made: Path) -> None:
    """Remove a store of which only some is left, as when its removal was cut off.

    It would look like one that is newer than what was made of it: that would be made again, fail and be missing.

    Parameters
    ----------
    store : pathlib.Path
        The store.
    made : pathlib.Path
        The manifest of its stage; it may have gone before the store.
    """
    if not store.is_dir() or is_marked(store):
        return
    if made.is_file():
        seal = read_manifest(made).get("seals", {}).get(store.name)
        if seal is None or is_whole(store, seal):
            return
    _set_aside(store)


def to_disk(path: Path) -> None:
    """Write out a file, so that a machine that stops has no half of it under its final name.

    Stores have their seal and the checksums of their chunks for that.
    """
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def whole_files(*paths: Path, shared: bool = False) -> Iterator[list[Path]]:
    """Where to write files, which take their places together once all are written, in this order.

    Those that several processes may write at once are `shared`: what is staged there may be another's.
    """
    if not shared:
        remove_leftovers(paths)
    staged = [_staged(path) for path in paths]
    try:
        yield staged
        for path in staged:
            to_disk(path)
        for part, path in zip(staged, paths, strict=True):
            part.rename(path)
    finally:
        for path in staged:
            path.unlink(missing_ok=True)


def add_stage_arguments(
    parser: argparse.ArgumentParser, *, reads_slide: bool = False, slide: str | None = None
) -> None:
    """Options that all stages have, and those of a stage that reads the slide's file.

    Where `slide` is given, the option may be left out and the slide is called so.
    """
    parser.add_argument("--slide", required=slide is None, default=slide, help="name of the slide")
    parser.add_argument(
        "--on-bad-slide", choices=("continue", "stop"), default="continue",
        help="whether a slide that cannot be processed is data or an error (default: continue)",
    )  # fmt: skip
    if reads_slide:
        parser.add_argument(
            "--job-minutes", dest="minutes", type=float, help="time of the job; a slide that needs 9/10 of it fails"
        )
        parser.add_argument(
            "--attempt", type=tried_again, default=False, metavar="I/N", dest="again",
            help="which attempt of the job this is, of how many: in the last one the slide fails, in others the job",
        )  # fmt: skip


def add_origin_argument(parser: argparse.ArgumentParser) -> None:
    """The option of stages whose GeoJSON goes to QuPath or comes from there, see `pipeline.geojson.origin_of`."""
    parser.add_argument(
        "--origin", choices=("slide", "bounds"), default="slide",
        help="corner from which coordinates for QuPath, or from it, count: of level 0, or of the scan (default: slide)",
    )  # fmt: skip


def keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a command as keywords of its function, whose parameters have the same names."""
    return {name: value for name, value in vars(args).items() if name != "verbose"}


def run_stage(
    stage: str,
    slide: str,
    *,
    manifest: Path,
    body: Callable[[dict[str, Path]], dict[str, Any]],
    outputs: Mapping[str, Path] | None = None,
    upstream: Sequence[Path] = (),
    stores: Mapping[Path, Path] | None = None,
    on_bad_slide: str = "continue",
    minutes: float | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Run one stage of one slide. One process at a time does so; another one waits.

    Parameters
    ----------
    stage : str
        Name of the stage.
    slide : str
        Name of the slide.
    manifest : pathlib.Path
        The stage's JSON manifest, written last.
    body : callable
        Gets a dict of staged paths, one for each of `outputs`, writes them, and returns what the manifest shall hold.
        Raises `SlideError` when the slide's data is at fault.
    outputs : mapping of str to pathlib.Path
        The other outputs by a name.
    upstream : sequence of pathlib.Path
        Manifests of earlier stages; when one tells of a failure, it is passed on and `body` is not run.
    stores : mapping of pathlib.Path to pathlib.Path
        Stores of earlier stages that `body` reads, and the manifest of each, which tells of the store's seal.
    on_bad_slide : {"continue", "stop"}
        Whether a bad slide is data or an error.
    minutes : float, optional
        Minutes that the job may take. With it, `body` runs in a process of its own, and a slide over which a library
        hangs or crashes is a bad slide; see `pipeline.guard`.
    again : bool
        Whether the job is tried again with more time, when these are over: then it fails, and the slide is not bad yet.

    Returns
    -------
    dict
        The manifest as written: ``stage``, ``slide``, ``status`` (``ok`` or ``failed``), ``failure``, ``seconds``,
        ``peak_rss_mb``, what `body` returned, and, where there are stores among the outputs, ``seals``: checksums of
        their seals, by the store's name.

    Raises
    ------
    SlideError
        When the slide is bad and `on_bad_slide` is ``"stop"``.
    PipelineError
        When a store of an earlier stage is damaged. It is removed, so that the next run makes it again. When one was
        taken away while `body` read it. When the time is over, and the job is tried again.
    """
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with held(manifest.with_name(f".lock-{manifest.name}")):
        start = time.monotonic()
        outputs = outputs or {}
        staged = {name: _staged(path) for name, path in outputs.items()}
        remove_leftovers([*outputs.values(), manifest])
        failure = next((f for f in (manifest_failure(read_manifest(path)) for path in upstream) if f), None)
        made: dict[str, Any] = {}
        try:
            if failure is None:
                for path in staged.values():
                    path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with _intact(stores or {}, f"slide {slide!r}, {stage}"):
                        made = guarded(partial(body, staged), minutes, again)
                    seals = {path.name: write_seal(staged[name]) for name, path in outputs.items() if _is_store(path)}
                    made |= {"seals": seals} if seals else {}
                except SlideError as error:
                    if on_bad_slide == "stop":
                        raise SlideError(f"slide {slide!r}, {stage}: {error.reason}", error.hint) from None
                    failure = Failure(stage, error.reason, error.hint)
                    log.warning("slide %r failed at %s: %s", slide, stage, error)
            if failure is not None:
                text = f"{_STUB}{slide!r} failed at {failure.stage}: {failure.reason}. {failure.hint}".strip()
                for path in staged.values():
                    _write_stub(path, text)
            record = {
                "stage": stage,
                "slide": slide,
                "status": "ok" if failure is None else "failed",
                "failure": None if failure is None else asdict(failure),
                **made,
                "seconds": round(time.monotonic() - start, 3),
                "peak_rss_mb": round(peak_rss_mb(), 1),
            }
            last = staged["manifest"] = _staged(manifest)
            write_json(last, record)
            for path in staged.values():
                to_disk(path)
            for name, path in outputs.items():
                _set_aside(path)
                staged[name].rename(path)
            last.rename(manifest)
        finally:
            for path in staged.values():
                remove(path)
    return record


@contextmanager
def _intact(stores: Mapping[Path, Path], who: str) -> Iterator[None]:
    """Look at the stores that a stage reads, each with its manifest, before it does and after; remove a damaged one."""
    try:
        for store, made in stores.items():
            if is_marked(store):
                note_damage(store)  # again: two machines that note at once may lose a line
                raise PipelineError(f"{who}: {store} was damaged", how_anew())
            if (seal := read_manifest(made).get("seals", {}).get(store.name)) is not None:
                check_sealed(store, seal)
        read = {store: which_store(store) for store in stores}
        try:
            yield
        finally:  # nor is a slide bad whose pixels went
            for store, which in read.items():
                check_kept(store, which)
    except DamagedStore as error:
        _set_aside(error.path)
        note_damage(error.path)
        raise PipelineError(f"{who}: {error.path} was damaged and has been removed: {error.why}", how_anew()) from None
