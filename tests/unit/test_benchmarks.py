"""The benchmarks: their command, their arithmetic, and what they say of tilings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import material
from benchmarks.__main__ import main
from benchmarks.exactness import MARGIN, SIZES, WAYS, Damage, Nucleus, Tiling, damage
from benchmarks.harness import Figure, run_command, table
from pipeline.kernels.instances import InstanceRules, segment

ROOT = Path(__file__).parents[2]


def test_figures_know_their_ratio_and_target() -> None:
    half = Figure("tiles", "read", 5, "MP/s", 10, "decode", "ratio >= 0.7")
    assert (half.ratio, half.met) == (0.5, False)
    assert Figure("memory", "peak", 150, "MB", target="value <= 200").met
    assert Figure("memory", "peak", 150, "MB").met is None
    head, line = table([half]).splitlines()
    assert head.split()[:3] == ["benchmark", "what", "value"]
    assert "0.50" in line
    assert line.endswith("MISSED")


def test_a_watched_command_tells_of_its_children() -> None:
    code = """
import subprocess, sys
work = "a = bytearray(200_000_000)\\nfor i in range(0, len(a), 4096): a[i] = 1\\nsum(i * i for i in range(6_000_000))"
subprocess.run([sys.executable, "-c", work], check=True)
"""
    run = run_command([sys.executable, "-c", code])
    assert run.rss_mb > 200
    assert run.cpu > 0.1
    assert run.path <= run.cpu + 1e-6
    with pytest.raises(RuntimeError, match="ended with 3: no luck"):
        run_command([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"])


def test_damage_is_counted() -> None:
    known = np.zeros((30, 40), np.int32)
    known[2:8, 2:8], known[2:8, 20:26], known[20:26, 2:8] = 1, 2, 3

    def square(y: int, x: int, side: int = 6) -> Nucleus:
        return Nucleus(y, x, np.ones((side, side), bool))

    assert damage(known, [square(2, 2), square(2, 20), square(20, 2)]) == Damage(0, 0, 0, 0)
    assert damage(known, [square(2, 2), square(2, 2), square(2, 21), square(20, 20)]) == Damage(1, 1, 1, 1)
    assert damage(known, []) == Damage(3, 0, 0, 0)


def test_tiles_side_by_side_cut_nuclei() -> None:
    y, x = np.mgrid[:256, :256]
    inside = ((y % 32 - 16) ** 2 + (x % 32 - 16) ** 2 < 100) | ((y - 128) ** 2 + (x - 128) ** 2 < 60)
    maps = np.stack([255 * inside, 200 * inside]).astype(np.uint8)
    rules = InstanceRules(min_area=4)
    whole = segment(maps, rules)
    assert whole.max() == 65
    assert damage(whole, Tiling(maps, rules, 256).cut()) == Damage(0, 0, 0, 0)
    found = damage(whole, Tiling(maps, rules, 128).cut())  # the one in the middle falls into four pieces
    assert (found.lost, found.invented) == (1, 4)
    assert damage(whole, Tiling(maps, rules, 128).centred()) == Damage(0, 0, 0, 0)


def test_slides_and_stores_of_the_benchmarks_are_sparse(tmp_path: Path) -> None:
    field = material.Field(
        np.full((material.SIDE, material.SIDE, 3), 180, np.uint8),
        np.zeros((material.SIDE, material.SIDE), np.int32),
        np.full((2, material.SIDE, material.SIDE), 200, np.uint8),
    )
    material.write_slide(tmp_path / "slide.svs", field, 40_000, 30_000, 0.25, 0.1)
    assert (tmp_path / "slide.svs").stat().st_size < 5_000_000
    from pipeline.slides.open import open_slide

    with open_slide(tmp_path / "slide.svs") as slide:
        assert (slide.width, slide.height) == (40_000, 30_000)
        assert slide.mpp == (0.25, 0.25)
        assert slide.backend == "tiffslide", "as scanners' slides are"
        corner, middle = slide.read(0, 0, 0, 64, 64), slide.read(0, 20_000, 15_000, 64, 64)
    assert corner.min() > 235
    assert abs(float(middle.mean()) - 180) < 3


def test_the_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.json"
    assert main(["--quick", "tiles", "export", "infer-host", "seams", f"--out={out}", f"--folder={tmp_path}"]) == 0
    found = json.loads(out.read_text())
    figures = {figure["what"]: figure for figure in found["figures"]}
    ours = [figures[f"the pipeline: {what}"]["value"] for what in ("lost", "doubled", "changed", "invented")]
    assert ours == [0, 0, 0, 0]
    assert figures["tiles side by side: changed"]["value"] > 5
    assert figures["different files for different blocks"]["met"]
    assert figures["nuclei to GeoJSON"]["ratio"] > 0.2
    exact, usual = figures["slide to tiles"], figures["slide at 0.2525 µm/px to tiles"]
    assert "4096 x 4096 px JPEG at 0.25 µm/px" in exact["note"]
    assert "4096 x 4096 px JPEG at 0.2525 µm/px" in usual["note"]
    assert 0.1 < usual["ratio"] < 1
    assert 0.1 < figures["tiles to maps but the network"]["ratio"] < 1
    assert figures["by what Python does"]["value"] > figures["tiles to maps but the network"]["value"]
    assert found["environment"]["cores"] > 0
    assert "nuclei to GeoJSON" in capsys.readouterr().out
    assert not list(tmp_path.glob("benchmarks-*")), "nothing is left behind"


def test_the_table_of_seams_is_the_commands() -> None:
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8").split("## Nuclei at seams")[1].split("\n## ")[0]
    assert re.findall(r"^\| (.+?) \| [\d,]+ \|", text, re.MULTILINE) == list(WAYS)
    assert f"| | {' | '.join(vars(Damage(0, 0, 0, 0)))} |" in text
    side, tile = SIZES["full"]
    assert f"maps of {side} x {side} px, tiles of {tile} px, margins of {MARGIN} px" in " ".join(text.split())


def test_unknown_rows_are_told() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "speed"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no such benchmark: speed" in done.stderr
    assert "million" in done.stderr
