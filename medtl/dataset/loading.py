"""All images as one memory-mapped array, gathered a batch at a time.

Decoding and resizing happen once, when the pack is written; an epoch is then an indexed copy out of the page cache,
and nothing is held in memory. Randomness comes from the seed, the phase and the epoch alone, so an epoch can be
repeated or resumed without a saved generator.

A *view* is an image after one augmentation. What is drawn for a view depends on the seed, the view's number and the
image's row in the pack, never on the batch it is in: views can be computed in any order, kept, and shared by folds.

A volume shown as slices has as many rows, one after the other: they are learned from and computed one by one, and
vote where a study is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from medtl.config import TransformsConfig
from medtl.dataset.transforms import Augmentation, augment, sample
from medtl.errors import PlanError
from medtl.records import AnyArray, FloatArray, IntArray

Batch = tuple[AnyArray, FloatArray]
CLEAN = -1  # the view of an image as it is
_VIEW = 0x1E35


def slices_of(images: AnyArray, studies: int) -> int:
    """Tell how many rows of the pack each study has: 1 unless volumes are shown as slices.

    Raises:
        PlanError: the pack's rows are no multiple of the studies.
    """
    count, left = divmod(len(images), max(studies, 1))
    if left or not count:
        raise PlanError(
            f"{len(images)} packed rows do not belong to {studies} studies. Delete the artifact 'pack' and run again."
        )
    return count


def rows_of(studies: Sequence[int], slices: int) -> list[int]:
    """Give the rows of the pack that belong to some studies, given by their place in the cohort."""
    return [study * slices + number for study in studies for number in range(slices)]


def voted(probabilities: FloatArray, slices: int) -> FloatArray:
    """Let the slices of each study vote: the mean of their probabilities.

    Not of their logits: one slice with an extreme logit would decide alone, and a head of nearest neighbours has
    logits of a class nobody voted for that mean nothing.

    Args:
        probabilities: (studies * slices, classes), the slices of a study one after the other.
    """
    if slices == 1:
        return probabilities
    mean: FloatArray = probabilities.reshape(-1, slices, probabilities.shape[1]).mean(1)
    return mean


@dataclass(frozen=True)
class EvaluationBatches:
    """Images in their order, as they are.

    Args:
        images: the pack, (N, ..., rows, columns, channels), uint8 or uint16.
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
    """Images in a new random order each epoch, as any of their views.

    Args:
        images: the pack, (N, ..., rows, columns, channels), uint8 or uint16.
        targets: (N, classes), NaN where unknown.
        rows: the pack's rows to learn from.
        batch_size: at most so many in a batch.
        transforms: what augmentation may do.
        seed: of the order and of the views.
    """

    images: AnyArray
    targets: FloatArray
    rows: Sequence[int]
    batch_size: int
    transforms: TransformsConfig
    seed: int
    _drawn: dict[int, Augmentation] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def order(self, phase: int, epoch: int) -> list[IntArray]:
        """Give the rows of each batch of one epoch; the same arguments give the same batches.

        Batches are of equal size, up to one: a small last batch would upset BatchNorm. Within a batch rows are in the
        order of their place on the disk.
        """
        rng = np.random.default_rng([self.seed, phase, epoch])
        rows = np.asarray(self.rows)[rng.permutation(len(self.rows))]
        return [np.sort(batch) for batch in np.array_split(rows, len(self))]

    def view(self, rows: IntArray, view: int) -> AnyArray:
        """Give one view of some images: (n, ..., rows, columns, channels); :data:`CLEAN` is the image as it is."""
        images = self.images[rows]
        return images if view == CLEAN else augment(images, self._of(view).take(rows))

    def epoch(self, phase: int, epoch: int, augmented: bool = True) -> Iterator[Batch]:
        """Give the batches of one epoch of one phase, each image in a view that no other epoch has."""
        number = CLEAN if not augmented else phase * 1_000_000 + epoch
        for rows in self.order(phase, epoch):
            yield self.view(rows, number), self.targets[rows]

    def _of(self, view: int) -> Augmentation:
        found = self._drawn.get(view)
        if found is None:
            rng = np.random.default_rng([self.seed, _VIEW, view])
            size = (self.images.shape[-3], self.images.shape[-2])
            found = sample(rng, len(self.images), size, self.transforms)
            if len(self._drawn) >= 4:  # of a million images a view takes 64 MB
                self._drawn.clear()
            self._drawn[view] = found
        return found
