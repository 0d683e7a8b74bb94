"""Analyses a CT slice, step by step. Knows nothing of milepost.

The slice is the one that the pydicom package carries as its test file, so
nothing is downloaded. `python ct.py` prints what each step measures.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file

SOURCE = "https://github.com/pydicom/pydicom/blob/main/src/pydicom/data/test_files/CT_small.dcm"

# Half-open ranges in Hounsfield units: water is 0, air -1000.
TISSUES = {
    "air": (-np.inf, -300),
    "fat": (-300, -30),
    "soft_tissue": (-30, 200),
    "bone": (200, np.inf),
}

Measured = dict[str, float | str]


@dataclass(frozen=True)
class Done:
    """A step is done, and this is what it measured."""

    step: str
    measured: Measured


@dataclass(frozen=True)
class Note:
    """Something worth telling on the way to the end of a step."""

    step: str
    text: str
    measured: Measured = field(default_factory=dict)


@dataclass(frozen=True)
class Region:
    """One tissue of the slice."""

    area_mm2: float
    mean_hu: float


def load() -> Dataset:
    """The slice as the scanner stored it."""
    return dcmread(get_testdata_file("CT_small.dcm", download=False))


def calibrate(slice_: Dataset) -> np.ndarray:
    """Stored values as Hounsfield units."""
    stored = slice_.pixel_array.astype(np.float64)
    return stored * float(slice_.RescaleSlope) + float(slice_.RescaleIntercept)


def segment(hounsfield: np.ndarray) -> dict[str, np.ndarray]:
    """Which pixels are which tissue: a mask for each."""
    return {
        tissue: (low <= hounsfield) & (hounsfield < high)
        for tissue, (low, high) in TISSUES.items()
    }


def measure(slice_: Dataset, hounsfield: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, Region]:
    """How large each tissue is, and how dense."""
    row_mm, column_mm = map(float, slice_.PixelSpacing)
    return {
        tissue: Region(
            area_mm2=float(mask.sum()) * row_mm * column_mm,
            mean_hu=float(hounsfield[mask].mean()) if mask.any() else 0.0,
        )
        for tissue, mask in masks.items()
    }


def report(regions: dict[str, Region]) -> str:
    """The finding in one sentence."""
    parts = [
        f"{tissue.replace('_', ' ')} {region.area_mm2:,.0f} mm² at {region.mean_hu:+.0f} HU"
        for tissue, region in regions.items()
    ]
    return ", ".join(parts)


def analyse() -> Iterator[Done | Note]:
    """The whole analysis, told as it goes."""
    slice_ = load()
    yield Done(
        "load",
        {
            "rows": slice_.Rows,
            "columns": slice_.Columns,
            "thickness": float(slice_.SliceThickness),
            "scanner": f"{slice_.Manufacturer} {slice_.ManufacturerModelName}",
            "source": SOURCE,
        },
    )
    if agent := slice_.get("ContrastBolusAgent"):
        yield Note("load", "Contrast agent given: vessels read denser than usual", {"agent": agent})

    hounsfield = calibrate(slice_)
    yield Done(
        "calibrate",
        {
            "lowest": float(hounsfield.min()),
            "mean": round(float(hounsfield.mean()), 1),
            "highest": float(hounsfield.max()),
        },
    )

    masks = segment(hounsfield)
    shares = {tissue: round(100 * float(mask.mean()), 1) for tissue, mask in masks.items()}
    yield Done("segment", shares)

    regions = measure(slice_, hounsfield, masks)
    areas = {f"{tissue}_area": round(region.area_mm2, 1) for tissue, region in regions.items()}
    means = {f"{tissue}_mean": round(region.mean_hu, 1) for tissue, region in regions.items()}
    yield Done("measure", areas | means)

    largest = max(regions, key=lambda tissue: regions[tissue].area_mm2)
    yield Note("report", f"Most of the slice is {largest.replace('_', ' ')}")
    yield Done("report", {"finding": report(regions)})


if __name__ == "__main__":
    for told in analyse():
        print(told)
