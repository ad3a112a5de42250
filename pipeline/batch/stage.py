"""Code that all per-slide stages share: they write all of their outputs or none, and record failures and costs.

A stage writes to staged paths beside the final ones, which are renamed together once the stage has finished. If a
slide's data cannot be processed, its manifest has ``"status": "failed"``, and each other output is replaced by a stub
that says why and that no reader takes for a result. Later stages pass the failure on, and the run as a whole goes on.
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

from pipeline.batch.again import how_anew, is_marked, note_damage
from pipeline.batch.guard import guarded, tried_again
from pipeline.batch.lock import held
from pipeline.errors import DamagedStore, PipelineError, SlideError
from pipeline.stores.seal import check_kept, check_sealed, is_whole, which_store, write_seal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a slide could not be finished.

    Parameters
    ----------
    stage : str
        The stage that failed.
    reason : str
        What is wrong, in one line.
    hint : str
        What to do about it, in one line; may be empty.
    """

    stage: str
    reason: str
    hint: str = ""


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the JSON manifest that a stage wrote.

    Raises
    ------
    PipelineError
        When the file is missing or is not a manifest.
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
    """Return seconds and peak memory (MB) of each stage, by the stage's name."""
    return {
        str(manifest["stage"]): {"seconds": manifest["seconds"], "peak_rss_mb": manifest["peak_rss_mb"]}
        for manifest in manifests
    }


def manifest_failure(manifest: Mapping[str, Any]) -> Failure | None:
    """Return the failure that a manifest records, or None if its stage succeeded."""
    return Failure(**manifest["failure"]) if manifest["status"] == "failed" else None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists.

    On NFS, a folder in which a process of this machine has a file open stays, with a warning.
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
    """Peak memory of this program alone, None where there is no ``/proc``.

    On Linux, `getrusage` starts from the peak of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def _is_store(path: Path) -> bool:
    return path.suffix == ".zarr"


def _staged(path: Path) -> Path:
    # The suffix stays at the end: writers choose the format by it.
    return path.with_name(f".part-{os.getpid()}-{path.name}")


def _set_aside(path: Path) -> None:
    """Remove a folder. It is renamed first, so that a half-removed folder never has the original name."""
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(f".part-{os.getpid()}.old-{path.name}")
        with suppress(FileNotFoundError):  # another job found the same damage and was faster
            path.rename(old)
        remove(old)


_STUB = "slide "  # no Parquet, GeoJSON or gzip file begins like this


def _write_stub(staged: Path, text: str) -> None:
    remove(staged)  # the stage may have written some of it
    staged.parent.mkdir(parents=True, exist_ok=True)
    if _is_store(staged):
        staged.mkdir()
        staged = staged / "FAILED.txt"
    staged.write_text(text + "\n", encoding="utf-8")


def stub_text(path: Path) -> str | None:
    """Return the text of the stub that replaces an output of a failed slide, or None for a real output."""
    with path.open("rb") as file:
        start = file.read(4096)
    return start.decode("utf-8", "replace").strip() if start.startswith(_STUB.encode()) else None


def remove_leftovers(outputs: Iterable[Path]) -> None:
    """Remove staged outputs that killed processes have left behind."""
    for path in outputs:
        for leftover in path.parent.glob(f".part-*-{glob.escape(path.name)}"):
            remove(leftover)


def clear_remains(store: Path, made: Path) -> None:
    """Remove a store of which only some files are left, e.g. because its removal was interrupted.

    It would look newer than the results that were made from it. Snakemake would make these again, which would fail, and
    the results would be lost.

    Parameters
    ----------
    store : pathlib.Path
        The store.
    made : pathlib.Path
        The manifest of its stage. If it is missing, the store is removed.
    """
    if not store.is_dir() or is_marked(store):
        return
    if made.is_file():
        seal = read_manifest(made).get("seals", {}).get(store.name)
        if seal is None or is_whole(store, seal):
            return
    _set_aside(store)


def clear_finished(stores: Mapping[Path, Path], last: Sequence[Path], begun: float) -> None:
    """Remove temporary stores of a slide if a run has made the last results from them.

    Parameters
    ----------
    stores : mapping of pathlib.Path to pathlib.Path
        Manifest of the stage that made each store, by store.
    last : sequence of pathlib.Path
        The results that are made last. Nothing is removed unless all exist, were made since `begun`, and are newer than
        all manifests.
    begun : float
        When the run began, in seconds as of `time.time`.
    """
    try:
        made = max(path.stat().st_mtime for path in stores.values()) if stores else begun
        if min(path.stat().st_mtime for path in last) < max(made, begun):
            return
    except FileNotFoundError:  # not finished
        return
    for path in stores:
        if path.is_dir():
            _set_aside(path)
        else:
            path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Flush a file to disk, so that a machine that crashes never leaves half of it under its final name.

    Stores are skipped: their seal and the checksums of their chunks reveal such damage.
    """
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def whole_files(*paths: Path, shared: bool = False) -> Iterator[list[Path]]:
    """Yield staged paths to write files to. Once all are written, they are renamed to `paths`, in this order.

    Files are `shared` if several processes may write them at once. Then staged files that other processes have left are
    not removed, because those processes may still be at work.
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
    """Add the options that all stages have and, with `reads_slide`, those of a stage that reads the slide's file.

    If `slide` is given, it is the default of ``--slide``, which may then be left out.
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
    """Add ``--origin``, for stages that read GeoJSON from QuPath or write it for QuPath.

    See `pipeline.exchange.geojson.origin_of`.
    """
    parser.add_argument(
        "--origin", choices=("slide", "bounds"), default="slide",
        help="corner from which coordinates for QuPath, or from it, count: of level 0, or of the scan (default: slide)",
    )  # fmt: skip


def keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Return a command's options as keyword arguments of its function, whose parameters have the same names."""
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
    """Run one stage of one slide, after waiting for any other process that runs the same.

    Parameters
    ----------
    stage : str
        Name of the stage.
    slide : str
        Name of the slide.
    manifest : pathlib.Path
        The stage's JSON manifest, written last.
    body : callable
        Gets a dict with a staged path for each of `outputs`, writes them, and returns further entries for the manifest.
        Raises `SlideError` when the slide's data is at fault.
    outputs : mapping of str to pathlib.Path
        The other outputs, by the names that `body` knows them by.
    upstream : sequence of pathlib.Path
        Manifests of earlier stages. If one records a failure, it is passed on and `body` is not run.
    stores : mapping of pathlib.Path to pathlib.Path
        Stores of earlier stages that `body` reads, each with the manifest that holds the checksum of its seal.
    on_bad_slide : {"continue", "stop"}
        Whether a bad slide is recorded as failed or raises an error.
    minutes : float, optional
        Minutes that the job may take. If given, `body` runs in a process of its own, and a slide over which a library
        hangs or crashes is a bad slide; see `pipeline.batch.guard`.
    again : bool
        Whether the job is tried again with more time if `minutes` are over. In that case the job fails instead of the
        slide.

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
        When a store of an earlier stage is damaged; it is removed, so that the next run makes it again. Also when a
        store was removed while `body` read it, and when the time is over and the job is tried again.
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
    """Check the stores that a stage reads, before and after it reads them, and remove a damaged one.

    `stores` maps each store to the manifest of its stage. `who` names slide and stage in messages.
    """
    try:
        for store, made in stores.items():
            if is_marked(store):
                note_damage(store)  # once more: if two machines note damage at once, a line may be lost
                raise PipelineError(f"{who}: {store} was damaged", how_anew())
            if (seal := read_manifest(made).get("seals", {}).get(store.name)) is not None:
                check_sealed(store, seal)
        read = {store: which_store(store) for store in stores}
        try:
            yield
        finally:  # after errors too: a slide is not bad because its store went missing while it was read
            for store, which in read.items():
                check_kept(store, which)
    except DamagedStore as error:
        _set_aside(error.path)
        note_damage(error.path)
        raise PipelineError(f"{who}: {error.path} was damaged and has been removed: {error.why}", how_anew()) from None
