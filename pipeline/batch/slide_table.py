"""Find the slides of a run from the setting ``slides``: a folder, a table or a single slide.

Runs while Snakemake parses the workflow, in the main process and again in each cluster job, so it decodes no slide and
depends only on the standard library.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.batch.stage import read_manifest, whole_files
from pipeline.errors import PipelineError
from pipeline.layout import RunLayout, folder_name

SUFFIXES = (
    ".ome.tiff",
    ".ome.tif",
    ".svs",
    ".tif",
    ".tiff",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".bif",
    ".vms",
    ".vmu",
    ".svslide",
    ".czi",
    ".dcm",
    ".png",
    ".jpg",
    ".jpeg",
)
"""File name endings of slides, in any case. The first that matches is taken off the name; longer ones come first."""

FILE_COLUMNS = ("tissue", "truth", "regions")
"""Columns of a slide table that name further files of a slide."""

OWN_COLUMNS = ("slide", "path", "mpp", *FILE_COLUMNS)
"""Columns of a slide table that the pipeline reads; any further ones are carried into the cohort table."""

FIRST_MANIFEST = {"path": "inspect", "mpp": "inspect", "tissue": "tissue", "truth": "metrics", "regions": "regions"}
"""Columns that affect a slide's results, each with the manifest (in `SlideLayout`) of the first stage that uses it."""

MPP_RANGE = (0.05, 20.0)
"""Plausible range of a slide's pixel size, in µm per level-0 pixel."""

SUMMED_BYTES = 1 << 22
"""Size in bytes of the largest slide file that `content_stamp` reads as a whole."""

END_BYTES = 1 << 16
"""Bytes that `content_stamp` reads at each end of a larger file."""

MAX_NAME_BYTES = 200
"""Longest slide name: with a suffix it must still be a valid file name."""

UNREADABLE = "NUCLEI_UNREADABLE"
"""Environment variable with the path of the file that lists the slides that could not be read when the run started."""


def could_be_read(slide: str) -> bool:
    """Whether the slide of this name could be read when the run started; False if that is not known."""
    try:
        return slide not in Path(os.environ[UNREADABLE]).read_text(encoding="utf-8").split("\n")
    except (KeyError, FileNotFoundError):
        return False


def readable(path: str | Path) -> bool:
    """Whether a file exists and may be read."""
    return os.path.isfile(path) and os.access(path, os.R_OK)


@dataclass(frozen=True)
class SlideEntry:
    """One slide of a run.

    Parameters
    ----------
    name : str
        Name of the slide, after which its results folder is named.
    path : pathlib.Path
        Absolute path of the slide; it need not exist (a missing slide fails, and the others go on).
    mpp : float or None
        Pixel size in µm, if the table states it.
    tissue, truth, regions : pathlib.Path or None
        The user's own tissue mask (GeoJSON), known nuclei (GeoJSON or label map) and annotated regions (GeoJSON).
    extra : dict of str to str
        The table's further columns.

    Raises
    ------
    PipelineError
        When the name cannot be a folder's name, or `mpp` is outside `MPP_RANGE`.
    """

    name: str
    path: Path
    mpp: float | None = None
    tissue: Path | None = None
    truth: Path | None = None
    regions: Path | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = name_problem(self.name)
        if problem:
            raise PipelineError(f"slide {self.name!r} ({str(self.path)!r}): the name {problem}", "rename the slide")
        try:
            "".join(str(one) for one in (self.path, self.tissue, self.truth, self.regions)).encode("utf-8")
        except UnicodeEncodeError:
            raise PipelineError(
                f"slide {self.name!r}: {str(self.path)!a} or another of its files is not valid UTF-8",
                "rename the folder or the file, or link it from one with a plain name",
            ) from None
        if self.mpp is not None and not MPP_RANGE[0] <= self.mpp <= MPP_RANGE[1]:
            raise PipelineError(
                f"slide {self.name!r}: mpp {self.mpp:g} is not plausible, slides have "
                f"{MPP_RANGE[0]:g} to {MPP_RANGE[1]:g} µm/px",
                "correct the table",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain JSON values."""
        files = {column: getattr(self, column) for column in FILE_COLUMNS}
        return {
            "slide": self.name,
            "path": str(self.path),
            "mpp": self.mpp,
            **{column: None if file is None else str(file) for column, file in files.items()},
            **self.extra,
        }


@dataclass(frozen=True)
class SlideTable:
    """The slides of a run in order.

    Parameters
    ----------
    entries : dict of str to SlideEntry
        The slides by name.
    columns : tuple of str
        Names of the further columns.
    left_out : str
        Other files of the folder, counted by ending, such as ``1 .qptiff, 2 .xml, 3 folder(s)``.
    """

    entries: dict[str, SlideEntry]
    columns: tuple[str, ...] = ()
    left_out: str = ""

    def __iter__(self) -> Iterator[SlideEntry]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> SlideEntry:
        return self.entries[name]

    @property
    def digest(self) -> str:
        """SHA-256 of everything the table says."""
        text = json.dumps([list(self.columns), [entry.to_json() for entry in self]], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def name_problem(name: str) -> str | None:
    """Say why `name` cannot name a slide, or return None when it can."""
    if not name:
        return "is empty"
    if name in (".", ".."):
        return "means a folder"
    for character, what in (("/", "a slash"), ("\0", "a NUL"), ("\n", "a line break"), ("\r", "a line break")):
        if character in name:
            return f"holds {what}"
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    folder = folder_name(name)
    if max(size, len(folder.encode())) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes" + (f", as the folder {folder!r}" if folder != name else "")
    # Snakemake takes such a name for an endless recursion. The count avoids the search for most names.
    if folder.count(folder[-1]) >= 20 and (found := re.search(r"(.+?)\1{19}$", folder)):
        return f"ends in {found[1]!r} 20 times or more"
    return None


def stem(file_name: str) -> str | None:
    """Slide name of a file, without surrounding blanks, or None if its ending is not in `SUFFIXES`.

    >>> stem("a.b .OME.TIFF"), stem("readme.txt")
    ('a.b', None)
    """
    lower = file_name.lower()
    for suffix in SUFFIXES:
        if lower.endswith(suffix) and (name := file_name[: -len(suffix)].strip()):
            return name
    return None


@functools.cache
def _sizes(folder: Path) -> dict[str, int]:
    try:
        with os.scandir(folder) as found:
            return {file.name: file.stat().st_size for file in found if file.is_file()}
    except OSError:
        return {}


def slide_bytes(path: Path, alone: bool = True) -> int:
    """Total size of a slide's files in bytes, found by their names; no file is opened.

    Parameters
    ----------
    path : pathlib.Path
        The slide's main file; the size is 0 if it is missing.
    alone : bool
        Whether the run has no other slide in this folder. If so, all DICOM files there are counted as the slide's.
    """
    try:
        total = path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
    kind = path.suffix.lower()
    if not total or kind not in (".mrxs", ".vms", ".vmu", ".dcm"):
        return total
    if kind == ".mrxs":  # the pixels are in a folder of the same name
        return total + sum(_sizes(path.with_suffix("")).values())
    beside = {name: size for name, size in _sizes(path.parent).items() if name != path.name}
    if kind == ".dcm":
        return total + (sum(size for name, size in beside.items() if name.lower().endswith(kind)) if alone else 0)
    # Hamamatsu: NAME.jpg or .ngr, NAME(1,0).jpg, NAME_map2.jpg, NAME.opt
    return total + sum(
        size for name, size in beside.items() if name.startswith(tuple(path.stem + mark for mark in "._("))
    )


def content_stamp(path: Path) -> list[int]:
    """Return the size of a slide's files and a checksum of its main file, as a stamp of their content.

    Size alone is not enough: uncompressed formats have the same size whatever they hold, and so has a file for which a
    copy reserves space before it writes. Of a large file only the ends are read, as this runs while a run is planned.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= SUMMED_BYTES:
            content = file.read()
        else:
            content = file.read(END_BYTES)
            file.seek(size - END_BYTES)
            content += file.read(END_BYTES)
    # Other DICOM files in the folder are not counted: the stamp would change with each slide that is added there.
    return [slide_bytes(path, alone=False), zlib.crc32(content)]


def _add(found: dict[str, SlideEntry], entry: SlideEntry, where: str) -> None:
    """Add a slide to `found`, by the name of its results folder; refuse a second one of that name."""
    other = found.setdefault(folder_name(entry.name), entry)
    if other is not entry:
        raise PipelineError(
            f"{where}: two slides are called {entry.name!r}: {str(other.path)!r} and {str(entry.path)!r}",
            "give each a name of its own in a slide table",
        )


def _by_name(found: dict[str, SlideEntry]) -> dict[str, SlideEntry]:
    return {entry.name: entry for entry in found.values()}


# The header of each DICOM file has the UIDs of study and series side by side.
_DICOM_SERIES = re.compile(
    rb"\x20\x00\x0d\x00(?:UI..|..\0\0)[0-9.]+[\0 ]?\x20\x00\x0e\x00(?:UI..|..\0\0)([0-9.]+)", re.DOTALL
)


def _dicom_series(path: Path) -> tuple[bytes, ...]:
    """UIDs of all series that the start of a DICOM file names, including its own; empty if there are none."""
    try:
        if not path.is_file():
            return ()
        with path.open("rb") as file:
            return tuple(_DICOM_SERIES.findall(file.read(1 << 16)))
    except OSError:  # the stage that reads the file reports it
        return ()


def from_folder(folder: Path) -> SlideTable:
    """Return the slides of a folder, sorted by file name, without hidden files and files with other endings.

    Further files of a slide that consists of several are left out as well: all but the first of a DICOM series, and the
    images that belong to a ``.vms`` or ``.vmu``. `SlideTable.left_out` counts the other files and folders.

    Raises
    ------
    PipelineError
        When the folder cannot be listed, holds no slide, or two slides have the same stem.
    """
    try:
        with os.scandir(folder) as listed:
            folders = {file.name: file.is_dir() for file in listed}
    except OSError as error:
        raise PipelineError(f"slides: cannot list {str(folder)!r}: {error.strerror}", "check the folder") from None
    names = sorted(name for name in folders if not name.startswith("."))
    hamamatsu = [name[:-4] for name in names if name.lower().endswith((".vms", ".vmu"))]
    pictures = tuple(f"{slide}{mark}" for slide in hamamatsu for mark in "._(")
    found: dict[str, SlideEntry] = {}
    series: set[tuple[bytes, ...]] = set()
    others: Counter[str] = Counter()
    for name in names:
        slide, lower = stem(name), name.lower()
        if name.startswith(pictures) and (slide is None or lower.endswith((".jpg", ".jpeg"))):
            continue
        if slide is None:
            if f"{name}.mrxs" not in folders:  # else the folder has the pixels of that slide
                others["folder(s)" if folders[name] else Path(lower).suffix or "without an ending"] += 1
            continue
        if lower.endswith(".dcm") and (own := _dicom_series(folder / name)):
            if own in series:
                continue
            series.add(own)
        _add(found, SlideEntry(slide, folder / name), f"slides folder {str(folder)!r}")
    if not found:
        raise PipelineError(
            f"slides: no slide in folder {str(folder)!r}",
            f"slides end in {' '.join(sorted(set(SUFFIXES)))}; sub-folders are not searched",
        )
    return SlideTable(_by_name(found), left_out=", ".join(f"{n} {what}" for what, n in sorted(others.items())))


def _delimiter(table: Path, header: str) -> str:
    """Return the separator of a table's columns; `header` is its first line."""
    if table.suffix.lower() != ".csv":
        return "\t"
    # Spreadsheets write semicolons in locales where the decimal mark is a comma.
    return ";" if header.count(";") > header.count(",") else ","


def _lines(table: Path, where: str) -> list[tuple[int, list[str]]]:
    """Return line number and cells of each line that is not blank, without empty cells at the line's end."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=_delimiter(table, stream.readline()), strict=True)
            stream.seek(0)
            lines = [
                (reader.line_num, cells[:filled])
                for cells in reader
                if (filled := max((number for number, cell in enumerate(cells, 1) if cell.strip()), default=0))
            ]
    except OSError as error:
        raise PipelineError(f"slides: cannot read {str(table)!r}: {error.strerror}", "check the file") from None
    except UnicodeDecodeError:
        raise PipelineError(
            f"{where} is not UTF-8 text", "give a folder, a slide, or a table saved as UTF-8 text (.tsv, .csv)"
        ) from None
    except csv.Error as error:
        raise PipelineError(
            f"{where}, line {reader.line_num} cannot be parsed: {error}", "quotes in a quoted cell are written twice"
        ) from None
    if not lines:
        raise PipelineError(f"{where} is empty", "its first line names the columns: slide, path, ...")
    return lines


def _check_header(header: Sequence[str], where: str) -> None:
    for column in header:
        if column not in OWN_COLUMNS and column.lower() in OWN_COLUMNS:
            raise PipelineError(f"{where}: column {column!r} is not read", f"write it {column.lower()!r}")
    for column in ("slide", "path"):
        if column not in header:
            raise PipelineError(
                f"{where} has no column {column!r}, only {', '.join(map(repr, header))}",
                "columns are separated by tabs, or by commas or semicolons in a .csv",
            )
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice or "" in header:
        problem = f"column {twice[0]!r} is there twice" if twice else f"column {header.index('') + 1} has no name"
        raise PipelineError(f"{where}: {problem}", "give each column a name of its own, or take it out")


def _place(cell: str, base: Path) -> Path:
    """Return the absolute path that a table's cell names; relative ones start at the table's folder `base`."""
    if cell.startswith("~/"):
        cell = os.path.expanduser(cell)
    # Surrounding blanks hardly ever belong to a file's name, but they may.
    path, stripped = (Path(os.path.abspath(base / text)) for text in (cell, cell.strip()))
    return stripped if stripped.exists() and not path.exists() else path


def _entry(row: dict[str, str], base: Path) -> SlideEntry:
    """Return the slide that a table's row describes; `base` is the table's folder."""
    if not row["path"].strip():
        raise PipelineError("no path", "name the slide's file")
    try:
        mpp = float(row["mpp"].replace(",", ".")) if row.get("mpp", "").strip() else None
    except ValueError:
        raise PipelineError(f"mpp is not a number: {row['mpp']!r}", "µm per pixel, such as 0.25") from None
    files = {column: _place(row[column], base) for column in FILE_COLUMNS if row.get(column, "").strip()}
    # An invisible blank from a spreadsheet would make another slide, or another group. `csv` does not quote a lone CR.
    extra = {
        column: cell.strip().replace("\r\n", "\n").replace("\r", "\n")
        for column, cell in row.items()
        if column not in OWN_COLUMNS
    }
    return SlideEntry(row["slide"].strip(), _place(row["path"], base), mpp, extra=extra, **files)


def from_table(table: Path) -> SlideTable:
    """Return the slides of a table (``.csv`` with commas or semicolons, anything else with tabs).

    Relative paths start at the table's folder.

    Raises
    ------
    PipelineError
        When the table cannot be read, lacks a column, or a row is wrong; the message names the line.
    """
    where = f"slide table {str(table)!r}"
    (_, first), *rows = _lines(table, where)
    header = [cell.strip() for cell in first]
    _check_header(header, where)
    base = Path(os.path.abspath(table.parent))
    found: dict[str, SlideEntry] = {}
    for line, cells in rows:
        at = f"{where}, line {line}"
        if len(cells) > len(header):
            raise PipelineError(
                f"{at}: {len(cells)} cells, but {len(header)} columns",
                "name each column, or quote what holds separators",
            )
        row = dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=True))
        try:
            entry = _entry(row, base)
        except PipelineError as error:
            raise PipelineError(f"{at}: {error.reason}", error.hint) from None
        _add(found, entry, at)
    if not found:
        raise PipelineError(f"{where} lists no slide", "write a line for each below its first one")
    return SlideTable(_by_name(found), tuple(column for column in header if column not in OWN_COLUMNS))


def resolve_slides(setting: str | Path) -> SlideTable:
    """Return the slides that the setting ``slides`` stands for.

    Parameters
    ----------
    setting : str or pathlib.Path
        A folder, a table or a single slide; relative to the working directory.

    Raises
    ------
    PipelineError
        When the path does not exist, or the folder or table is wrong; one line.
    """
    path = Path(os.path.abspath(Path(setting).expanduser()))
    if path.is_dir():
        return from_folder(path)
    if path.is_file() and (name := stem(path.name)) is not None:
        return SlideTable({name: SlideEntry(name, path)})
    if not path.exists():
        raise PipelineError(
            f"slides: {str(path)!r} does not exist", "give a folder, a table or a slide: --config slides=PATH"
        )
    return from_table(path)


def _as_text(table: SlideTable) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow([*OWN_COLUMNS, *table.columns])
    for entry in table:
        row = entry.to_json()
        writer.writerow(["" if row[key] is None else row[key] for key in (*OWN_COLUMNS, *table.columns)])
    return text.getvalue()


def write_table(table: SlideTable, out: Path) -> None:
    """Write the resolved table (tsv, absolute paths). `resolve_slides` reads the same table from it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_files(out) as (staged,):
        staged.write_text(_as_text(table), encoding="utf-8", newline="")


def renew_table(table: SlideTable, out: Path) -> None:
    """Rewrite the file `out` if it exists and does not hold this table."""
    if out.is_file() and out.read_bytes() != _as_text(table).encode():
        write_table(table, out)


def check_apart(setting: str, table: SlideTable, run: RunLayout) -> None:
    """Refuse slides and further files that lie among the run's results, where the run would overwrite them.

    Parameters
    ----------
    setting : str
        The setting ``slides``.
    table : SlideTable
        The slides that it stands for.
    run : RunLayout
        The run.

    Raises
    ------
    PipelineError
        When there is such a file; one line that names the first.
    """
    real = functools.cache(os.path.realpath)
    if os.path.realpath(Path(setting).expanduser()) == real(run.slide_table):
        raise PipelineError(f"slides: {setting!r} is the table that the run itself writes", "copy it and give the copy")
    own = {os.path.join(real(run.results), "slides", folder_name(entry.name)) for entry in table}
    for entry in table:
        for column in ("path", *FILE_COLUMNS):
            file: Path | None = getattr(entry, column)
            if file is not None and real(file.parent) in own:
                raise PipelineError(
                    f"slide {entry.name!r}: its {column} {str(file)!r} is among the results that the run itself writes",
                    "copy it elsewhere and name the copy",
                )


def check_same_slides(table: SlideTable, run: RunLayout) -> None:
    """Refuse to continue a run if the slide table now states something else about slides that have results.

    Like `pipeline.batch.settings.check_same_results`, it is for results of which Snakemake has no records.

    Parameters
    ----------
    table : SlideTable
        The current slides.
    run : RunLayout
        The run, with the table that its results were made from.

    Raises
    ------
    PipelineError
        When a column of `FIRST_MANIFEST` differs; one line that names the first such slide. It may differ if only the
        folder of a file changed, if no results that depend on it exist yet, or if regions were taken out of the table.
    """
    try:
        earlier = from_table(run.slide_table).entries
    except PipelineError:
        return  # there is no readable table
    for entry in table:
        for column, stage in FIRST_MANIFEST.items() if entry.name in earlier else ():
            found = [getattr(one, column) for one in (earlier[entry.name], entry)]
            then, now = (one.name if isinstance(one, Path) else one for one in found)
            made = getattr(run.slide(entry.name), stage)
            if then != now and (column, now) != ("regions", None) and made.exists():
                was, given = ("none" if one is None else repr(one) for one in (then, now))
                raise PipelineError(
                    f"slide {entry.name!r}: {str(run.results)!r} was made with {column} {was}, not {given}, and "
                    "Snakemake has no records of it here",
                    f"delete {str(made)!r} to have it done again; or start where that run was started, with "
                    "results= as it was then",
                )


def out_of_reach(table: SlideTable, run: RunLayout) -> dict[str, Path]:
    """Find finished slides that have a file which cannot be read, for example because a file system is not mounted.

    A run does not request anything for these slides, so that they keep their results. A regions file of which
    nothing has been made yet does not count: its stage reports it.

    Parameters
    ----------
    table : SlideTable
        The slides.
    run : RunLayout
        The run with their results.

    Returns
    -------
    dict of str to pathlib.Path
        By slide name, the first file that cannot be read: the slide itself, its tissue mask, truth or regions.
    """
    found: dict[str, Path] = {}
    for entry in table:
        made = run.slide(entry.name)
        for column in ("path", *FILE_COLUMNS):
            file: Path | None = getattr(entry, column)
            manifests = made.metrics, getattr(made, FIRST_MANIFEST[column])
            if file is not None and not readable(file) and all(map(_is_ok, manifests)):
                found.setdefault(entry.name, file)
    return found


def _is_ok(manifest: Path) -> bool:
    return manifest.is_file() and bool(read_manifest(manifest)["status"] == "ok")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m pipeline slide-table``."""
    parser.add_argument("--slides", required=True, metavar="PATH", help="folder of slides, or slide table (tsv, csv)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="table to write (tsv)")


def main(args: argparse.Namespace) -> int:
    """Write the resolved slide table."""
    write_table(resolve_slides(args.slides), args.out)
    return 0
