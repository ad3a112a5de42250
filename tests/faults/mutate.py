"""Small slides of four formats, and damage to them: flipped bits, truncation, overwritten blocks, changed tags."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from pipeline.slides.synthetic import make_field, write_ome_tiff, write_svs, write_tiff

SIZE = (700, 600)
MPP = 0.5


def write_dicom(path: Path, rgb: np.ndarray, mpp: float) -> None:
    """Write one level of a DICOM whole-slide image: tiles of 256 pixels, JPEG."""
    import pydicom
    from PIL import Image
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage

    height, width = rgb.shape[:2]
    side = 256
    padded = np.pad(rgb, ((0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    frames = []
    for y in range(0, padded.shape[0], side):
        for x in range(0, padded.shape[1], side):
            buffer = BytesIO()
            Image.fromarray(padded[y : y + side, x : x + side]).save(buffer, "JPEG", quality=90)
            frames.append(buffer.getvalue())
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.3680043.8.498.1"
    measures = Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    measures.SliceThickness = 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    path_item = Dataset()
    path_item.OpticalPathIdentifier = "0"
    one = pydicom.Dataset()
    one.file_meta = meta
    one.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    one.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.1"
    one.StudyInstanceUID = "1.2.826.0.1.3680043.8.498.2"
    one.SeriesInstanceUID = "1.2.826.0.1.3680043.8.498.3"
    one.Modality = "SM"
    one.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    one.DimensionOrganizationType = "TILED_FULL"
    one.TotalPixelMatrixColumns, one.TotalPixelMatrixRows = width, height
    one.TotalPixelMatrixFocalPlanes = 1
    one.NumberOfOpticalPaths = 1
    one.OpticalPathSequence = [path_item]
    one.SharedFunctionalGroupsSequence = [shared]
    one.Rows = one.Columns = side
    one.NumberOfFrames = len(frames)
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "YBR_FULL_422", 0
    one.BitsAllocated = one.BitsStored = 8
    one.HighBit, one.PixelRepresentation = 7, 0
    one.PixelData = encapsulate(frames)
    one["PixelData"].is_undefined_length = True
    one.save_as(path, enforce_file_format=True)


WRITERS: dict[str, Callable[[Path, np.ndarray, float], None]] = {
    "svs": write_svs,
    "tif": write_tiff,
    "ome.tif": write_ome_tiff,
    "dcm": write_dicom,
}


def write_whole(folder: Path, kind: str, seed: int = 3) -> Path:
    """A whole slide of a kind."""
    rgb, _ = make_field(*SIZE, MPP, seed)
    path = folder / f"whole.{kind}"
    WRITERS[kind](path, rgb, MPP)
    return path


def flip_bits(data: bytearray, rng: random.Random, start: int, stop: int, count: int) -> None:
    """Flip bits at random places of a range."""
    for _ in range(count):
        data[rng.randrange(start, min(stop, len(data)))] ^= 1 << rng.randrange(8)


def bits(data: bytearray, rng: random.Random) -> bytearray:
    """Flipped bits anywhere: mostly in pixels."""
    flip_bits(data, rng, 0, len(data), rng.choice((1, 5, 50)))
    return data


def head_bits(data: bytearray, rng: random.Random) -> bytearray:
    """Flipped bits where the file is described."""
    flip_bits(data, rng, 0, 2000, rng.choice((1, 3, 10)))
    return data


def cut(data: bytearray, rng: random.Random) -> bytearray:
    """The end is missing."""
    return data[: rng.randrange(1, len(data))]


def block(data: bytearray, rng: random.Random) -> bytearray:
    """A block of zeros, noise, or of another place of the file, as broken disks and copies leave."""
    length = rng.choice((16, 512, 4096, len(data) // 4))
    at = rng.randrange(max(1, len(data) - length))
    other = rng.randrange(max(1, len(data) - length))
    data[at : at + length] = rng.choice((bytes(length), rng.randbytes(length), bytes(data[other : other + length])))
    return data


def tags(data: bytearray, rng: random.Random) -> bytearray:
    """Other values of tags: of a TIFF directory's entries, or of elements of a DICOM file."""
    if data[:2] in (b"II", b"MM"):
        entries = _entries(data)
        order = "<" if data[:2] == b"II" else ">"
        for at, size in rng.sample(entries, min(len(entries), rng.choice((1, 1, 2, 4)))):
            what = rng.randrange(4)
            if what == 0:  # the type or the tag itself
                struct.pack_into(order + "H", data, at + rng.choice((0, 2)), rng.choice((1, 2, 3, 4, 5, 16, 256, 322)))
            elif what == 1:  # how many values
                struct.pack_into(order + "I", data, at + 4, rng.choice((0, 1, 2, 65535, 2**31, 2**32 - 1)))
            else:
                values = (0, 1, 2, 7, 8, 16, 255, 256, 512, 65535, 2**31 - 1, 2**32 - 1, rng.randrange(2**32))
                struct.pack_into(order + "I", data, at + size - (4 if size == 12 else 8), rng.choice(values))
        return data
    spots = [i for i in range(132, min(len(data) - 12, 3000)) if data[i + 4 : i + 6] in (b"US", b"UL", b"IS", b"DS")]
    for at in rng.sample(spots, min(len(spots), 2)):
        data[at + 8 : at + 10] = rng.choice((b"\0\0", b"\1\0", b"\xff\xff", b"\0\1", b"9 "))
    return data


def _entries(data: bytearray) -> list[tuple[int, int]]:
    """Places and sizes of the entries of a TIFF file's directories."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    at = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    entries, size = [], 20 if big else 12
    while 0 < at < len(data) and len(entries) < 1000:
        count = struct.unpack_from(order + ("Q" if big else "H"), data, at)[0]
        first = at + (8 if big else 2)
        entries += [(first + i * size, size) for i in range(count)]
        at = struct.unpack_from(order + ("Q" if big else "I"), data, first + count * size)[0]
    return entries


MUTATIONS: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "flipped bits": bits,
    "flipped bits in the head": head_bits,
    "truncation": cut,
    "overwritten block": block,
    "changed tags": tags,
}


def mutated(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Kind of damage and the damaged file; never the whole one."""
    while True:
        name = rng.choice(sorted(MUTATIONS))
        result = bytes(MUTATIONS[name](bytearray(data), rng))
        if result != data:
            return name, result
