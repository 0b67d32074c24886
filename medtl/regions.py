"""One mask from pieces that may overlap: what a DICOM segmentation or structure set holds, region by region.

In the foundation, because who judges a mask and who learns from it must paint the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from medtl.records import AnyArray, Structure


def paint(
    regions: Iterable[tuple[AnyArray, int]], structures: Sequence[Structure], ignore: int | None = None
) -> AnyArray | None:
    """Give each voxel one value from pieces that may overlap.

    Where pieces overlap, the value of one of them must stand for all: one whose value is in every structure that the
    others' values are in (``tumour: [core, edema]``, ``core: core``), or the ignored one.

    Args:
        regions: each piece, 0 outside, all of one shape; and its value.

    Returns:
        uint16 in the pieces' shape, 0 outside of all; ``None`` where no value stands for both of two that overlap.
    """
    means = {v: {at for at, one in enumerate(structures) if v in one.values} for one in structures for v in one.values}
    drawn = sorted(regions, key=lambda one: (one[1] == ignore, len(means.get(one[1], ()))))
    values = np.zeros(drawn[0][0].shape, np.uint16)
    for pixels, value in drawn:
        values[np.asarray(pixels) != 0] = value
    for pixels, value in drawn:
        final = {int(one) for one in np.unique(values[np.asarray(pixels) != 0])}
        if any(one != ignore and not means.get(one, set()) >= means.get(value, set()) for one in final):
            return None
    return values
