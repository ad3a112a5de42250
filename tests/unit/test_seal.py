"""Damage to stores between the stages is found, and what is damaged goes, to be made again."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.batch.again import NOTES, clear_marks
from pipeline.batch.parts import link_chunks
from pipeline.batch.stage import clear_finished, clear_remains, run_stage
from pipeline.errors import DamagedStore, PipelineError, SlideError
from pipeline.stores import seal
from pipeline.stores.grid import Grid
from pipeline.stores.maps import MapStore
from pipeline.stores.seal import SEAL, check_seal
from pipeline.stores.tile_store import TileStore, create_tiles

GRID = Grid(640, 320, 0.5, 1.0, 1.0)


def tiles(path: Path) -> None:
    active = np.ones((5, 10), bool)
    create_tiles(path, GRID, active, 64)[...] = np.random.default_rng(0).integers(0, 255, (320, 640, 3), np.uint8)


def maps(path: Path) -> None:
    store = MapStore.create(path, GRID, ("nucleus", "distance"), np.ones((5, 10), bool), (64, 64))
    store.array[...] = np.random.default_rng(0).integers(0, 255, (2, 320, 640), np.uint8)


def read_tiles(path: Path) -> np.ndarray:
    return TileStore.open(path).read(0, 0, 640, 320)


def read_maps(path: Path) -> np.ndarray:
    return MapStore.open(path).read(0, 0, 640, 320)


KINDS = {"tiles": (tiles, read_tiles, "rgb/c/2/3/0"), "maps": (maps, read_maps, "maps/c/0/2/3")}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], np.ndarray], str]:
    """A store as a stage writes it, how to read it, and one of its chunks."""
    write, read, chunk = KINDS[request.param]

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        write(staged["store"])
        return {}

    path = tmp_path / f"{request.param}.zarr"
    run_stage(request.param, "a", manifest=tmp_path / "made.json", outputs={"store": path}, body=body)
    assert read(path).any()
    return path, read, chunk


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x10
    path.write_bytes(data)


def test_every_flipped_byte_is_found(store: tuple[Path, Callable[[Path], np.ndarray], str]) -> None:
    path, read, chunk = store
    whole = read(path)
    rng = np.random.default_rng(1)
    for name in (chunk, SEAL, "zarr.json", "active/zarr.json", "active/c/0/0"):
        file = path / name
        data = file.read_bytes()
        for at in (0, 4, 16, len(data) - 1, *rng.integers(0, len(data), 12).tolist()):
            flip(file, at)
            with pytest.raises(DamagedStore, match="is damaged"):
                read(path)
            file.write_bytes(data)
    assert np.array_equal(read(path), whole)


def test_files_of_parts_that_no_other_checksum_covers(tmp_path: Path) -> None:
    def body(staged: dict[str, Path]) -> dict[str, Any]:
        import zarr

        zarr.create_group(staged["store"]).create_array("sums", data=np.arange(12, dtype=np.uint32))
        np.savez(staged["store"] / "survey.npz", blocks=np.arange(9))
        (staged["store"] / "4711.spool").write_bytes(bytes(3_000_000))
        return {}

    path = tmp_path / "instances-1-of-2.zarr"
    run_stage("instances", "a", manifest=tmp_path / "part.json", outputs={"store": path}, body=body)
    for file in (path / "survey.npz", path / "4711.spool", path / "sums/c/0"):
        check_seal(path)
        data = file.read_bytes()
        for at in (0, len(data) // 2, len(data) - 1):
            flip(file, at)
            with pytest.raises(DamagedStore, match=f"{file.name} is not what was written"):
                check_seal(path)
            file.write_bytes(data)


def test_missing_and_cut_chunks_are_found(store: tuple[Path, Callable[[Path], np.ndarray], str]) -> None:
    path, read, chunk = store
    file = path / chunk
    data = file.read_bytes()
    for part in (data[:-1], data[: len(data) // 2], b"", bytes(len(data))):
        file.write_bytes(part)
        with pytest.raises(DamagedStore):
            read(path)
    file.unlink()
    with pytest.raises(DamagedStore, match=f"1 of its [0-9]+ files are missing, the first: {chunk}"):
        read(path)


def test_the_stage_that_finds_out_removes_it(
    store: tuple[Path, Callable[[Path], np.ndarray], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, chunk = store
    flip(path / chunk, 9)
    monkeypatch.setenv(NOTES, str(path.parent / "notes"))
    with pytest.raises(
        PipelineError, match=r"slide 'a', next: .* was damaged and has been removed: .*made again\)"
    ) as e:
        run_stage("next", "a", manifest=path.parent / "next.json", body=lambda staged: {"sum": int(read(path).sum())})
    assert "\n" not in str(e.value)
    assert [file.name for file in path.iterdir()] == ["DAMAGED.txt"]
    assert not (path.parent / "next.json").exists()
    assert (path.parent / "notes").read_text() == f"{path}\n"

    def never(staged: dict[str, Path]) -> dict[str, Any]:
        raise AssertionError

    # Tried again, the job ends at once; the stage that made the store makes it again.
    with pytest.raises(PipelineError, match=r"slide 'a', next: .* was damaged \(run the same command again"):
        run_stage("next", "a", manifest=path.parent / "next.json", body=never, stores={path: path.parent / "made.json"})

    assert (path.parent / "notes").read_text() == f"{path}\n" * 2  # the first line may have been lost

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        KINDS[path.stem][0](staged["store"])
        return {}

    run_stage(path.stem, "a", manifest=path.parent / "made.json", outputs={"store": path}, body=body)
    assert read(path).any()
    clear_marks(path.parent / "notes")
    assert read(path).any()
    assert not (path.parent / "notes").exists()


def test_without_a_run_the_stage_that_made_it_is_what_to_run(
    store: tuple[Path, Callable[[Path], np.ndarray], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, chunk = store
    flip(path / chunk, 9)
    monkeypatch.delenv(NOTES, raising=False)
    for told in ("was damaged and has been removed: ", r"was damaged \("):
        with pytest.raises(PipelineError, match=rf"{told}.*run the stage that makes it again"):
            run_stage(
                "next", "a", manifest=path.parent / "next.json", body=lambda staged: {"sum": int(read(path).sum())},
                stores={path: path.parent / "made.json"},
            )  # fmt: skip
        path.mkdir(exist_ok=True)
        (path / "DAMAGED.txt").write_text("as a run leaves it")


@pytest.mark.parametrize("gone", [None, "chunk", SEAL, "all but one"])
def test_what_a_removal_left_of_a_store_is_told_from_a_whole_one(
    store: tuple[Path, Callable[[Path], np.ndarray], str], gone: str | None
) -> None:
    path, _, chunk = store
    made = path.parent / "made.json"
    if gone == "all but one":
        shutil.rmtree(path)
        (path / "rgb").mkdir(parents=True)
    elif gone is not None:
        (path / (chunk if gone == "chunk" else gone)).unlink()
    clear_remains(path, made)
    assert path.exists() is (gone is None)
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".part-")] == []
    clear_remains(path, made)  # nothing there is nothing to do
    tiles(path.with_name("other.zarr"))
    clear_remains(path.with_name("other.zarr"), made)  # its stage gave it no seal
    assert path.with_name("other.zarr").exists()
    clear_remains(path.with_name("other.zarr"), path.with_name("other.json"))  # removed before it was
    assert not path.with_name("other.zarr").exists()


@pytest.mark.parametrize("state", ["finished", "not finished", "finished by an earlier run", "made anew"])
def test_temporary_stores_of_a_slide_that_a_run_has_finished_are_removed(tmp_path: Path, state: str) -> None:
    stores = {tmp_path / "maps.zarr": tmp_path / "maps.json", tmp_path / "i.parquet": tmp_path / "i.json"}
    (tmp_path / "maps.zarr").mkdir()
    (tmp_path / "maps.zarr" / "chunk").write_text("pixels")
    (tmp_path / "i.parquet").write_text("nuclei")
    last = tmp_path / "metrics.json"
    for path in (*stores.values(), last):
        path.write_text("{}")
        os.utime(path, (50, 50))
    if state == "not finished":
        last.unlink()
    elif state == "made anew":
        os.utime(tmp_path / "maps.json", (60, 60))
    clear_finished(stores, [last], 55 if state == "finished by an earlier run" else 45)
    assert [path.exists() for path in stores] == [state != "finished"] * 2
    clear_finished(stores, [last], 45)  # nothing there is nothing to do


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EBUSY])
def test_a_damaged_store_of_which_files_are_open_is_noted_all_the_same(
    store: tuple[Path, Callable[[Path], np.ndarray], str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """On NFS a file that is open stays as `.nfsXXXX` when it is removed, and with it its folder."""
    path, read, chunk = store
    flip(path / chunk, 9)
    monkeypatch.setenv(NOTES, str(path.parent / "notes"))
    done = shutil.rmtree

    def leaves_open_files(folder: Path) -> None:
        done(folder)
        folder.mkdir()
        (folder / ".nfs00000002").write_text("")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shutil, "rmtree", leaves_open_files)
    with pytest.raises(PipelineError, match="was damaged and has been removed: "):
        run_stage("next", "a", manifest=path.parent / "next.json", body=lambda staged: {"sum": int(read(path).sum())})
    assert (path.parent / "notes").read_text() == f"{path}\n"
    monkeypatch.setattr(shutil, "rmtree", done)

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        KINDS[path.stem][0](staged["store"])
        return {}

    run_stage(path.stem, "a", manifest=path.parent / "made.json", outputs={"store": path}, body=body)
    assert read(path).any()
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".part-")]


@pytest.mark.parametrize("taken", ["rename", "write_text"])
def test_another_job_that_finds_the_same_damage_is_no_trouble(
    store: tuple[Path, Callable[[Path], np.ndarray], str], monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    path, read, chunk = store
    flip(path / chunk, 9)
    monkeypatch.setenv(NOTES, str(path.parent / "notes"))
    done = getattr(Path, taken)

    def after_the_other_job(self: Path, *args: Any, **options: Any) -> Any:
        if path in (self, self.parent):
            shutil.rmtree(path)
        return done(self, *args, **options)

    monkeypatch.setattr(Path, taken, after_the_other_job)
    with pytest.raises(PipelineError, match="was damaged and has been removed: "):
        run_stage("next", "a", manifest=path.parent / "next.json", body=lambda staged: {"sum": int(read(path).sum())})


@pytest.mark.parametrize(("text", "why"), [(None, "is missing"), ("{}", "is not what was written")])
def test_a_seal_that_is_gone_is_missed(
    store: tuple[Path, Callable[[Path], np.ndarray], str], text: str | None, why: str
) -> None:
    path, read, chunk = store
    made, after = path.parent / "made.json", path.parent / "next.json"

    def work(staged: dict[str, Path]) -> dict[str, Any]:
        return {"sum": int(read(path).sum())}

    whole = run_stage("next", "a", manifest=after, body=work, stores={path: made})["sum"]
    assert whole == int(read(path).sum())
    (path / SEAL).unlink()
    (path / chunk).unlink()  # which reads as white, where nobody knows of it
    if text is not None:
        (path / SEAL).write_text(text)
    with pytest.raises(PipelineError, match=rf"was damaged and has been removed: {SEAL} {why}"):
        run_stage("next", "a", manifest=after, body=work, stores={path: made})
    assert not path.exists()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", ["removed", "being removed", "replaced"])
def test_a_store_that_goes_while_it_is_read_is_missed(
    store: tuple[Path, Callable[[Path], np.ndarray], str], how: str, fails: bool
) -> None:
    """As when the job of an earlier run starts late: what it takes away would read as white."""
    path, read, chunk = store
    made, after = path.parent / "made.json", path.parent / "next.json"

    def work(staged: dict[str, Path]) -> dict[str, Any]:
        total = int(read(path).sum())
        if how == "being removed":
            (path / chunk).unlink()
        else:
            shutil.copytree(path, path.with_name("copy"))
            shutil.rmtree(path)
        if how == "replaced":
            path.with_name("copy").rename(path)
        if fails:
            raise SlideError("there is no tissue")
        return {"sum": total}

    why = "1 of its [0-9]+ files are missing" if how == "being removed" else "was taken away while it was read"
    with pytest.raises(PipelineError, match=why) as e:
        run_stage("next", "a", manifest=after, body=work, stores={path: made})
    assert not isinstance(e.value, SlideError)
    assert not after.exists()
    assert path.exists() is (how == "replaced")


def test_what_no_stage_wrote_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    maps(tmp_path / "maps.zarr")
    (tmp_path / "maps.zarr" / "maps/c/0/2/3").write_bytes(b"")
    for path in (tmp_path / "mine", tmp_path / "maps.zarr"):
        check_seal(path)
        with pytest.raises(PipelineError):
            run_stage("next", "a", manifest=tmp_path / "next.json", body=lambda staged, p=path: {"a": read_maps(p)})
        assert path.exists()


def test_the_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedStore(Path("a b/maps.zarr"), "why")))
    assert (error.path, error.why, str(error)) == (
        Path("a b/maps.zarr"),
        "why",
        "a b/maps.zarr is damaged: why (delete it and run again)",
    )


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file server that fails for a moment: no store is damaged, and none is sealed or joined without its chunks.
    store, other = tmp_path / "a.zarr", tmp_path / "b.zarr"
    for name in ("maps/c/0/0", "maps/c/1/0"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"x")
    seal.write_seal(store)
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("c/1"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    works = (seal.check_seal, seal.write_seal, lambda one: link_chunks(one, other, "maps"))
    for work in works:
        with pytest.raises(OSError, match="Input/output error"):
            work(store)
    monkeypatch.undo()
    seal.check_seal(store)
    assert list(seal.walk(tmp_path / "none")) == []
