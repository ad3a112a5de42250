"""Hostile names and contents: nothing in them is run, leaves the results folder, or gets to browser or spreadsheet."""

from __future__ import annotations

import csv
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from alone import alone
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import ROOT, run

from pipeline.batch.slide_table import SlideEntry, resolve_slides
from pipeline.cohort import run_cohort
from pipeline.errors import PipelineError
from pipeline.exchange.label_maps import load_npy
from pipeline.layout import RunLayout
from pipeline.slides.inspect import run_inspect
from pipeline.slides.synthetic import make_field
from pipeline.testing import write_failed_slide
from pipeline.training.annotations import read_imagescope_xml


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "name", ["../../evil", "..", "/etc/passwd", "a/../../b", ".", "", "a\nb", "a\0b", "x" * 300, "a/b"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    table = tmp_path / "slides.tsv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter="\t").writerows([["slide", "path"], [name, "a.svs"]])
    with pytest.raises(PipelineError) as error:
        resolve_slides(table)
    assert "\n" not in str(error.value)


@settings(max_examples=300)
@given(name=st.one_of(st.text(max_size=30), st.text("./\\~${}\0 \n-ab", max_size=12)))
@example(name="~ $HOME {a} <b> 'c' \"d\" \\e -f;g|h&i`j`.svs")
def test_whatever_name_passes_stays_below_the_results(name: str) -> None:
    try:
        entry = SlideEntry(name, Path("/in/a.svs"))
    except PipelineError as error:
        assert "\n" not in str(error)
        assert not name.startswith("~ $HOME")  # odd is not bad
        return
    root = Path("/r/results")
    for path in (RunLayout(root).slide(entry.name).metrics, RunLayout(root).log("tiles", entry.name)):
        inside = Path(os.path.normpath(path))
        assert inside.parts[: len(root.parts)] == root.parts
        assert len(inside.parts) == len(path.parts)


BOMB = '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {b} "{10 * f"&{a};"}">' for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize("body", ["<OME>&k;</OME>", '<OME xmlns="x"><Image><Pixels SizeX="&k;"/></Image></OME>'])
def test_xml_bomb_in_a_slide(tmp_path: Path, body: str) -> None:
    rgb, _ = make_field(300, 260, 0.5, 1)
    path = tmp_path / "bomb.ome.tif"
    tifffile.imwrite(path, rgb, tile=(256, 256), photometric="rgb", description=BOMB + "]>" + body, metadata=None)
    record = alone(run_inspect, "s", path, tmp_path / "slide.json", mpp=0.5, minutes=1)
    # Ten billion times "ha" were 20 GB: the text is left alone or refused.
    assert record["peak_rss_mb"] < 400
    assert record["seconds"] < 50


@pytest.mark.parametrize("layer", ["<Annotation>&k;</Annotation>", '<Annotation Name="&k;"/>'])
def test_xml_bomb_in_annotations(tmp_path: Path, layer: str) -> None:
    body = f"<Annotations>{layer}</Annotations>"
    (tmp_path / "a.xml").write_text(BOMB + "]>" + body)
    with pytest.raises(PipelineError, match="EntitiesForbidden") as error:
        read_imagescope_xml(tmp_path / "a.xml")
    assert "\n" not in str(error.value)
    (tmp_path / "a.xml").write_text(body.replace("&k;", "ha"))
    assert read_imagescope_xml(tmp_path / "a.xml") == []


@pytest.mark.workflow
def test_yaml_tags_in_settings_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "evil.yaml").write_text(f"results: !!python/object/apply:os.mkdir ['{mark}']\n")
    done = run(tmp_path, {"slides": "in"}, "-n", "--configfile", str(tmp_path / "evil.yaml"))
    assert done.code != 0
    assert "Config file is not valid" in done.output
    assert not mark.exists()


def test_yaml_tags_in_experiments_are_not_run(tmp_path: Path) -> None:
    from pipeline.batch.settings import load_schema
    from pipeline.training.plan import plan_compare

    mark = tmp_path / "mark"
    (tmp_path / "evil.yaml").write_text(f"network: !!python/object/apply:os.mkdir ['{mark}']\n")
    schema = load_schema(ROOT / "workflow/schemas/config.schema.yaml")["properties"]["train"]
    section = {"name": "c", "experiments": ["evil"], "common": {}}
    with pytest.raises(PipelineError) as error:
        plan_compare(section, [tmp_path], schema)
    assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, over a checkpoint as old torch wrote them
def test_pickles_are_not_run(tmp_path: Path) -> None:
    import torch

    from pipeline.models.package import ModelPackage
    from pipeline.models.weights import load_network
    from pipeline.networks.encoders import read_state
    from pipeline.training.trainer import read_checkpoint

    mark = tmp_path / "mark"
    np.save(tmp_path / "a.npy", np.array(Payload(mark), dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", a=np.array(Payload(mark), dtype=object))
    torch.save({"state_dict": Payload(mark)}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Payload(mark)))
    folder = tmp_path / "model"
    folder.mkdir()
    card = (ROOT / "models/default/model.json").read_text()
    (folder / "model.json").write_text(card)
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    for read in (
        lambda: load_npy(tmp_path / "a.npy"),
        lambda: read_state(tmp_path / "a.npz"),
        lambda: read_state(tmp_path / "a.ckpt"),
        lambda: read_checkpoint(tmp_path / "a.ckpt"),
        lambda: read_checkpoint(tmp_path / "b.ckpt"),
        lambda: load_network(ModelPackage.load(folder)),
        lambda: ModelPackage.load(folder, verify=True),
    ):
        with pytest.raises(PipelineError) as error:
            read()
        assert "\n" not in str(error.value)
    assert not mark.exists()
    with pytest.raises(FileExistsError):  # the payload works
        mark.mkdir()
        pickle.loads((tmp_path / "b.ckpt").read_bytes())


UNSAFE = re.compile(
    r"allow_pickle=True|yaml\.(load|full_load|unsafe_load)\(|pickle\.load\(|(?<!\.)\beval\(|\bexec\(|os\.system|shell=True|"
    r"xml\.etree|weights_only=False|np\.load\((?![^)]*allow_pickle=False)|torch\.load\((?![^)]*weights_only=True)"
)


def test_nothing_unsafe_is_called() -> None:
    sources = sorted((ROOT / "pipeline").rglob("*.py"))
    assert len(sources) > 80
    found = [f"{path.name}: {hit[0]}" for path in sources for hit in UNSAFE.finditer(path.read_text(encoding="utf-8"))]
    assert found == []


NAMES = ["<img src=x onerror=alert(1)>", '=HYPERLINK("http;x")', "+1+1", "@SUM(A1)", "-2+3", "'><svg onload=x>"]


def test_report_and_tables_hold_names_as_text(tmp_path: Path) -> None:
    results = tmp_path / "results"
    layout = RunLayout(results)
    results.mkdir()
    with layout.slide_table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(["slide", "path", "note"])
        writer.writerows([[name, f"/in/{number}.svs", "=cmd|' /C calc'!A0"] for number, name in enumerate(NAMES)])
    for name in NAMES:
        write_failed_slide(results, name, "inspect", f"=1+1 <b>{name}</b>", "@x")
    names = ("tsv", "parquet", "failed", "report", "manifest", "regions_tsv", "regions_parquet")
    out = {name: tmp_path / f"{name}.out" for name in names}
    run_cohort(results, layout.slide_table, **out)
    page = out["report"].read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "<svg onload" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    with out["failed"].open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert len(rows) == len(NAMES)
    for row in rows:
        for cell in row.values():
            assert cell.lstrip()[:1] not in ("=", "+", "-", "@"), cell
