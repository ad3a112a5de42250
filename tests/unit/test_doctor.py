"""The doctor."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cli, doctor
from pipeline.batch.settings import SHIPPED, file_sha256


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"weights")
    card = json.loads((SHIPPED / "hematoxylin" / "model.json").read_text(encoding="utf-8"))
    card |= {"name": "x", "licence": "CC0", "sha256": file_sha256(folder / "weights.safetensors")}
    (folder / "model.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def test_a_well_machine(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", f"--model={model}", f"--results={tmp_path / 'not' / 'yet'}"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["well"]
    findings = {finding["name"]: finding for finding in told["findings"]}
    assert list(findings) == [
        "python",
        "openslide",
        "tiffslide",
        "torch",
        "stain extractors",
        "libraries",
        "snakemake",
        "model",
        "disk",
        "memory",
    ]
    assert findings["openslide"]["state"] == findings["tiffslide"]["state"] == "ok"
    assert findings["model"]["detail"] == "x: 0.5 µm/px, hash matches, licence CC0"


def test_a_wrong_model_is_named_with_what_to_do(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "check_torch", lambda: doctor.Finding("torch", "ok", "quick"))
    (model / "weights.safetensors").write_bytes(b"changed")
    assert cli.main(["doctor", f"--model={model}"]) == 1
    out = capsys.readouterr().out
    assert "MISSING  model" in out
    assert "all well" not in out
    assert any(line.startswith("model: ") for line in out.splitlines())


def test_a_check_that_breaks_does_not_stop_the_others(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Finding:
        raise RuntimeError("driver is gone\nand more")

    monkeypatch.setattr(doctor, "check_torch", broken)
    findings = doctor.examine(model, model)
    (torch,) = [finding for finding in findings if finding.name == "torch"]
    assert (torch.state, torch.detail) == ("missing", "RuntimeError: driver is gone")
    assert len(findings) == 10


def test_a_gpu_is_told_with_the_model_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = SimpleNamespace(name="H0", total_memory=2**34, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    found = doctor.check_torch()
    assert found.state == "ok"
    assert found.detail.endswith("GPU: H0 (16 GiB); model=models/accurate is for GPUs")
    card.major = 3
    found = doctor.check_torch()
    assert found.state == "warning"
    assert "no code for H0 (compute capability 3.0)" in found.detail


def test_a_reader_that_opens_wrongly_is_found() -> None:
    assert doctor.check_reader("x", "tifffile", lambda _: (1, 1)).state == "missing"


def test_report_ends_well() -> None:
    assert doctor.report([doctor.Finding("a", "ok", "b")]).endswith("all well")
