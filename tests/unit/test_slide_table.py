"""The setting `slides`: folders and tables."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.batch import slide_table
from pipeline.batch.slide_table import (
    SlideTable,
    check_apart,
    check_same_slides,
    content_stamp,
    from_table,
    name_problem,
    resolve_slides,
    slide_bytes,
    stem,
    write_table,
)
from pipeline.errors import PipelineError
from pipeline.layout import RunLayout

HOSTILE = ("b c", "q'uo\"te", "ünï 细胞", "$(touch x)", "-dash", "a.b", "{slide}", "br{x}ce", "a,b=c", "*", "[a]", "~t")


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_folder_lists_slides_sorted_by_name_and_leaves_out_the_rest(tmp_path: Path) -> None:
    folder = touch(
        tmp_path / "s", "b.svs", "a.TIFF", ".hidden.svs", "notes.txt", "slides.tsv", "c.ome.tif", ".svs", "d.png"
    )
    (folder / "folder.svs").mkdir()  # ends in failed.tsv rather than unseen
    (folder / "plain").mkdir()
    assert list(resolve_slides(folder).entries) == ["a", "b", "c", "d", "folder"]
    assert resolve_slides(folder).left_out == "1 .tsv, 1 .txt, 1 folder(s)"


def test_what_belongs_to_a_slide_is_not_told_to_be_left_out(tmp_path: Path) -> None:
    folder = touch(tmp_path / "s", "m.mrxs", "h.vms", "h.opt", "h(1,0).jpg", "x.QPTIFF", "y.qptiff", "LICENSE")
    (folder / "m").mkdir()
    assert list(resolve_slides(folder).entries) == ["h", "m"]
    assert resolve_slides(folder).left_out == "2 .qptiff, 1 without an ending"


@pytest.mark.parametrize(
    ("file", "slide"),
    [
        ("x.svs", "x"),
        ("x.OME.TIFF", "x"),
        ("x.ome.tif", "x"),
        ("a.b.tif", "a.b"),
        ("x.ome.svs", "x.ome"),
        (" x .svs", "x"),
        ("x.txt", None),
        ("svs", None),
        (" .svs", None),
        (".ome.tif", ".ome"),
        (".tif", None),
    ],
)
def test_stem(file: str, slide: str | None) -> None:
    assert stem(file) == slide


def test_two_slides_of_one_stem_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"two slides are called 'a'.*a\.svs.*a\.tif") as caught:
        resolve_slides(touch(tmp_path / "s", "a.svs", "a.tif"))
    assert "\n" not in str(caught.value)


def test_names_that_share_a_results_folder_are_two_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="two slides are called"):
        resolve_slides(touch(tmp_path / "s", "a{b.svs", "a~7Bb.svs"))
    with pytest.raises(PipelineError, match="two slides are called"):
        resolve_slides(touch(tmp_path / "t", "a{b.svs", "a~7Bb.tif"))
    for names in (("a{b", "a~7Bb"), ("a~7Bb", "a{b")):
        rows = "".join(f"{name}\tx.svs\n" for name in names)
        with pytest.raises(PipelineError, match="two slides are called"):
            from_table(write(tmp_path / "t.tsv", f"slide\tpath\n{rows}"))


def test_no_slide_no_folder(tmp_path: Path) -> None:
    (tmp_path / "s" / "batch 1").mkdir(parents=True)
    with pytest.raises(PipelineError, match=r"no slide in folder .*sub-folders are not searched"):
        resolve_slides(touch(tmp_path / "s", "readme.txt", "batch 1/a.svs"))
    with pytest.raises(PipelineError, match="does not exist"):
        resolve_slides(tmp_path / "nix")


def test_table_paths_are_relative_to_it_and_further_columns_are_carried(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    table = write(
        folder / "t.tsv",
        "\ufeffslide\tpath\tmpp\ttruth\ttissue\tpatient\n"
        "one\tx/1.svs\t0.25\t../truth.geojson\t\tP1\n"
        "\n"
        f"two\t{tmp_path}/2.svs\t\t\tmask.geojson\n",
    )
    slides = resolve_slides(table)
    one, two = slides
    assert (one.path, one.mpp, one.truth, one.tissue) == (folder / "x/1.svs", 0.25, tmp_path / "truth.geojson", None)
    assert (two.path, two.mpp, two.truth, two.tissue) == (tmp_path / "2.svs", None, None, folder / "mask.geojson")
    assert slides.columns == ("patient",)
    assert (one.extra, two.extra) == ({"patient": "P1"}, {"patient": ""})


def test_line_breaks_in_a_further_column(tmp_path: Path) -> None:
    cells = ("a\rb", "a\r\nb", "a\nb")
    rows = "".join(f'{index}\tx.svs\t"{cell}"\n' for index, cell in enumerate(cells))
    (tmp_path / "t.tsv").write_bytes(f"slide\tpath\tnote\n{rows}".encode())
    table = from_table(tmp_path / "t.tsv")
    write_table(table, tmp_path / "out.tsv")
    assert list(from_table(tmp_path / "out.tsv")) == list(table)
    assert {entry.extra["note"] for entry in table} == {"a\nb"}


def test_blanks_around_a_path_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.svs").touch()
    (tmp_path / "b.svs ").touch()
    (tmp_path / "t.tsv").write_text("slide\tpath\na\t a.svs \nb\tb.svs \nc\tc.svs \n")
    assert [entry.path.name for entry in resolve_slides(tmp_path / "t.tsv")] == ["a.svs", "b.svs ", "c.svs "]


def test_the_home_folder_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    table = write(tmp_path / "t.tsv", "slide\tpath\ttruth\na\t~/a.svs\t~/a.geojson\nb\t~b.svs\t\n")
    a, b = from_table(table)
    assert (a.path, a.truth, b.path) == (tmp_path / "me/a.svs", tmp_path / "me/a.geojson", tmp_path / "~b.svs")


def test_csv(tmp_path: Path) -> None:
    (entry,) = from_table(write(tmp_path / "t.csv", 'slide,path\n"a,b","x, y.svs"\n'))
    assert (entry.name, entry.path.name) == ("a,b", "x, y.svs")


def test_csv_of_a_spreadsheet_whose_decimal_mark_is_a_comma(tmp_path: Path) -> None:
    text = '\ufeffslide;path;mpp;"stain, date";;\r\n"a ""b""; c ";x.svs;0,25;May ;;\r\n;;;\r\nd\u00a0;y, z.svs;0.5\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode())
    first, second = slides = from_table(tmp_path / "t.csv")
    assert (first.name, first.mpp, first.path.name) == ('a "b"; c', 0.25, "x.svs")
    assert (second.name, second.mpp, second.path.name) == ("d", 0.5, "y, z.svs")
    assert (slides.columns, first.extra) == (("stain, date",), {"stain, date": "May"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("slide\tpath\n", "lists no slide"),
        ("slide\tfile\na\tb\n", "no column 'path'"),
        ("slide,path\na,b\n", "no column 'slide'.*separated by tabs"),
        ("slide\tpath\tpath\na\tb\tc\n", "column 'path' is there twice"),
        ("slide\t\tpath\na\tb\tc\n", "column 2 has no name .*take it out"),
        ("slide\tpath\t\na\tb\tc\n", "line 2: 3 cells, but 2 columns"),
        ("Slide\tPath\na\tb\n", "column 'Slide' is not read .*write it 'slide'"),
        ("slide\tpath\na\tb\tc\n", "line 2: 3 cells, but 2 columns"),
        ("slide\tpath\na\t\n", "line 2: no path"),
        ("slide\tpath\tmpp\na\tb\t0,25 µm\n", "line 2: mpp is not a number: '0,25 µm'"),
        ("slide\tpath\n \tb\n", "line 2: .* the name is empty"),
        ("slide\tpath\tmpp\na\tb\t-1\n", "line 2: .* mpp -1 is not plausible"),
        ("slide\tpath\tmpp\na\tb\t30\n", "mpp 30 is not plausible, slides have 0.05 to 20 µm/px"),
        ("slide\tpath\tMPP\na\tb\t0.25\n", "column 'MPP' is not read .*write it 'mpp'"),
        ("slide\tpath\na\tb\nc\td\na\te\n", "line 4: two slides are called 'a'"),
        ("slide\tpath\tmpp\na\tb\tnan\n", "mpp nan is not plausible"),
        ("slide\tpath\na/b\tb\n", "line 2: .*holds a slash"),
        ("slide\tpath\n..\tb\n", "means a folder"),
        ("slide\tpath\na\tb\na\tc\n", "two slides are called 'a'"),
        ('slide\tpath\nc\td\n"a\tb\n', r"line 3 cannot be parsed: .* \(quotes .* twice\)"),
    ],
)
def test_wrong_tables_say_what_and_where_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        resolve_slides(write(tmp_path / "t.tsv", text))
    assert "\n" not in str(caught.value)
    assert "t.tsv" in str(caught.value)
    assert caught.value.hint


def test_something_else_given_as_the_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"II*\0\xff\xfe\x80")
    with pytest.raises(PipelineError, match=r"not UTF-8 text .*saved as UTF-8"):
        resolve_slides(tmp_path / "x.bin")


def test_name_problem() -> None:
    assert [name for name in HOSTILE if name_problem(name)] == []
    for name in ("", ".", "..", "a/b", "a\0b", "a\nb", "a\rb", "\udcff", "x" * 201, "é" * 101):
        assert name_problem(name), name
    # Snakemake takes these for endless loops.
    assert name_problem("a" + "0" * 20) == "ends in '0' 20 times or more"
    assert name_problem("ab" * 25) == "ends in 'ab' 20 times or more"
    assert name_problem("a" + "0" * 19) is name_problem("0" * 30 + "a" * 19) is None


def test_hostile_names_survive_a_folder_and_the_written_table(tmp_path: Path) -> None:
    slides = resolve_slides(touch(tmp_path / "s", *(f"{name}.svs" for name in HOSTILE)))
    assert set(slides.entries) == set(HOSTILE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".part-4711-slides.tsv").write_text("of a killed process")
    write_table(slides, tmp_path / "out" / "slides.tsv")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["slides.tsv"]
    assert resolve_slides(tmp_path / "out" / "slides.tsv") == slides
    assert os.listdir(tmp_path / "out") == ["slides.tsv"]


names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda n: not name_problem(n) and n == n.strip()
)
cells = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\n"), max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.dictionaries(names, cells, min_size=1, max_size=5))
def test_written_tables_read_the_same(tmp_path: Path, rows: dict[str, str]) -> None:
    lines = ["slide\tpath\tnote"]
    for name, note in rows.items():
        quoted = [f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in (name, "x.svs", note)]
        lines.append("\t".join(quoted))
    try:
        slides = from_table(write(tmp_path / "in.tsv", "\n".join(lines) + "\n"))
    except PipelineError as error:
        assert "two slides" in str(error)  # names that differ in braces alone
        return
    assert {slide.name: slide.extra["note"] for slide in slides} == {name: note.strip() for name, note in rows.items()}
    write_table(slides, tmp_path / "out.tsv")
    again = from_table(tmp_path / "out.tsv")
    assert again == slides
    assert again.digest == slides.digest


def test_a_table_of_other_slides_is_written_anew(tmp_path: Path) -> None:
    table, out = resolve_slides(touch(tmp_path / "s", "a.svs", "ü b.svs")), tmp_path / "slides.tsv"
    slide_table.renew_table(table, out)
    assert not out.exists()
    write_table(table, out)
    os.utime(out, (1, 1))
    slide_table.renew_table(table, out)
    assert out.stat().st_mtime == 1
    for other in (b"slide\tpath\na\ta.svs\n", b"\xff"):
        out.write_bytes(other)
        slide_table.renew_table(table, out)
        assert resolve_slides(out).digest == table.digest


def test_files_that_the_run_writes_are_no_input(tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(touch(tmp_path / "out"))
    for results in (tmp_path / "out", tmp_path / "linked"):
        run = RunLayout(results)
        own = RunLayout(tmp_path / "out").slide("a{b}")
        for column, file in (("path", own.root / "a.svs"), ("tissue", own.tissue_geojson), ("truth", own.nuclei)):
            cells = {"path": "a.svs", column: str(file)}
            line = "\t".join(cells)
            table = from_table(write(tmp_path / "t.tsv", f"slide\t{line}\na{{b}}\t" + "\t".join(cells.values())))
            with pytest.raises(PipelineError, match=rf"'a{{b}}': its {column} .* is among the results .*copy it") as e:
                check_apart(str(tmp_path / "t.tsv"), table, run)
            assert "\n" not in str(e.value)
        write_table(from_table(write(tmp_path / "t.tsv", "slide\tpath\na{b}\ta.svs\n")), run.slide_table)
        table = resolve_slides(run.slide_table)
        with pytest.raises(PipelineError, match=r"slides: '.*' is the table that the run itself writes \(copy it"):
            check_apart(str(run.slide_table), table, run)
        # What another run has made, and what lies beside slides' folders, as where results=. has slides/a.svs.
        check_apart(str(run.slide_table), table, RunLayout(tmp_path / "other"))
        beside = from_table(write(tmp_path / "t.tsv", f"slide\tpath\na{{b}}\t{results}/slides/a.svs\n"))
        check_apart(str(tmp_path / "t.tsv"), beside, run)


@pytest.mark.parametrize(
    ("column", "then", "now", "refused"),
    [
        ("mpp", "", "0.5", "mpp none, not 0.5"),
        ("mpp", "0.25", "0.50", "mpp 0.25, not 0.5"),
        ("mpp", "0.25", "0.250", None),
        ("path", "x/a.svs", "y/a.svs", None),
        ("path", "a.svs", "b.svs", "path 'a.svs', not 'b.svs'"),
        ("tissue", "", "a.geojson", "tissue none, not 'a.geojson'"),
        ("truth", "a.npy", "", "truth 'a.npy', not none"),
        ("truth", "x/a.npy", "y/a.npy", None),
        ("regions", "a.geojson", "b.geojson", "regions 'a.geojson', not 'b.geojson'"),
        ("regions", "", "b.geojson", None),  # they are made
        ("regions", "b.geojson", "", None),  # their tables go
        ("group", "A", "B", None),
    ],
)
def test_results_of_a_slide_that_the_table_tells_something_else_of_are_refused(
    tmp_path: Path, column: str, then: str, now: str, refused: str | None
) -> None:
    def table(value: str) -> SlideTable:
        cells = {"path": "a.svs", column: value}
        rows = (f"{name}\t" + "\t".join(cells.values()) for name in ("new", "a b"))
        return from_table(write(tmp_path / "t.tsv", "\n".join(["slide\t" + "\t".join(cells), *rows]) + "\n"))

    run = RunLayout(tmp_path / "out")
    check_same_slides(table(now), run)  # there is no table
    write_table(table(then), run.slide_table)
    check_same_slides(table(now), run)  # nor are there results
    run.slide("a b").root.mkdir(parents=True)
    for stage in {*slide_table.FIRST_MANIFEST.values()} - ({"regions"} if then == "" else set()):
        getattr(run.slide("a b"), stage).touch()
    if refused is None:
        check_same_slides(table(now), run)
    else:
        made = getattr(run.slide("a b"), slide_table.FIRST_MANIFEST[column])
        told = rf"^slide 'a b': .*out' was made with {refused}, and .*delete '{made}'"
        with pytest.raises(PipelineError, match=told) as e:
            check_same_slides(table(now), run)
        assert "\n" not in str(e.value)
        made.unlink()
        check_same_slides(table(now), run)
    run.slide_table.write_bytes(b"\xff")
    check_same_slides(table(now), run)


def test_digest_tells_tables_apart(tmp_path: Path) -> None:
    digests = set()
    for text in (
        "slide\tpath\na\tb\n",
        "slide\tpath\na\tc\n",
        "slide\tpath\tmpp\na\tb\t1\n",
        "slide\tpath\tx\na\tb\t\n",
    ):
        slides: SlideTable = from_table(write(tmp_path / "t.tsv", text))
        digests.add(slides.digest)
    assert len(digests) == 4


def test_a_single_slide(tmp_path: Path) -> None:
    (tmp_path / "b 1.ome.tiff").write_bytes(b"II*")
    table = resolve_slides(tmp_path / "b 1.ome.tiff")
    assert [(slide.name, slide.path) for slide in table] == [("b 1", tmp_path / "b 1.ome.tiff")]


def dicom(series: str, implicit: bool = False) -> bytes:
    """The beginning of a DICOM file up to its series, by explicit or implicit value representation."""

    def element(tag: bytes, value: str) -> bytes:
        data = value.encode() + b"\0" * (len(value) % 2)
        return tag + (struct.pack("<I", len(data)) if implicit else b"UI" + struct.pack("<H", len(data))) + data

    return bytes(128) + b"DICM" + element(b"\x20\0\x0d\0", "1.2.3") + element(b"\x20\0\x0e\0", series) + b"\x20\0"


@pytest.mark.parametrize("implicit", [False, True])
def test_the_files_of_a_dicom_series_are_one_slide(tmp_path: Path, implicit: bool) -> None:
    folder = touch(tmp_path / "s", "no series.dcm", "nor here.dcm")
    for name, series in (("b.dcm", "1.2.10"), ("a.DCM", "1.2.10"), ("c.dcm", "1.2.1"), ("d.dcm", "1.2.100")):
        (folder / name).write_bytes(dicom(series, implicit))
    assert list(resolve_slides(folder).entries) == ["a", "c", "d", "no series", "nor here"]


def test_pictures_of_a_hamamatsu_slide_are_none_of_their_own(tmp_path: Path) -> None:
    parts = ("a 1.vms", "a 1.jpg", "a 1(1,0).jpg", "a 1_map2.jpg", "a 1_macro.jpg", "a 1.opt")
    folder = touch(tmp_path / "s", *parts, "a 12.jpg", "a 1 b.png", "b.tif")
    assert list(resolve_slides(folder).entries) == ["a 1 b", "a 1", "a 12", "b"]


def test_size_of_slides_in_several_files(tmp_path: Path) -> None:
    def sized(name: str, size: int) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
        return path

    svs, other = sized("a.svs", 5), sized("a.jpg", 100)
    mirax, _, _ = sized("m/a.MRXS", 1), sized("m/a/Data0000.dat", 10), sized("m/a/Data0001.dat", 20)
    vms, *_ = sized("v/a b.vms", 1), sized("v/a b.jpg", 10), sized("v/a b(1,0).jpg", 20), sized("v/a b_map2.jpg", 30)
    sized("v/other.jpg", 500)
    sized("v/a b2.jpg", 500)  # of a slide whose name begins alike
    dicom, *_ = sized("d/1.dcm", 1), sized("d/2.DCM", 10), sized("d/notes.txt", 500)
    assert [slide_bytes(path) for path in (svs, other, mirax, vms, dicom)] == [5, 100, 31, 61, 11]
    assert slide_bytes(dicom, alone=False) == 1
    assert [slide_bytes(tmp_path / name) for name in ("none.svs", "none.mrxs", "m", "a.svs/b.svs")] == [0, 0, 0, 0]


def test_stamp_tells_contents_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = tmp_path / "a.npy"
    found = []
    for content in (b"ab", b"cd", b"ab", b"abc"):
        truth.write_bytes(content)
        found.append(content_stamp(truth))
    first, second, same, longer = found
    assert first == same
    assert first != second
    assert longer not in (first, second)
    mirax = [tmp_path / "b.mrxs", tmp_path / "c.mrxs"]
    for size, path in enumerate(mirax):
        path.write_bytes(b"x")
        path.with_suffix("").mkdir()
        (path.with_suffix("") / "Data0000.dat").write_bytes(bytes(size))
    assert content_stamp(mirax[0]) != content_stamp(mirax[1])
    monkeypatch.setattr(slide_table, "SUMMED_BYTES", 4)
    monkeypatch.setattr(slide_table, "END_BYTES", 2)
    large = []
    for content in (b"abcde", b"abcd\0", b"\0bcde", b"ab\0de"):
        truth.write_bytes(content)
        large.append(content_stamp(truth))
    assert len({tuple(stamp) for stamp in large}) == 3  # not what differs in the middle
    assert large[0] == large[3]
