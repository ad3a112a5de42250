"""A slide in parts gives what it gives as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import tiles
from pipeline.batch.parts import Part, manifest_of, read_parts
from pipeline.batch.stage import read_manifest, write_json
from pipeline.census.seams import read_survey, write_survey
from pipeline.census.worker import Block, Entry, Seam
from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.slides.synthetic import make_field, write_svs
from pipeline.stores.seal import SEAL
from pipeline.testing import digest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/hematoxylin"
TIMES = {"seconds", "peak_rss_mb", "mp_per_s", "nuclei_per_s"}


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 9))
def test_parts_share_the_work(weights: list[int], total: int) -> None:
    parts = [Part(number, total).of(weights) for number in range(1, total + 1)]
    assert [item for part in parts for item in part] == list(range(len(weights)))
    heaviest = max(weights, default=0)
    assert all(sum(weights[i] for i in part) <= sum(weights) / total + heaviest for part in parts)


def test_a_part_has_a_number_and_a_count() -> None:
    assert Part.parse("2/4") == Part(2, 4)
    for text in ("0/4", "5/4", "2", "a/b", "2/4/8", ""):
        with pytest.raises(PipelineError, match="part"):
            Part.parse(text)


def told(manifest: Path) -> dict[str, Any]:
    """What a manifest says but for times."""
    return {key: value for key, value in read_manifest(manifest).items() if key not in TIMES}


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """The model without a network, in small windows, so that there are many."""
    folder = tmp_path / "model"
    folder.mkdir()
    card = json.loads((MODEL / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(card | {"patch": 96, "overlap": 24}))
    (folder / "weights.safetensors").write_bytes((MODEL / "weights.safetensors").read_bytes())
    return folder


def test_parts_give_the_bytes_of_the_whole(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiles, "_SUPER_PIXELS", 40_000)
    rgb, _ = make_field(700, 600, 0.5, 5)
    write_svs(tmp_path / "slide.svs", rgb, 0.5)
    model = f"--model={small_model}"
    start = ["--slide=s"]
    slide = tmp_path / "slide.json"
    assert main(["inspect", *start, f"--path={tmp_path / 'slide.svs'}", f"--out={slide}"]) == 0
    tissue = [f"--{name}={tmp_path / f'tissue.{end}'}" for name, end in (("out", "json"), ("geojson", "geojson"))]
    assert main(["tissue", *start, f"--inspect={slide}", *tissue, f"--png={tmp_path / 'tissue.png'}"]) == 0
    write_json(
        tmp_path / "stain.json",
        {"status": "ok", "failure": None, "transform": {"method": "matrix", "matrix": (np.eye(3) * 0.9).tolist()}},
    )
    whole, gathered = tmp_path / "whole", tmp_path / "gathered"
    area = f"--tissue={tmp_path / 'tissue.json'}", f"--geojson={tmp_path / 'tissue.geojson'}"

    def run(stage: str, folder: Path, count: int, *options: str) -> None:
        stores = []
        for number in range(1, count + 1):
            store = folder / "parts" / f"{stage}-{number}-of-{count}.zarr"
            part = [f"--part={number}/{count}", *options, *names(stage, manifest_of(store), store)]
            assert main([stage, *start, *part]) == 0
            stores.append(str(store))
        outputs = names(stage, folder / f"{stage}.json", folder / stage)
        assert main([stage, *start, *(["--parts", *stores] if stores else []), *options, *outputs]) == 0

    def names(stage: str, manifest: Path, store: Path) -> list[str]:
        flags = {"tiles": ("out", "zarr"), "infer": ("out", "zarr-out"), "instances": ("manifest", "out")}[stage]
        return [f"--{flags[0]}={manifest}", f"--{flags[1]}={store}"]

    for folder, count in ((whole, 0), (gathered, 3)):
        run("tiles", folder, count, f"--inspect={slide}", *area, model, "--tile=128", "--workers=1")
        made = [f"--tiles={folder / 'tiles.json'}", f"--zarr={folder / 'tiles'}", f"--stain={tmp_path / 'stain.json'}"]
        run("infer", folder, count, *made, model, "--threads=1")
        maps = [f"--maps={folder / 'infer'}", f"--maps-manifest={folder / 'infer.json'}"]
        run(
            "instances", folder, count, *maps, area[1].replace("geojson", "tissue", 1), model, "--block=128", "--halo=8"
        )
    for stage in ("tiles", "infer"):
        assert digest(gathered / stage) == digest(whole / stage), stage
        assert told(gathered / f"{stage}.json") == told(whole / f"{stage}.json")
    assert (gathered / "instances").read_bytes() == (whole / "instances").read_bytes()
    assert told(gathered / "instances.json") == told(whole / "instances.json")
    assert read_manifest(whole / "instances.json")["nuclei"] > 50
    assert read_manifest(whole / "instances.json")["components_followed"] > 0
    # Each part did a share.
    parts = sorted((gathered / "parts").glob("infer-*.zarr"))
    shares = [read_manifest(manifest_of(part))["windows"] for part in parts]
    assert len(shares) == 3
    assert max(shares) < 0.6 * read_manifest(whole / "infer.json")["windows"]
    # Parts that nodes of different kinds computed do not go together.
    made = [f"--tiles={gathered / 'tiles.json'}", f"--zarr={gathered / 'tiles'}", f"--stain={tmp_path / 'stain.json'}"]
    join = [
        "infer",
        *start,
        "--parts",
        *map(str, parts),
        *made,
        model,
        *names("infer", tmp_path / "m.json", tmp_path / "m"),
    ]
    as_it_was = read_manifest(manifest_of(parts[1]))
    for change, told_of in (
        ({"device": "NVIDIA X"}, "float32 on a GPU"),
        ({"precision": "bfloat16"}, "bfloat16 on a CPU"),
    ):
        write_json(manifest_of(parts[1]), as_it_was | change)
        assert main(join) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"part 1 in float32 on a CPU, part 2 in {told_of} (set infer.precision and infer.device" in line
        assert not (tmp_path / "m").exists()
    write_json(manifest_of(parts[1]), as_it_was)
    assert main(join) == 0
    # A part that is damaged is the one that goes, to be made again.
    chunk = next(path for path in (parts[2] / "maps" / "c").rglob("*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)
    assert main(join) == 2
    assert "infer-3-of-3.zarr was damaged and has been removed" in capsys.readouterr().err
    (parts[1] / SEAL).unlink()
    assert main(join) == 2
    assert "infer-2-of-3.zarr was damaged and has been removed" in capsys.readouterr().err


def test_a_bad_part_makes_the_slide_bad(tmp_path: Path) -> None:
    failed = {"stage": "tiles", "status": "failed", "failure": {"stage": "tiles", "reason": "no luck", "hint": ""}}
    good = {"stage": "tiles", "status": "ok", "failure": None}
    for name, manifest in (("slide", good), ("tissue", good), ("1-of-2.zarr", good), ("2-of-2.zarr", failed)):
        write_json(tmp_path / f"{name}.json", manifest)
    parts = [tmp_path / "1-of-2.zarr", tmp_path / "2-of-2.zarr"]
    found = tiles.run_tiles(
        "s", tmp_path / "slide.json", tmp_path / "tissue.json", tmp_path / "t.geojson", MODEL,
        tmp_path / "tiles.json", tmp_path / "tiles.zarr", parts=parts,
    )  # fmt: skip
    assert (found["status"], found["failure"]["reason"]) == ("failed", "no luck")


def test_parts_of_something_else_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}-of-2" for number in (1, 2)]
    for number, path in enumerate(paths, start=1):
        write_json(manifest_of(path), {"status": "ok", "failure": None, "part": [number, 2], "tile": 128})
    assert [m["part"] for m in read_parts(paths, tile=128)] == [[1, 2], [2, 2]]
    for wrong in ([paths[0]], paths[::-1], [paths[0], paths[0]]):
        with pytest.raises(PipelineError, match="is not part"):
            read_parts(wrong)
    with pytest.raises(PipelineError, match="was made with tile 128, not 64"):
        read_parts(paths, tile=64)
    with pytest.raises(PipelineError, match="is missing"):
        read_parts([tmp_path / "none"])


def test_surveys_are_read_as_they_were_written(tmp_path: Path) -> None:
    random = np.random.default_rng(1)

    def side(length: int) -> np.ndarray:
        return random.integers(0, 3, length).astype(np.int32)

    seam = Seam(
        (side(5), side(5), side(3), side(3)), np.array([7, 9]), random.integers(0, 9, (2, 4)), np.array([True, False])
    )
    surveyed = [
        (Block(0, 0, 5, 3), seam, {3: Entry(str(tmp_path / "1.spool"), 0, 10), 4: Entry("x/2.spool", 10, 5)}),
        (Block(5, 0, 2, 3), None, {}),
        (Block(0, 3, 5, 3), seam, {3: Entry(str(tmp_path / "1.spool"), 15, 2)}),
    ]
    write_survey(tmp_path / "survey.npz", surveyed)
    found = list(read_survey(tmp_path))
    assert [block for block, _, _ in found] == [block for block, _, _ in surveyed]
    assert found[1][1:] == (None, {})
    for number in (0, 2):
        for name in ("first", "boxes", "done"):
            np.testing.assert_array_equal(getattr(found[number][1], name), getattr(seam, name))
        for ours, theirs in zip(found[number][1].sides, seam.sides, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    places = found[0][2]
    assert places == {3: Entry(str(tmp_path / "1.spool"), 0, 10), 4: Entry(str(tmp_path / "2.spool"), 10, 5)}
