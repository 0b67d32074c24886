"""All images as one memory-mapped array, gathered a batch at a time.

Decoding and resizing happen once, when the pack is written; an epoch is then an indexed copy out of the page cache,
and nothing is held in memory. Randomness comes from the seed, the phase and the epoch alone, so an epoch can be
repeated or resumed without a saved generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medtl.config import TransformsConfig
from medtl.dataset.transforms import augment, sample
from medtl.records import AnyArray, FloatArray

Batch = tuple[AnyArray, FloatArray]


@dataclass(frozen=True)
class EvaluationBatches:
    """Images in their order, as they are.

    Args:
        images: the pack, (N, rows, columns, channels), uint8 or uint16.
        targets: (N, classes), NaN where unknown.
        rows: the pack's rows that belong to this part.
    """

    images: AnyArray
    targets: FloatArray
    rows: Sequence[int]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), self.batch_size):
            rows = np.asarray(self.rows[start : start + self.batch_size])
            yield self.images[rows], self.targets[rows]


@dataclass(frozen=True)
class TrainingBatches:
    """Images in a new random order each epoch, augmented."""

    images: AnyArray
    targets: FloatArray
    rows: Sequence[int]
    batch_size: int
    transforms: TransformsConfig
    seed: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, phase: int, epoch: int, augmented: bool = True) -> Iterator[Batch]:
        """Give the batches of one epoch of one phase; the same arguments give the same batches."""
        rng = np.random.default_rng([self.seed, phase, epoch])
        order = rng.permutation(len(self.rows))
        rows = np.asarray(self.rows)[order]
        for batch in np.array_split(rows, len(self)):  # of equal size: a small last batch would upset BatchNorm
            chosen = np.sort(batch)  # in order of their place on the disk
            images = self.images[chosen]
            if augmented:
                size = (images.shape[1], images.shape[2])
                images = augment(images, sample(rng, len(images), size, self.transforms))
            yield images, self.targets[chosen]
