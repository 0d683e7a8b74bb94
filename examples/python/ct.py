"""Analyses a CT slice, step by step. Does not depend on milepost.

The slice is a test file of the pydicom package, so that nothing is downloaded.
`python ct.py` prints what each step measures.
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
    """A finished step and its measurements."""

    step: str
    measured: Measured


@dataclass(frozen=True)
class UnderWay:
    """A step that is not finished, and how much of it is done."""

    step: str
    percent: int


@dataclass(frozen=True)
class Note:
    """Information about a step that is not finished."""

    step: str
    text: str
    measured: Measured = field(default_factory=dict)


@dataclass(frozen=True)
class Region:
    """One tissue of the slice."""

    area_mm2: float
    mean_hu: float


def load() -> Dataset:
    """Loads the slice as the scanner stored it."""
    return dcmread(get_testdata_file("CT_small.dcm", download=False))


def calibrate(slice_: Dataset) -> np.ndarray:
    """Converts the stored values to Hounsfield units."""
    stored = slice_.pixel_array.astype(np.float64)
    return stored * float(slice_.RescaleSlope) + float(slice_.RescaleIntercept)


def segment(hounsfield: np.ndarray, tissue: str) -> np.ndarray:
    """The pixels of a tissue, as a mask."""
    low, high = TISSUES[tissue]
    return (low <= hounsfield) & (hounsfield < high)


def measure(slice_: Dataset, hounsfield: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, Region]:
    """The area and the mean density of each tissue."""
    row_mm, column_mm = map(float, slice_.PixelSpacing)
    return {
        tissue: Region(
            area_mm2=float(mask.sum()) * row_mm * column_mm,
            mean_hu=float(hounsfield[mask].mean()) if mask.any() else 0.0,
        )
        for tissue, mask in masks.items()
    }


def report(regions: dict[str, Region]) -> str:
    """The finding, as one sentence."""
    parts = [
        f"{tissue.replace('_', ' ')} {region.area_mm2:,.0f} mm² at {region.mean_hu:+.0f} HU"
        for tissue, region in regions.items()
    ]
    return ", ".join(parts)


def analyse() -> Iterator[Done | UnderWay | Note]:
    """Runs the analysis, and yields what to tell about it."""
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

    masks: dict[str, np.ndarray] = {}
    for tissue in TISSUES:
        yield UnderWay("segment", 100 * len(masks) // len(TISSUES))
        masks[tissue] = segment(hounsfield, tissue)
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
    for result in analyse():
        print(result)
