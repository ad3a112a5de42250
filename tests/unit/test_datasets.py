"""Importers of published data sets, on small files laid out as theirs are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from pipeline.errors import PipelineError
from pipeline.training.data import Field, load_fields
from pipeline.training.datasets.source import as_labels, tcga_patient

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (3, 32, 32, 3), np.uint8)


def one(kind: str, path: Path, **keys: Any) -> list[Field]:
    return load_fields([{"kind": kind, "path": str(path), **keys}])


def fails(kind: str, path: Path, reason: str, **keys: Any) -> None:
    with pytest.raises(PipelineError, match=reason) as caught:
        one(kind, path, **keys)
    assert "\n" not in str(caught.value)


def picture(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)


# --- CoNIC -----------------------------------------------------------------------------------------------------------


def write_conic(root: Path) -> Path:
    labels = np.zeros((3, 32, 32, 2), np.uint16)
    labels[:, 4:9, 4:9] = (1, 2)
    labels[:, 12:20, 4:9] = (7, 6)
    np.save(root / "images.npy", IMAGES)
    np.save(root / "labels.npy", labels)
    (root / "patch_info.csv").write_text("patch_info\nglas_12-0001\nglas_12-0002\nconsep_1-0001\n")
    return root


def test_conic(tmp_path: Path) -> None:
    fields = one("conic", write_conic(tmp_path))
    assert [f.patient for f in fields] == ["conic-glas_12", "conic-glas_12", "conic-consep_1"]
    assert fields[0].name == "conic-glas_12-0001"
    assert {f.mpp for f in fields} == {0.5}
    assert {f.organ for f in fields} == {"colon"}
    assert [f.cohort for f in fields] == ["glas", "glas", "consep"]
    np.testing.assert_array_equal(fields[1].image, IMAGES[1])
    assert set(np.unique(fields[0].labels)) == {0, 1, 7}
    assert fields[0].types is not None
    assert {fields[0].classes[i - 1] for i in np.unique(fields[0].types) if i} == {"Epithelial", "Connective"}


def test_half_a_conic_folder(tmp_path: Path) -> None:
    write_conic(tmp_path)
    (tmp_path / "patch_info.csv").write_text("patch_info\na-1\n")
    fails("conic", tmp_path, "names 1 of 3 patches")
    (tmp_path / "patch_info.csv").unlink()
    fails("conic", tmp_path, r"patch_info\.csv is missing .*leak")
    np.save(tmp_path / "labels.npy", np.zeros((2, 32, 32, 2), int))
    fails("conic", tmp_path, "holds 2 patches, its images are 3")
    np.save(tmp_path / "labels.npy", np.zeros((3, 32, 32), int))
    fails("conic", tmp_path, r"holds \(3, 32, 32\), not \(N, H, W, 2\)")
    np.save(tmp_path / "labels.npy", np.array([None, {}], object), allow_pickle=True)
    fails("conic", tmp_path, "array of Python objects")
    (tmp_path / "labels.npy").write_bytes((tmp_path / "images.npy").read_bytes()[:1000])
    fails("conic", tmp_path, r"labels\.npy cannot be read")
    (tmp_path / "labels.npy").unlink()
    fails("conic", tmp_path, r"labels\.npy is missing")


def test_conic_with_an_unknown_class(tmp_path: Path) -> None:
    write_conic(tmp_path)
    labels = np.load(tmp_path / "labels.npy")
    labels[0, 4:9, 4:9, 1] = 9
    np.save(tmp_path / "labels.npy", labels)
    fails("conic", tmp_path, "has class 9 .*1 to 6")


# --- PanNuke ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["published", "flat"])
def test_pannuke(tmp_path: Path, layout: str) -> None:
    for fold in (1, 2):
        images = tmp_path / (f"Fold {fold}/images/fold{fold}" if layout == "published" else f"fold{fold}")
        masks = tmp_path / (f"Fold {fold}/masks/fold{fold}" if layout == "published" else f"fold{fold}")
        images.mkdir(parents=True)
        masks.mkdir(parents=True, exist_ok=True)
        stack = np.zeros((3, 32, 32, 6))
        stack[:, 4:9, 4:9, 0] = 3
        stack[:, 4:9, 20:25, 0] = 12
        stack[:, 8:14, 4:9, 4] = 3  # its number again in another channel, and one row of overlap
        np.save(images / "images.npy", IMAGES.astype(np.float64))
        np.save(images / "types.npy", np.array(["Breast", "Bile-duct", "Breast"]))
        np.save(masks / "masks.npy", stack)
    fields = one("pannuke", tmp_path)
    assert len(fields) == 6
    assert {f.patient for f in fields} == {"pannuke-fold1", "pannuke-fold2"}
    assert [f.organ for f in fields[:3]] == ["breast", "bile-duct", "breast"]
    np.testing.assert_array_equal(fields[2].image, IMAGES[2])
    labels, types = fields[0].labels, fields[0].types
    assert types is not None
    assert len(np.unique(labels)) == 4
    assert (labels == labels[5, 5]).sum() == 25
    assert (labels == labels[12, 5]).sum() == 25
    assert fields[0].classes[types[5, 5] - 1] == "Neoplastic"
    assert fields[0].classes[types[12, 5] - 1] == "Epithelial"
    assert fields[0].mpp == 0.25
    assert len(one("pannuke", tmp_path, limit=2)) == 2
    next(tmp_path.rglob("masks.npy")).unlink()
    fails("pannuke", tmp_path, r"masks\.npy is missing")


def test_empty_folders_are_one_line(tmp_path: Path) -> None:
    fails("pannuke", tmp_path, "no images.npy under")
    fails("conic", tmp_path, r"images\.npy is missing")
    fails("monusac", tmp_path, "no XML under")
    fails("nuinsseg", tmp_path, "no folder ORGAN/tissue images")
    fails("nucls", tmp_path, "images is not a folder")
    fails("monuseg", tmp_path, "images is not a folder")
    fails("labels", tmp_path / "absent", "absent is not a folder")
    (tmp_path / "images").mkdir()
    fails("labels", tmp_path, "no images in")


# --- NuCLS -----------------------------------------------------------------------------------------------------------


def test_nucls_arrays(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", IMAGES[0])
    (tmp_path / "annotations").mkdir()
    (tmp_path / "meta").mkdir()
    labels = np.zeros((32, 32), np.int32)
    labels[2:9, 2:9], labels[12:20, 2:9] = 1, 5
    content: Any = {"inst_map": labels, "type_map": np.where(labels == 5, 2, labels)}
    np.save(tmp_path / "annotations" / "a.npy", content, allow_pickle=True)
    (tmp_path / "meta" / "label_map.yaml").write_text('1: "Non-Tumor"\n2: "Tumor"\n')
    (field,) = one("nucls", tmp_path)
    np.testing.assert_array_equal(field.labels, labels)
    assert field.types is not None
    assert field.classes[field.types[15, 5] - 1] == "Tumor"
    assert field.mpp == 0.2
    (tmp_path / "meta" / "label_map.yaml").write_text("- Tumor\n")
    fails("nucls", tmp_path, "does not name the classes")
    (tmp_path / "meta" / "label_map.yaml").write_text("1: Tumor\nother: Stroma\n")
    fails("nucls", tmp_path, "does not name the classes")
    (tmp_path / "meta" / "label_map.yaml").write_text('1: "Non-Tumor"\n')
    fails("nucls", tmp_path, "class 2 has no name")
    (tmp_path / "meta" / "label_map.yaml").unlink()
    assert one("nucls", tmp_path)[0].types is None
    content["inst_map"] = labels[1:]
    np.save(tmp_path / "annotations" / "a.npy", content, allow_pickle=True)
    fails("nucls", tmp_path, "the image is")
    np.save(tmp_path / "annotations" / "a.npy", labels)
    fails("nucls", tmp_path, "has no inst_map")
    (tmp_path / "annotations" / "a.npy").unlink()
    fails("nucls", tmp_path, r"no annotations/a\.npy")


NUCLS_CSV = """,raw_classification,main_classification,type,xmin,ymin,xmax,ymax,coords_x,coords_y
0,fov,,rectangle,0,0,32,32,,
1,tumor,tumor_nonMitotic,polyline,2,2,10,10,"2,10,10,2","2,2,10,10"
2,lymphocyte,lymphocyte,rectangle,14,2,26,10,,
3,unlabeled,unlabeled,rectangle,26,20,40,30,,
4,tumor,tumor_nonMitotic,polyline,2,20,9,20,"2,9","20,20"
"""


def test_nucls_tables(tmp_path: Path) -> None:
    name = "TCGA-A1-A0SP-DX1_id-1_left-2"
    picture(tmp_path / "rgb" / f"{name}.png", IMAGES[0])
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / f"{name}.csv").write_text(NUCLS_CSV)
    (field,) = one("nucls", tmp_path)
    assert field.patient == "A1-A0SP"
    assert (field.labels == 1).sum() == 64
    ellipse = (field.labels == 2).sum()
    assert ellipse == pytest.approx(np.pi * 6 * 4, rel=0.08)
    assert field.classes == ("lymphocyte", "tumor_nonMitotic")
    assert field.types is not None
    assert [int(field.types[y, x]) for y, x in ((5, 5), (6, 20), (25, 31))] == [2, 1, 0]
    assert field.labels[25, 31] == 3
    assert field.labels.max() == 3
    # What was annotated is smaller than the image: by the row fov, or else by the pixels of its code in the mask.
    assert field.image.shape == (32, 32, 3)
    whole = (field.image, field.labels)
    table = tmp_path / "csv" / f"{name}.csv"
    table.write_text("\n".join(line for line in NUCLS_CSV.splitlines() if not line.startswith("0,fov")))
    (field,) = one("nucls", tmp_path)
    assert field.image.shape == IMAGES[0].shape
    mask = np.zeros((*IMAGES[0].shape[:2], 3), np.uint8)
    mask[4:30, 2:28, 0] = 253
    mask[10:20, 10:20, 0] = 1
    (tmp_path / "mask").mkdir()
    picture(tmp_path / "mask" / f"{name}.png", mask)
    (field,) = one("nucls", tmp_path)
    np.testing.assert_array_equal(field.image, whole[0][4:30, 2:28])
    np.testing.assert_array_equal(field.labels > 0, whole[1][4:30, 2:28] > 0)
    table.write_text(NUCLS_CSV.replace("0,0,32,32", "900,0,932,32"))
    fails("nucls", tmp_path, "lies outside of the image")
    for text, reason in [
        (NUCLS_CSV.replace("2,10,10,2", "2,ten,10,2"), "a coordinate is damaged"),
        (NUCLS_CSV.replace("2,10,10,2", "2,nan,10,2"), "not finite"),
        (NUCLS_CSV.replace("2,10,10,2", "2,10,10"), "a coordinate is damaged"),
        (NUCLS_CSV.replace("main_", "other_"), "has no column 'main_classification'"),
    ]:
        (tmp_path / "csv" / f"{name}.csv").write_text(text)
        fails("nucls", tmp_path, reason)
    (tmp_path / "csv" / f"{name}.csv").unlink()
    fails("nucls", tmp_path, r"\.csv is missing")


def test_real_nucls(shared_data: Path) -> None:
    fields = one("nucls", shared_data / "nucls15")
    assert len(fields) == 15
    assert sum(len(np.unique(f.labels)) - 1 for f in fields) == 640
    for field in fields:
        assert field.types is not None
        assert field.classes == ("Non-Tumor", "Tumor")
        assert field.image[field.labels > 0].mean() < field.image[field.labels == 0].mean()


# --- MoNuSAC, NuInsSeg ----------------------------------------------------------------------------------------------


def layer(name: str, x: int) -> str:
    corners = [(x, 4), (x + 6, 4), (x + 6, 12), (x, 12)]
    points = "".join(f'<Vertex X="{a}" Y="{b}"/>' for a, b in corners)
    return (
        f'<Annotation Name=""><Attributes><Attribute Name="{name}"/></Attributes>'
        f"<Regions><Region><Vertices>{points}</Vertices></Region></Regions></Annotation>"
    )


def test_monusac(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "TCGA-5P-A9K0-01Z-00-DX1"
    picture(folder / "TCGA-5P-A9K0-01Z-00-DX1_1.tif", IMAGES[0])
    layers = layer("Epithelial", 2) + layer("Ambiguous", 10) + layer("Neutrophil", 20) + layer("Other", 27)
    (folder / "TCGA-5P-A9K0-01Z-00-DX1_1.xml").write_text(f"<Annotations>{layers}</Annotations>")
    with caplog.at_level(logging.INFO):
        (field,) = one("monusac", tmp_path)
    assert "3 of 3 regions drawn, 1 clipped" in caplog.text
    assert field.patient == "5P-A9K0"
    assert field.types is not None
    assert [int(field.types[8, x]) for x in (5, 13, 23, 30)] == [1, 0, 4, 0]
    assert field.labels[8, 30] == 3
    (folder / "TCGA-5P-A9K0-01Z-00-DX1_1.tif").unlink()
    fails("monusac", tmp_path, "has no image beside it")


def test_nuinsseg(tmp_path: Path) -> None:
    labels = np.zeros((32, 32), np.uint16)
    labels[2:12, 2:12] = 4
    for organ in ("human kidney", "mouse kidney"):
        stem = organ.replace(" ", "_") + "_01"
        picture(tmp_path / organ / "tissue images" / f"{stem}.png", IMAGES[0])
        (tmp_path / organ / "label masks modify").mkdir()
        tifffile.imwrite(tmp_path / organ / "label masks modify" / f"{stem}.tif", labels.astype(np.float32))
    fields = one("nuinsseg", tmp_path, mpp=0.25)
    assert [f.patient for f in fields] == ["nuinsseg-human kidney", "nuinsseg-mouse kidney"]
    assert {f.organ for f in fields} == {"kidney"}
    np.testing.assert_array_equal(fields[0].labels, labels)
    next(tmp_path.rglob("*.tif")).unlink()
    fails("nuinsseg", tmp_path, "has no label mask")


# --- what all share --------------------------------------------------------------------------------------------------


def write_labels(root: Path, count: int = 5) -> Path:
    for i in range(count):
        labels = np.zeros((32, 32), np.uint16)
        labels[4:12, 4:12] = i + 1
        picture(root / "images" / f"f{i}.png", IMAGES[i % 3])
        picture(root / "labels" / f"f{i}.png", labels)
    return root


def test_table_tells_patients(tmp_path: Path) -> None:
    root = write_labels(tmp_path / "data", 3)
    table = tmp_path / "t.csv"
    table.write_text("field,patient,organ,mpp,note\nf0,A,lung,0.3,x\nf1,A,,,\nf2,B,skin,,\n")
    fields = one("labels", root, table=str(table), mpp=0.5, name="mine")
    assert [(f.patient, f.organ, f.mpp) for f in fields] == [("A", "lung", 0.3), ("A", "", 0.5), ("B", "skin", 0.5)]
    assert [f.name for f in fields] == ["mine-f0", "mine-f1", "mine-f2"]
    for text, reason in [
        ("field,patient\nf0,A\n", "field 'f1' of labels is not in its table"),
        ("field\tpatient\nf0\tA\n", "no column 'field'"),
        ("field,patient\nf0,A\nf0,B\n", "line 3: field 'f0' is there twice"),
        ("field,mpp\nf0,fine\n", "mpp is not a number: 'fine'"),
    ]:
        table.write_text(text)
        fails("labels", root, reason, table=str(table))
    table.write_bytes(b"\xff\xfe\x00")
    fails("labels", root, "cannot be read", table=str(table))
    fails("labels", root, "cannot be read", table=str(tmp_path / "absent.tsv"))


def test_fields_without_nuclei_need_a_pixel_size(tmp_path: Path) -> None:
    root = write_labels(tmp_path / "data", 2)
    picture(root / "labels" / "f1.png", np.zeros((32, 32), np.uint16))
    reason = r"field labels-f1: nothing states its pixel size, .*set mpp of the data source 'labels'"
    fails("labels", root, reason)
    assert [f.mpp for f in one("labels", root, mpp_of={"labels-f1": 0.4})] == [0.6, 0.4]
    picture(root / "labels" / "f0.png", np.zeros((32, 32), np.uint16))
    fails("labels", root, "field labels-f0: nothing states its pixel size", empty=True)
    assert {f.mpp for f in one("labels", root, empty=True, mpp=0.5)} == {0.5}


def test_limit_spreads(tmp_path: Path) -> None:
    root = write_labels(tmp_path / "data")
    assert [f.name for f in one("labels", root, limit=3)] == ["labels-f0", "labels-f2", "labels-f4"]
    assert len(one("labels", root, limit=50)) == 5
    fails("labels", root, "limit 0", limit=0)
    fails("labels", root, "unknown key 'lmit'", lmit=3)


def test_masks_among_label_maps_are_taken_apart(tmp_path: Path) -> None:
    root = write_labels(tmp_path / "data", 1)
    mask = np.zeros((32, 32), np.uint8)
    mask[2:8, 2:8] = mask[2:8, 20:28] = 255
    picture(root / "labels" / "f0.png", mask)
    assert set(np.unique(one("labels", root)[0].labels)) == {0, 1, 2}


def test_damaged_images_are_one_line(tmp_path: Path) -> None:
    root = write_labels(tmp_path / "data", 2)
    (root / "images" / "f1.png").write_bytes(b"\x89PNG cut")
    fails("labels", root, r"f1\.png cannot be read")
    root = write_labels(tmp_path / "more", 2)
    (root / "labels" / "f1.png").write_bytes((root / "labels" / "f1.png").read_bytes()[:40])
    fails("labels", root, r"f1\.png cannot be read")


def test_fields_of_one_name(tmp_path: Path) -> None:
    root = write_labels(tmp_path / "data", 1)
    picture(root / "images" / "f0.tif", IMAGES[0])
    fails("labels", root, "two training fields are called 'labels-f0'")


def test_large_numbers_become_small() -> None:
    labels = np.array([[0, 2**40], [5, 2**40]], np.uint64)
    assert as_labels(labels).tolist() == [[0, 2], [1, 2]]
    assert as_labels(np.array([[2**31]], np.int64)).tolist() == [[1]]
    assert as_labels(np.array([[7, 0]], np.uint16)).tolist() == [[7, 0]]
    assert as_labels(np.array([[5 * 10**8, 0]], np.int32)).tolist() == [[1, 0]]
    for wrong in (np.array([[-1, 2]], np.int16), np.array([[np.nan, 2]])):
        with pytest.raises(PipelineError, match="a label map holds"):
            as_labels(wrong)


def test_tcga_patients() -> None:
    assert tcga_patient("TCGA-A7-A13E-01Z-00-DX1") == tcga_patient("x_TCGA-A7-A13E_2") == "A7-A13E"
    assert tcga_patient("mine-1-2-3") is None


def test_a_tcga_patient_is_the_same_in_every_source(tmp_path: Path) -> None:
    root = write_labels(tmp_path / "data")
    for file in [*root.glob("*/f0.*"), *root.glob("*/f1.*")]:
        file.rename(file.with_name(file.name.replace("f", "TCGA-A7-A13E-01Z-", 1)))
    patients = {f.name: f.patient for f in one("labels", root)}
    assert [patients[f"labels-TCGA-A7-A13E-01Z-{i}"] for i in (0, 1)] == ["A7-A13E"] * 2
    table = tmp_path / "t.tsv"
    names = [name.removeprefix("labels-") for name in patients]
    table.write_text("field\tpatient\n" + "".join(f"{name}\tTCGA-AR-A1AK\n" for name in names))
    assert {f.patient for f in one("labels", root, table=str(table))} == {"AR-A1AK"}


def test_images_that_are_not_in_0_to_255(tmp_path: Path) -> None:
    root = write_conic(tmp_path)
    np.save(root / "images.npy", IMAGES / 255.0)
    fails("conic", root, "images are not in 0 to 255")
