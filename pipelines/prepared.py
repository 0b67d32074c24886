"""What flows hand from step to step: artifacts that belong together."""

from __future__ import annotations

from dataclasses import dataclass

from medtl.records import Artifact


@dataclass(frozen=True, slots=True)
class Prepared:
    """The artifacts that every model of a run shares."""

    scans: Artifact
    cohort: Artifact
    split: Artifact
    plan: Artifact
    pack: Artifact


@dataclass(frozen=True, slots=True)
class Trained:
    """The artifacts of one trained and measured model."""

    checkpoint: Artifact
    calibrator: Artifact
    raw_test: Artifact  # predictions before the calibrator had its say
    val: Artifact
    test: Artifact
    evaluation: Artifact
    examination: Artifact | None = None  # of the model that may become a release
    explanations: Artifact | None = None  # likewise
    growth: Artifact | None = None  # likewise: its learning curve, where one was asked for


@dataclass(frozen=True, slots=True)
class Segmented:
    """The artifacts of one trained and measured segmentation."""

    checkpoint: Artifact
    val: Artifact  # predicted masks, before cleaning
    test: Artifact
    evaluation: Artifact  # with what each mask measured, and how masks are cleaned
    chosen: Artifact  # the checkpoint that validation chose; another one where it was trained once more since
    growth: Artifact | None = None  # the learning curve of the one that may become a release, where asked for
