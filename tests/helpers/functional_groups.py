"""What the frames of an enhanced multi-frame object say of themselves."""

from __future__ import annotations

from typing import Any

from pydicom import Dataset


def item(**attributes: Any) -> Dataset:
    made = Dataset()
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return made


def place_two_echoes(made: Dataset, frames: int) -> None:
    """Give an object frames of two echoes, one after the other at each place; places are 3 mm apart."""
    made.SharedFunctionalGroupsSequence = [item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.75], SliceThickness=2.0, SpacingBetweenSlices=3.0)],
    )]  # fmt: skip
    made.DimensionIndexSequence = [item(DimensionIndexPointer=0x00209057), item(DimensionIndexPointer=0x00180082)]
    made.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 3.0 * (frame // 2)])],
            MREchoSequence=[item(EffectiveEchoTime=10.0 * (frame % 2 + 1))],
            FrameContentSequence=[item(StackID="1", DimensionIndexValues=[frame // 2 + 1, frame % 2 + 1])],
        )
        for frame in range(frames)
    ]
