"""Every noun that one stage hands to another.

Frozen, and checked where they are made: an impossible one cannot be built. Unknown is ``None``, never 0. Identifiers
are digests or keyed pseudonyms (``p-…`` patient, ``s-…`` study), never what a file or a table said.

    files ─▶ Scan ─▶ Study ─▶ Cohort ─▶ Split, Plan ─▶ Checkpoint ─▶ Predictions ─▶ Evaluation ─▶ Release
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medtl.errors import ModelError, SplitError, StudyError

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]
AnyArray = npt.NDArray[Any]

Task = Literal["binary", "multiclass", "multilabel"]
Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
LeakKind = Literal["patient", "exam", "group", "pixels", "near", "pretraining"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished result on disk: a folder named by the fingerprint of its inputs."""

    kind: str
    fingerprint: str
    digest: str  # of its contents; what later fingerprints are made from
    path: Path
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Exclusion:
    """One item left out, and why."""

    item: str  # pseudonym of the file, series or study
    stage: str
    code: str
    reason: str
    files: int = 1  # how many files of the source it stands for
    action: str = "quarantine"  # or reject: what the policy said
    content: str | None = None  # digest of its files' bytes: what a person readmits


@dataclass(frozen=True, slots=True)
class Scan:
    """One decoded image or volume whose pixels lie in the pixel store, under their digest.

    Shape is ``(rows, columns)`` or ``(rows, columns, 3)``, values keep their depth; of a volume ``(slices, rows,
    columns)``, and a value means ``slope * stored + intercept``. ``affine`` (volumes only) is 4 x 4 and maps voxel
    (column, row, slice) to RAS+ mm.
    """

    scan_id: str  # digest of the bytes it came from (and its index in them)
    source: str  # dicom, nifti, image, npz
    shape: tuple[int, ...]
    dtype: str
    pixel_digest: str  # of the stored values, their type and shape
    keys: tuple[str, ...]  # keyed digests of every name a label table may call it by
    bits: int  # significant bits of one value
    patient: str | None = None
    study: str | None = None
    modality: str | None = None
    scanner: str | None = None
    sex: str | None = None
    age_years: float | None = None
    label: tuple[int, ...] | None = None  # only where the source itself carries labels (.npz)
    part: str | None = None  # only where the source itself is split (.npz)
    affine: tuple[tuple[float, float, float, float], ...] | None = None
    slope: float = 1.0
    intercept: float = 0.0
    series: str | None = None
    files: int = 1  # of the source that it was built from
    findings: tuple[str, ...] = ()  # codes that the policy accepted or repaired
    frame: str | None = None  # pseudonym of the frame of reference
    mask_of: str | None = None  # of a mask: the scan on whose voxels it lies; 1 inside, 0 outside
    region: str | None = None  # of a mask: number and name of what was drawn

    @property
    def is_volume(self) -> bool:
        """Tell a volume from an image."""
        return self.affine is not None

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.shape[2] if len(self.shape) == 3 and not self.is_volume else 1


@dataclass(frozen=True, slots=True)
class Study:
    """One scan with its label and its patient.

    ``target`` has one entry per class: 0, 1, or ``None`` where a multi-label reader said nothing.
    """

    study_id: str
    scan_id: str
    patient: str
    target: tuple[int | None, ...]
    pixel_digest: str
    site: str | None = None
    sex: str | None = None
    age_years: float | None = None
    scanner: str | None = None
    part: Part | None = None  # a predefined split
    exam: str | None = None  # the DICOM study that the scan is of
    groups: tuple[str, ...] = ()  # whatever else must stay together: lesion, source
    attributes: Mapping[str, str] = field(default_factory=dict)  # column of the label table: its words; blank: absent
    mask: str | None = None  # scan_id of the mask that shows its structures, on the same voxels
    field: str | None = None  # scan_id of a mask outside of which nothing counts
    regions: tuple[tuple[str, int], ...] = ()  # of a mask in pieces: scan_id of each, of which mask is the first; value
    box: tuple[float, float, float, float] | None = None  # around the finding: x0, y0, x1, y1 in pixels, half-open


@dataclass(frozen=True, slots=True)
class Structure:
    """What a mask shows, and by which of its values; a value that is in several structures makes them regions."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cohort:
    """The studies that can be learned from, ordered by what their bytes are, not by what they are called.

    With ``structures`` it is one for segmentation: a class is a structure, a target says whether the mask shows it.
    """

    task: Task
    classes: tuple[str, ...]
    studies: tuple[Study, ...]
    exclusions: tuple[Exclusion, ...] = ()
    patients_known: bool = True
    warnings: tuple[str, ...] = ()
    structures: tuple[Structure, ...] = ()
    ignore: int | None = None  # value of the masks that nobody is judged on

    def __post_init__(self) -> None:
        if self.structures and tuple(one.name for one in self.structures) != self.classes:
            raise StudyError("The classes of a cohort for segmentation are its structures.")
        twice = [study_id for study_id, n in Counter(s.study_id for s in self.studies).items() if n > 1]
        if twice:
            raise StudyError(f"{len(twice)} study identifiers occur twice in the cohort.")
        if any(len(s.target) != len(self.classes) for s in self.studies):
            raise StudyError("A study's target does not have one entry per class.")

    @property
    def targets(self) -> FloatArray:
        """Targets of all studies, shape (n, classes); NaN where unknown."""
        rows = [[np.nan if t is None else float(t) for t in s.target] for s in self.studies]
        return np.array(rows, dtype=np.float64).reshape(len(self.studies), len(self.classes))


@dataclass(frozen=True, slots=True)
class Leak:
    """How many of a kind are on two sides: patients, exams, groups, pixels, or pairs of nearly the same picture."""

    kind: LeakKind
    sides: tuple[str, str]  # two parts, or "pretraining" and a part
    count: int


@dataclass(frozen=True, slots=True)
class Split:
    """Which study is in which part. Studies of one group (patient, exam, named groups, identical or nearly the same
    pixels) are on one side, unless the split was given and its ``leaks`` were allowed.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    groups: Mapping[str, str]  # study -> group
    predefined: bool
    exclusions: tuple[Exclusion, ...] = ()
    leaks: tuple[Leak, ...] = ()  # known and allowed
    network: str | None = None  # digest of the one whose features told look-alikes; None: pictures alone did

    def __post_init__(self) -> None:
        sides: dict[str, Part] = {}
        for part in PARTS:
            if len(set(self.part(part))) < len(self.part(part)):
                raise SplitError(f"The '{part}' part holds a study twice. Give each study one line and one part.")
            for study_id in self.part(part):
                side = sides.setdefault(self.groups[study_id], part)
                if side != part and not self.leaks:
                    raise SplitError(
                        f"A patient, or one and the same image, is in both '{side}' and '{part}'. Give each patient "
                        "one part, or drop the split column and let medtl split by patient."
                    )

    def part(self, name: Part) -> tuple[str, ...]:
        """Study identifiers of one part."""
        parts: dict[Part, tuple[str, ...]] = {"train": self.train, "val": self.val, "test": self.test}
        return parts[name]


@dataclass(frozen=True, slots=True)
class FeaturePairs:
    """Near duplicates that the features of the pretrained network added to those that pictures tell alone."""

    pairs: int
    distance: float  # cosine; a pair is nearer in features
    likeness: float  # correlation; and more alike when laid on each other, and both together by more than that


@dataclass(frozen=True, slots=True)
class CleanProof:
    """What was looked for on two sides of a split, on how many studies, by which bounds, and what was found."""

    studies: Mapping[Part, int]
    checked: Mapping[LeakKind, int]  # studies that the kind could be looked for in
    leaks: tuple[Leak, ...]
    near: float | None  # correlation of two fingerprints from which they count as near duplicates
    look: float | None  # from which pictures were laid on each other first
    pairs: int  # near duplicates of different patients, on one side or on two
    listed: int | None  # pictures on the list of the pretraining set; None: no list
    notes: tuple[str, ...] = ()  # what could not be looked for, and why
    by_features: FeaturePairs | None = None  # of all patients, as far as they were looked for

    @property
    def clean(self) -> bool:
        """Nothing was found on two sides."""
        return not self.leaks


@dataclass(frozen=True, slots=True)
class FeatureCheck:
    """How near the features of images of different people come across the sides of a split."""

    images: int
    threshold: float | None  # cosine distance; None where it is not estimable
    nearest: float | None  # least cosine distance across sides
    suspects: Mapping[str, int]  # "train-test": images of the later part with a neighbour nearer than the threshold
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """How pixels become network input, decided from the training part alone and used unchanged in the clinic."""

    task: Task
    classes: tuple[str, ...]
    size: tuple[int, int]  # rows, columns
    channels: int  # 1 or 3; of slices of a volume 2 * neighbours + 1
    bits: int  # of the packed array: 8 or 16
    intensity: Literal["fixed", "per_image"]
    low: float | None  # value that becomes 0, where fixed
    high: float | None  # value that becomes 1, where fixed
    percentiles: tuple[float, float]  # used where per_image
    facts: Mapping[str, Any]  # what was measured on the training part
    reasons: Mapping[str, str]  # why each decision was taken
    volumes: Literal["slices", "whole"] | None = None  # how a volume is shown; None: images are wanted
    axis: Literal["sagittal", "coronal", "axial"] | None = None  # how volumes are sliced
    slices: int = 1  # rows of the packed array that one study has
    neighbours: int = 0  # slices on each side that are further channels
    depth: int | None = None  # slices of a whole volume


@dataclass(frozen=True, slots=True)
class GridPlan:
    """How scans become the input of a segmentation, decided from the training part alone, unchanged in the clinic.

    Axes of space are (slices, rows, columns) of a volume turned as ``axis`` says, or (rows, columns) of an image; in
    2-D of volumes, patches are (rows, columns) of its slices.
    """

    structures: tuple[Structure, ...]
    ignore: int | None
    dimensions: int  # of a patch: 2 or 3
    axis: Literal["sagittal", "coronal", "axial"] | None  # how volumes are turned; None: images are wanted
    neighbours: int  # slices on each side that are further channels: 2.5-D
    channels: int  # of the network's input
    spacing_mm: tuple[float, ...] | None  # of the grid that scans are resampled to, (slices, rows, columns)
    intensity: Literal["window", "zscore", "nyul", "unit"]
    low: float | None  # values are clipped to, where window
    high: float | None
    mean: float | None  # subtracted, where window or nyul
    std: float | None  # divided by
    landmarks: tuple[float, ...]  # of the standard histogram, where nyul
    patch: tuple[int, ...]  # one size for each of the dimensions
    batch_size: int  # patches
    strides: tuple[tuple[int, ...], ...]  # of each level of the network, the first 1
    kernels: tuple[tuple[int, ...], ...]  # of each level
    filters: tuple[int, ...]  # of each level
    mirror: tuple[int, ...]  # axes of a patch that may be mirrored
    facts: Mapping[str, Any]  # what was measured on the training part
    reasons: Mapping[str, str]  # why each decision was taken

    @property
    def overlapping(self) -> bool:
        """Tell structures that may share voxels (one sigmoid each) from those that exclude each other (a softmax)."""
        values = [value for one in self.structures for value in one.values]
        return len(set(values)) < len(values)

    @property
    def outputs(self) -> int:
        """Count the network's output channels; where structures exclude each other the background is the first."""
        return len(self.structures) + (not self.overlapping)


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of a training history."""

    phase: str
    epoch: int
    train_loss: float
    val_loss: float
    val_auroc: float | None


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of unfreezing did, with the proof of what it left alone."""

    name: str
    unfrozen: tuple[str, ...]
    frozen: tuple[str, ...]
    trainable_parameters: int
    frozen_parameters: int
    learning_rates: Mapping[str, float]  # stage -> peak rate
    frozen_digest_before: str
    frozen_digest_after: str
    best_epoch: int
    val_loss: float
    val_auroc: float | None
    kept: bool = False  # the checkpoint is this phase's best state
    head: str = "gradient"  # how the head learned
    epochs: int = 0  # done, with early stopping
    trainable: tuple[str, ...] = ()  # names of the parameters that learned
    monitor: str = "auroc"  # validation metric that chose
    watched: float | None = None  # its best value
    chance_better: float | None = None  # share of validation resamples in which it beat the best phase before it
    reason: str = ""  # why it was kept, or not

    def __post_init__(self) -> None:
        if self.frozen_digest_before != self.frozen_digest_after:
            raise ModelError(
                f"Phase '{self.name}' changed a frozen layer. Report this: nothing in a configuration may do so."
            )


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How much of a set of weights arrived in the network's trunk."""

    source: str  # none, or where the weights came from
    sha256: str | None
    loaded: int  # tensors
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    share: float  # of the trunk's parameters, 0 to 1
    licence: str | None = None
    citation: str | None = None
    layout: str = "native"  # whose names the weights came under
    shares: Mapping[str, float] = field(default_factory=dict)  # by stage


@dataclass(frozen=True, slots=True)
class Refit:
    """How a network was trained once more, on training and validation together; nothing chose among its states."""

    chosen_by: str  # sha256 of the weights of the network that phases and epochs were chosen with
    studies: int
    patients: int
    phases: tuple[Phase, ...]  # with the proof of what was frozen; nothing was validated
    history: tuple[Epoch, ...]  # of losses on training


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained network's description; its weights lie beside it as safetensors.

    ``phases`` and ``history`` are of the training that validation watched, also where ``refit`` is there.
    """

    backbone: str
    task: Task
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, ...]  # rows, columns; of a segmentation the patch
    stages: tuple[str, ...]
    weights: LoadReport
    phases: tuple[Phase, ...]
    history: tuple[Epoch, ...]
    parameters: int
    weights_sha256: str
    environment: Mapping[str, str]
    head: str = "linear"  # or knn: nearest neighbours; or mask: a segmentation
    mean: tuple[float, ...] = ()  # subtracted from values of 0 to 1, one per channel; empty: the backbone's own
    std: tuple[float, ...] = ()  # divided by
    members: tuple[str, ...] = ()  # sha256 of the weights of further networks, whose answers are averaged with these
    refit: Refit | None = None  # where these are the weights of a second training


@dataclass(frozen=True, slots=True)
class Predictions:
    """Probabilities for one part. Arrays are (n, classes); NaN in ``targets`` where unknown."""

    part: str
    study_ids: tuple[str, ...]
    patients: tuple[str, ...]
    targets: FloatArray
    probabilities: FloatArray

    def __post_init__(self) -> None:
        n = len(self.study_ids)
        if len(self.patients) != n or self.targets.shape != self.probabilities.shape or len(self.targets) != n:
            raise ValueError("predictions: one patient, target row and probability row per study are wanted")


@dataclass(frozen=True, slots=True)
class Score:
    """One figure with its 95 % interval; ``value`` is ``None`` where it is not estimable, and ``note`` says why."""

    metric: str
    label: str  # a class, or "macro", or "all"
    value: float | None
    low: float | None
    high: float | None
    n: int
    patients: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A threshold for one class and where it was chosen."""

    label: str
    threshold: float
    rule: str
    chosen_on: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A line for a plot.

    ``roc``: 1 - specificity, sensitivity; ``pr``: sensitivity, PPV; ``calibration``: mean probability, observed share;
    ``decision``: threshold, net benefit of the model, and of treating all or none.
    """

    kind: Literal["roc", "pr", "calibration", "decision", "decision_all", "decision_none"]
    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    weight: tuple[float, ...] = ()  # studies per point, for calibration


@dataclass(frozen=True, slots=True)
class MaskResult:
    """How the predicted mask of one structure of one study compares with the true one.

    ``values`` by the names of ``MASK_METRICS`` and of the lesion-wise metrics; ``None`` where not estimable, and
    ``note`` says why.
    """

    study_id: str
    patient: str
    structure: str
    truth_ml: float
    predicted_ml: float
    values: Mapping[str, float | None]
    note: str = ""


@dataclass(frozen=True, slots=True)
class ComponentChoice:
    """What is kept of one structure's separate parts, and whether holes of these are then filled; by validation."""

    structure: str
    keep: Literal["all", "largest"]
    reason: str
    dice_all: float | None  # mean on validation
    dice_largest: float | None
    studies: int
    fill: bool = False
    fill_reason: str = ""
    dice_open: float | None = None  # mean on validation of what is kept
    dice_filled: float | None = None


@dataclass(frozen=True, slots=True)
class MaskQuality:
    """How a study's Dice is foretold from numbers of uncertainty, without a true mask: plain numbers.

    ``linear``: ``intercept + weights * (number - mean) / scale``; ``isotonic``: between ``knots`` of one number.
    """

    method: Literal["none", "linear", "isotonic"]
    reason: str
    features: tuple[str, ...]
    fail_below: float  # Dice below which a mask counts as failed, and a foretold one is flagged
    weights: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    intercept: float | None = None
    feature: int | None = None  # of isotonic: which number
    knots: tuple[tuple[float, float], ...] = ()  # (number, Dice), ascending
    error: float | None = None  # mean absolute, cross-validated by patient on validation
    error_of_the_mean: float | None = None  # of foretelling everybody the mean
    rank_correlation: float | None = None  # of foretold and true, cross-validated
    failures: int = 0  # on validation
    failures_flagged: int = 0
    flagged: int = 0
    studies: int = 0
    patients: int = 0
    assumed: Mapping[str, float] = field(default_factory=dict)  # number, of structures that may be absent: if unknown


@dataclass(frozen=True, slots=True)
class FoldScores:
    """What one fold's test part gave; its own intervals are in its own evaluation."""

    fold: str
    repeat: int
    n: int
    patients: int
    values: Mapping[str, float | None]  # headline value of each metric


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything measured on the test part."""

    task: Task
    classes: tuple[str, ...]
    scores: tuple[Score, ...]
    operating_points: tuple[OperatingPoint, ...]
    curves: tuple[Curve, ...]
    confusion: tuple[tuple[int, ...], ...]  # rows: truth, columns: decision; per label (2x2) rows are stacked
    n: int
    patients: int
    resamples: int
    notes: tuple[str, ...] = ()
    folds: tuple[FoldScores, ...] = ()  # where the test parts of several folds are pooled

    def score(self, metric: str) -> Score:
        """The headline score of a metric: of the positive class, or the macro mean.

        Raises:
            KeyError: the metric was not computed.
        """
        for label in ("macro", "all", self.classes[-1]):
            for score in self.scores:
                if score.metric == metric and score.label == label:
                    return score
        raise KeyError(metric)

    @property
    def metrics(self) -> dict[str, Score]:
        """The headline score of every metric."""
        return {name: self.score(name) for name in dict.fromkeys(s.metric for s in self.scores)}


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A test of no difference between two models; where its p value is ``None``, ``note`` says why."""

    name: str  # and its source
    statistic: float | None
    p_value: float | None  # two-sided
    note: str = ""


Verdict = Literal["superior", "non-inferior", "inconclusive", "inferior"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference of one metric between two models on the same studies, paired by patient."""

    metric: str
    model: str
    reference: str
    difference: Score  # model minus reference
    reference_score: Score
    tests: tuple[PairedTest, ...] = ()
    margin: float | None = None  # by how much the model may be worse and still be non-inferior
    verdict: Verdict | None = None  # by the interval of the difference; None where there is none


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One condition of the gate and how it went."""

    condition: str
    observed: float | None
    passed: bool


Standing = Literal["candidate", "refused", "validated", "approved", "live", "retired"]


@dataclass(frozen=True, slots=True)
class Release:
    """A model that may be asked. How it stands later is for the audit trail to say (:mod:`medtl.registry.history`)."""

    release_id: str
    name: str
    status: Standing  # in its own folder: what the gate made of it
    checks: tuple[GateCheck, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """One strategy, trained on some of the training patients and measured on the test part of a study."""

    strategy: str
    patients: int  # it learned from
    studies: int
    share: float  # of the training patients
    scores: Mapping[str, Score]  # headline score of each metric
    difference: Score | None  # AUROC minus that of the reference, paired by patient
    phase: str  # whose state was kept
    p_value: float | None  # of no difference (DeLong, paired by patient), corrected for all strategies (Holm)
    seconds: float | None  # of training; None where it was done before and nobody measured
    cautions: tuple[str, ...] = ()  # before the difference is believed: where both were not trained alike


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What one way of training makes of so many patients, on the validation part."""

    patients: int  # it learned from
    studies: int
    score: Score


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """One model and the same training on fewer of its patients; a smaller set lies within every larger one."""

    points: tuple[CurvePoint, ...]  # from few patients to all
    note: str = ""  # why there are fewer points than were asked for
    gain: Score | None = None  # of all patients over the next fewer, paired by validation's patients


@dataclass(frozen=True, slots=True)
class Calibrator:
    """How a model's probabilities are made to come true: plain numbers, fitted on validation.

    One temperature for all classes; else one slope and intercept, or one set of knots, for each class (of a binary task
    for the positive one). An empty set of knots leaves its class as it is.
    """

    task: Task
    method: Literal["none", "temperature", "platt", "isotonic"]
    reason: str
    temperature: float = 1.0
    slopes: tuple[float, ...] = ()
    intercepts: tuple[float, ...] = ()
    knots: tuple[tuple[tuple[float, float], ...], ...] = ()  # (probability before, after), ascending
    log_losses: Mapping[str, float] = field(default_factory=dict)  # cross-validated on validation, by method
    patients: int = 0  # of validation


@dataclass(frozen=True, slots=True)
class CalibrationFindings:
    """What the calibrator did on the test part."""

    calibrator: Calibrator
    before: tuple[Score, ...]  # Brier score and calibration error
    after: tuple[Score, ...]
    differences: tuple[Score, ...]  # after minus before, paired by patient
    curves: tuple[Curve, ...]  # after; the label says of which class
    curves_before: tuple[Curve, ...] = ()


@dataclass(frozen=True, slots=True)
class ConformalRule:
    """Which answers remain open for a study: those whose strangeness is at most their threshold.

    One row of thresholds per question: the classes of a single-label task are one, each label of a multi-label task is
    one with the answers absent and present. ``None`` keeps the answer always: validation had too few patients of it.
    """

    task: Task
    classes: tuple[str, ...]
    method: Literal["none", "lac", "aps"]
    coverage: float
    per_class: bool
    thresholds: tuple[tuple[float | None, ...], ...]
    patients: tuple[tuple[int, ...], ...]  # of validation, behind each threshold


@dataclass(frozen=True, slots=True)
class AbstentionFindings:
    """What the conformal sets held on the test part."""

    rule: ConformalRule
    coverage: tuple[Score, ...]  # share of studies whose set holds the truth: all together, then each class
    answered: tuple[Score, ...]  # share of studies with one answer only
    right: tuple[Score, ...]  # share of those in which it is the true one
    set_size: tuple[Score, ...]  # mean number of answers
    patients_covered: tuple[Score, ...]  # share of patients all of whose sets hold the truth
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoveltyRule:
    """How far features lie from the training features; arrays are float32, empty where the method has no use for them.

    ``mahalanobis``: ``centres`` (classes, d), ``whitening`` (d, d); ``relative`` has ``background`` (d, d) too, around
    ``middle`` (1, d). ``knn``: ``references`` (m, d) of length 1.
    """

    method: Literal["none", "mahalanobis", "relative", "knn"]
    reason: str
    threshold: float | None  # above it is flagged; None: validation has too few patients
    flagged_share: float  # of studies like those of validation
    neighbours: int
    patients: int  # of validation
    quantiles: tuple[float, ...]  # of validation's scores: 0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100 %
    scale: FloatArray
    centres: FloatArray
    whitening: FloatArray
    middle: FloatArray
    background: FloatArray
    references: FloatArray


@dataclass(frozen=True, slots=True)
class NoveltyFindings:
    """How the novelty score did on the test part, and on sets that are known to be different."""

    method: str
    reason: str
    threshold: float | None
    promised: float  # flagged share
    flagged: Score
    detection: tuple[Score, ...]  # AUROC of each different set against the test part
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tally:
    """What a release said of some scans, counted: nothing stands beside a scan or a patient."""

    scans: int
    patients: int | None  # None: it is not known whose they are
    answers: Mapping[str, Mapping[str, int]]  # question, answer, scans
    promised: float | None = None  # share unlike training; None: nothing was promised


@dataclass(frozen=True, slots=True)
class Shift:
    """How the answers to one question lie beside those of the release's own test part."""

    question: str
    scans: int
    index: float | None  # population stability index
    by_chance: float | None  # the index that two samples of the same have on average
    p_value: float | None  # of no difference (chi-square), corrected for all questions of the release (Holm)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Drift:
    """What a release met in a period."""

    release_id: str
    uses: int
    scans: int
    left_out: int  # items that intake or the release's plan left out
    strange: Score  # share unlike training
    promised: float | None
    shifts: tuple[Shift, ...] = ()
    alarms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Subgroup:
    """One group of the test part; counts are ``None`` and scores are missing where they could single somebody out."""

    column: str
    value: str  # or unknown
    label: str  # the class it is measured for
    n: int | None
    patients: int | None
    prevalence: float | None
    scores: tuple[Score, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Gap:
    """The largest difference between two groups of a column."""

    column: str
    label: str
    metric: str
    best: str
    worst: str
    difference: Score  # best minus worst; its interval holds for all differences at once
    p_adjusted: float | None  # corrected for all differences looked at
    statement: str


@dataclass(frozen=True, slots=True)
class SubgroupFindings:
    """For whom the model works less well."""

    groups: tuple[Subgroup, ...]
    gaps: tuple[Gap, ...]
    differences: int  # looked at, together
    level: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether one thing is told by another that should not tell it: an AUROC beside what chance gives."""

    question: str  # what was asked, in one phrase
    auroc: Score  # mean over the values
    chance: float | None  # mean AUROC after permutation of patients
    chance_high: float | None  # its 95 % quantile
    p: float | None  # share of permutations at least as high
    values: int  # that were told apart
    alarm: str  # what it means; empty where nothing was found


@dataclass(frozen=True, slots=True)
class ShortcutFindings:
    """Ways to the right answer that no patient is helped by."""

    source: tuple[Probe, ...]  # site and scanner from the features
    association: tuple[Probe, ...]  # the label from site and scanner alone
    properties: Probe | None  # the label from brightness, size and the like
    model_minus_properties: Score | None
    alarms: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SanityCheck:
    """Whether maps change when the network forgets what it learned, stage by stage from the head down."""

    method: str
    images: int  # whose maps show anything
    draws: int  # of random weights
    correlations: tuple[tuple[str, float | None], ...]  # stage, mean rank correlation once it and all above are random
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """With nothing left of what was learned, the maps are others; ``None`` where not estimable."""
        last = self.correlations[-1][1]
        return None if last is None else last < self.bound

    @property
    def verdict(self) -> str:
        """Say it in words."""
        words = {True: "depends on what was learned", False: "does not depend on what was learned"}
        return "not estimable" if self.passed is None else words[self.passed]


@dataclass(frozen=True, slots=True)
class PointingFindings:
    """Whether maps point at what a person marked, beside what a map that knows nothing would."""

    method: str
    label: str  # the class that was asked about
    tolerance: float  # pixels by which the highest place may miss the mark
    hits: Score  # share of studies whose highest place is in the mark
    hits_chance: Score  # share of the image that is
    hits_gain: Score  # hits minus chance
    inside: Score  # share of the positive relevance that is in the mark
    inside_chance: Score
    inside_gain: Score
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StressTest:
    """How a model does on its test part, changed in one way."""

    name: str  # of the change
    strength: Literal["mild", "strong"]
    meaning: str
    auroc: Score
    difference: Score  # changed minus as it was, paired by patient
    changed: float  # share of studies whose most probable class is another one


@dataclass(frozen=True, slots=True)
class Robustness:
    """How a model bears what another scanner or hand does to images."""

    tests: tuple[StressTest, ...]


@dataclass(frozen=True, slots=True)
class Examination:
    """What a model's answers are worth beyond the metrics."""

    calibration: CalibrationFindings
    abstention: AbstentionFindings
    novelty: NoveltyFindings
    subgroups: SubgroupFindings
    shortcuts: ShortcutFindings
    robustness: Robustness = Robustness(())
    neighbours: FeatureCheck | None = None  # None: the features were not compared


@dataclass(frozen=True, slots=True)
class Case:
    """One answer of the test part, with its picture and where the network looked; nothing says whose it is."""

    right: bool
    truth: str
    decision: str
    probability: float
    picture: str  # PNG, base64
    looked_at: str  # PNG, base64: the picture with relevance in colour


@dataclass(frozen=True, slots=True)
class Explanations:
    """The surest wrong and right answers, and whether the maps depend on what was learned."""

    method: str  # how the maps were made
    cases: tuple[Case, ...]
    sanity: SanityCheck | None
    note: str = ""
    pointing: tuple[PointingFindings, ...] = ()  # one for each class that was drawn
