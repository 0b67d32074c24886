"""What can be changed, one frozen section per room; a config path is a code path.

``dataset.split`` is :class:`SplitConfig` is ``medtl/dataset/split.py``. A function receives its own section, never
the whole. Unknown keys are errors that name the nearest known one; there is no inheritance and nothing is evaluated.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from medtl.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_DEPTH = 50
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Action = Literal["reject", "quarantine", "repair", "accept"]


class ChecksConfig(Section):
    """What becomes of a scan that a check finds something in (medtl/scans/checks.py)."""

    policy: Mapping[str, Action] = Field(
        default_factory=dict,
        description="code: reject, quarantine, repair or accept; `medtl show codes CONFIG` lists codes and defaults",
    )


Uid = Annotated[str, Field(pattern=r"^[0-9.]{1,64}$")]
AeTitle = Annotated[str, Field(pattern=r"^[!-\[\]-~][ -\[\]-~]{0,15}$")]  # printable ASCII without the backslash
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class QueryConfig(Section):
    """Which series of an archive are fetched; at least one key, so that nobody fetches a whole archive by accident."""

    study_date: str | None = Field(
        None, pattern=r"^(\d{8}|\d{8}-|-\d{8}|\d{8}-\d{8})$", description="YYYYMMDD, or a range: 20260101-20260131"
    )
    last_days: int | None = Field(None, ge=0, le=36_500, description="studies of today and this many days before")
    modality: tuple[Annotated[str, Field(pattern=r"^[A-Z]{2,16}$")], ...] = Field((), description="[CT, MR]")
    study_uid: tuple[Uid, ...] = Field((), max_length=1000)
    series_uid: tuple[Uid, ...] = Field((), max_length=1000, description="only together with study_uid")

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not any((self.study_date, self.last_days is not None, self.modality, self.study_uid)):
            raise ValueError(
                "name study_date, last_days, modality or study_uid: an empty query means the whole archive"
            )
        if self.study_date and self.last_days is not None:
            raise ValueError("study_date and last_days say the same thing twice: keep one")
        if self.series_uid and not self.study_uid:
            raise ValueError("series_uid wants study_uid beside it: archives are asked from the study down")
        return self


class ListenConfig(Section):
    """The port where others send scans with C-STORE (medtl/scans/pacs.py)."""

    address: str = Field("127.0.0.1", min_length=1, description="network address to open; 0.0.0.0 is every one")
    port: int = Field(11112, ge=0, le=65535, description="0: any free one")
    ae_title: AeTitle = Field("MEDTL", description="what senders call this program")
    callers: tuple[AeTitle, ...] = Field((), description="AE titles that may send; empty: nobody")
    max_associations: int = Field(8, ge=1, le=64, description="senders at one time")
    max_object_mb: float = Field(2048.0, gt=0, description="a larger object is refused while it is received")
    min_free_mb: float = Field(1024.0, ge=0, description="objects are refused while the disk has less free space")
    max_pdu: int = Field(131_072, ge=4096, le=4_194_304, description="bytes in one network message")
    timeout_s: float = Field(30.0, gt=0, le=3600, description="a sender that is silent for longer is cut off")
    cert_file: Path | None = Field(None, description="TLS certificate of this program; with key_file")
    key_file: Path | None = Field(None, description="TLS key of this program (PEM)")
    ca_file: Path | None = Field(None, description="senders must show a certificate that this authority signed")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if self.ca_file is not None and self.cert_file is None:
            raise ValueError("ca_file asks senders for certificates: give cert_file and key_file too")
        return self


class PacsConfig(Section):
    """An archive that scans are fetched from, and the port where others send them (medtl/scans/pacs.py)."""

    kind: Literal["cget", "cmove", "dicomweb"] | None = Field(
        None, description="how scans are fetched; null: they are only received (listen)"
    )
    host: str | None = Field(None, min_length=1, description="of the archive, for cget and cmove")
    port: int = Field(104, ge=1, le=65535, description="of the archive, for cget and cmove")
    called_ae: AeTitle | None = Field(None, description="AE title of the archive, for cget and cmove")
    calling_ae: AeTitle = Field("MEDTL", description="AE title that the archive knows this program by")
    url: str | None = Field(
        None, pattern=r"^https?://[^@\s?#]+$", description="root of the archive's DICOMweb, for dicomweb"
    )
    query: QueryConfig | None = Field(None, description="which series are fetched")
    listen: ListenConfig | None = Field(None, description="where cmove and other senders deliver")
    workers: int = Field(2, ge=1, le=16, description="dicomweb: objects fetched at one time")
    retries: int = Field(3, ge=0, le=20, description="further attempts, each after a longer pause")
    timeout_s: float = Field(60.0, gt=0, le=3600, description="the archive may be silent this long")
    max_object_mb: float = Field(2048.0, gt=0, description="a larger object is refused while it is received")
    min_free_mb: float = Field(1024.0, ge=0, description="nothing is fetched while the disk has less free space")
    tls: bool = Field(False, description="cget and cmove over TLS; dicomweb: https in url")
    ca_file: Path | None = Field(
        None, description="authority that signed the archive's certificate; default: the system's"
    )
    cert_file: Path | None = Field(None, description="certificate shown to the archive; with key_file")
    key_file: Path | None = None
    username_env: EnvName | None = Field(None, description="dicomweb: environment variable that holds the user's name")
    password_env: EnvName | None = Field(None, description="dicomweb: environment variable that holds the password")
    token_env: EnvName | None = Field(None, description="dicomweb: environment variable that holds a bearer token")

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> Self:
        if self.kind in ("cget", "cmove") and not (self.host and self.called_ae):
            raise ValueError(f"{self.kind} needs host and called_ae")
        if self.kind == "dicomweb" and self.url is None:
            raise ValueError("dicomweb needs url")
        if self.kind == "cmove" and not (self.listen and self.listen.callers):
            raise ValueError("cmove needs listen, with the archive's AE title in listen.callers")
        if self.kind is not None and self.query is None:
            raise ValueError(f"{self.kind} needs query: which series to fetch")
        if self.kind is None and self.listen is None:
            raise ValueError("name a kind to fetch scans, or listen to receive them")
        return self

    @model_validator(mode="after")
    def _secrets_stay_secret(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if (self.username_env is None) != (self.password_env is None):
            raise ValueError("username_env and password_env go together")
        if self.token_env and self.username_env:
            raise ValueError("give a token or a user's name and password, not both")
        return self


class DeidentifyConfig(Section):
    """What `medtl deidentify` keeps, by the options of DICOM PS3.15 Annex E (medtl/scans/deidentify.py)."""

    dates: Literal["shift", "retain", "remove"] = Field("shift", description="shift: whole days, one shift per patient")
    retain_uids: bool = Field(False, description="keep identifiers of study, series and object")
    retain_patient_characteristics: bool = Field(False, description="keep sex, size, weight and age (90 and above: 90)")
    retain_device: bool = Field(False, description="keep what names the device")
    retain_institution: bool = Field(False, description="keep what names the institution")
    retain_safe_private: bool = Field(
        False, description="keep private numbers on a short list of ours that count as safe"
    )
    descriptor_words: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9.+/-]{1,64}$")], ...] = Field(
        (), description="words that may stay in descriptions; all others are removed"
    )


class ScansConfig(Section):
    """Where files come from and how pixels are read (medtl/scans)."""

    source: Path | None = Field(None, description="folder, or one file; read only")
    window: Literal["none", "header"] | tuple[float, float] = Field(
        "none", description="VOI window: none keeps the full depth, header uses the file's own, or [centre, width]"
    )
    max_megapixels: float = Field(100.0, gt=0, description="a larger image is refused from its header")
    max_file_mb: float = Field(2048.0, gt=0, description="a larger file is refused before it is read")
    key_file: Path | None = Field(
        None, description="secret key of the pseudonyms; default: medtl/pseudonym.key in the user's config folder"
    )
    workers: int = Field(2, ge=1, le=64, description="threads that read and decode")
    pacs: PacsConfig | None = Field(None, description="scans over the network, beside or instead of source")
    read: Literal["auto", "images", "volumes"] = Field(
        "auto", description="auto: series with geometry and several slices become volumes, all others images"
    )
    stable_seconds: float = Field(2.0, ge=0, le=3600, description="age at which a file counts as written to its end")
    max_archive_files: int = Field(200_000, ge=1, description="files in one zip archive")
    max_archive_ratio: float = Field(200.0, ge=1, description="how many times its size an archive may grow")
    max_volume_mb: float = Field(8192.0, gt=0, description="a larger volume is refused from its headers")
    checks: ChecksConfig = ChecksConfig()
    deidentify: DeidentifyConfig = DeidentifyConfig()

    @model_validator(mode="after")
    def _window_has_a_width(self) -> Self:
        if isinstance(self.window, tuple) and self.window[1] <= 0:
            raise ValueError("window is [centre, width], and the width is more than 0")
        return self


MaskValue = Annotated[int, Field(ge=1, le=65_535)]
RegionName = Annotated[str, Field(min_length=1, max_length=64)]
Shown = MaskValue | RegionName


class LabelsConfig(Section):
    """The label table and the names of its columns (medtl/studies/labels.py)."""

    table: Path | None = Field(
        Path("labels.csv"), description="CSV, relative to scans.source; null: labels in the .npz"
    )
    path: str | None = Field("path", description="column that holds the file's path (or bare name) below the source")
    uid: str | None = Field(None, description="column that holds a SOP, series or study instance UID, instead of path")
    label: str | tuple[str, ...] = Field(
        "label", description="column of the class; several columns: one 0/1 label each"
    )
    patient: str | None = Field("patient", description="column of the patient; null: the DICOM header's")
    groups: tuple[str, ...] = Field(
        (), description="columns of what else stays on one side of a split: [lesion, source]; blank cells link nothing"
    )
    site: str | None = None
    sex: str | None = None
    age: str | None = Field(None, description="column of the age in years")
    attributes: tuple[str, ...] = Field(
        (),
        max_length=8,
        description="columns of further subgroups: [view, department]; in the table's own words, at most 20 in each",
    )
    split: str | None = Field(None, description="column that holds train, val or test")
    classes: tuple[str, ...] | None = Field(
        None, description="order of the classes; the last of two is the positive one"
    )
    mask: str | None = Field(
        None, description="segmentation: column that holds the path (or bare name) of the scan's mask, instead of label"
    )
    field: str | None = Field(
        None, description="segmentation: column that holds the path of a mask outside of which nothing counts"
    )
    structures: Mapping[Name, Shown | tuple[Shown, ...]] = Field(
        default_factory=dict,
        description="segmentation: name of each structure and its value in the masks; [1, 2]: a region of several; of "
        "DICOM SEG and RT structures the number of a region, or its name, in capitals or not: [Liver, liver 2]",
    )
    other_regions: Literal["refuse", "background"] = Field(
        "refuse", description="segmentation: background, where what structures does not name of a DICOM mask is nothing"
    )
    ignore: int | None = Field(None, ge=1, le=65_535, description="segmentation: value of voxels that do not count")
    box: tuple[str, str, str, str] | None = Field(
        None,
        description="diagnosis of images: columns of a box around the finding, [x0, y0, x1, y1], in pixels of the "
        "upright image, x to the right, y downwards, x1 and y1 just outside; four blank cells: no box",
    )
    empty_masks: Literal["exclude", "keep"] = Field(
        "exclude", description="segmentation: keep, where a scan without any structure is meant (no lesion)"
    )

    @model_validator(mode="after")
    def _masks_have_structures(self) -> Self:
        if self.mask is not None and self.table is None:
            raise ValueError("masks are named by a label table: give table too")
        if (self.mask is None) != (not self.structures):
            raise ValueError("mask and structures go together: the column of the masks, and what their values mean")
        if self.mask is None and (self.field is not None or self.ignore is not None):
            raise ValueError("field and ignore are of masks: name the column mask too")
        if self.box is not None and (self.mask is not None or self.table is None):
            raise ValueError("box is of a diagnosis whose labels are in a table: a segmentation names masks")
        shown = [(one,) if isinstance(one, int | str) else one for one in self.structures.values()]
        values = {v.casefold() if isinstance(v, str) else v for one in shown for v in one}
        words = {isinstance(v, str) for v in values}
        if len(words) > 1 or (self.ignore is not None and True in words):
            raise ValueError("structures are told by values, ignore among them, or by names of regions, not by both")
        several = [{str(v).casefold() for v in one} for one in shown]
        if self.ignore in values or any(len(own) < max(len(one), 1) for own, one in zip(several, shown, strict=True)):
            raise ValueError("a structure has a value of its own or several different ones, and none of them is ignore")
        return self

    @model_validator(mode="after")
    def _attributes_are_nothing_else(self) -> Self:
        if self.attributes and self.table is None:
            raise ValueError("attributes are columns of a label table: give table too")
        keys = (self.path, self.uid, self.patient, self.site, self.sex, self.age, self.split, self.mask, self.field)
        labels = (self.label,) if isinstance(self.label, str) else self.label
        several = (*labels, *self.groups, *(self.box or ()), "site", "sex", "age")
        taken = {name.casefold() for name in (*keys, *several) if name is not None}
        for at, name in enumerate(self.attributes):
            if name.casefold() in taken:
                raise ValueError(f"'{name}' cannot be one of attributes: another key of studies.labels is for it")
            if name in self.attributes[:at]:
                raise ValueError(f"'{name}' is twice among attributes: name it once")
        return self


class StudiesConfig(Section):
    """How scans and labels become a cohort (medtl/studies)."""

    labels: LabelsConfig = LabelsConfig()
    image_is_patient: bool = Field(False, description="with no patient column: take each image as one patient")


class SplitConfig(Section):
    """Who is in which part (medtl/dataset/split.py)."""

    val: Fraction = 0.15
    test: Fraction = 0.2
    allow_leaky_split: bool = Field(
        False, description="use a predefined split that has somebody on two sides; every page says so"
    )
    pretraining_hashes: Path | None = Field(
        None, description="hashes of the images the weights were trained on, one a line; they may be in training only"
    )
    near_in_features: bool = Field(
        True, description="look-alikes are also looked for by the features of the pretrained network (2-D backbones)"
    )

    @model_validator(mode="after")
    def _some_left_to_train(self) -> Self:
        if not 0 < self.val + self.test < 1:
            raise ValueError("val and test together must be more than 0 and less than 1")
        return self


class PlanConfig(Section):
    """Bounds of what the plan may decide (medtl/dataset/plan.py)."""

    size: int | None = Field(None, ge=16, le=2048, description="rows and columns; null: from the training images")
    max_size: int = Field(224, ge=16, le=2048, description="largest size the plan may choose by itself")
    channels: Literal[1, 3] | None = None
    intensity: Literal["auto", "fixed", "per_image"] = "auto"
    percentiles: tuple[float, float] = (0.5, 99.5)
    volumes: Literal["slices", "whole"] | None = Field(
        None, description="how a volume is shown; null: slices to a backbone of two dimensions, whole to one of three"
    )
    axis: Literal["auto", "axial", "coronal", "sagittal"] = Field(
        "auto", description="how volumes are sliced; auto: along the axis in which most training volumes are coarsest"
    )
    slices: int | None = Field(
        None, ge=1, le=512, description="slices shown of a volume, evenly spaced; null: the training median, at most 32"
    )
    neighbours: int = Field(0, ge=0, le=3, description="2.5-D: slices on each side, as further channels of a slice")
    depth: int | None = Field(
        None, ge=16, le=512, description="slices of a whole volume; null: from the training median, at most 96"
    )

    @model_validator(mode="after")
    def _percentiles_span(self) -> Self:
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("percentiles are two numbers between 0 and 100, the lower one first")
        return self


class TransformsConfig(Section):
    """Random augmentation of training images (medtl/dataset/transforms.py)."""

    flip_horizontal: bool = True
    flip_vertical: bool = False
    rotate_degrees: float = Field(15.0, ge=0, le=180)
    scale: float = Field(0.1, ge=0, lt=1, description="zoom drawn from 1 ± scale")
    shift: float = Field(0.05, ge=0, lt=0.5, description="of the image's side")
    brightness: float = Field(0.1, ge=0, lt=1)
    contrast: float = Field(0.1, ge=0, lt=1)


class FoldsConfig(Section):
    """How `medtl crossval` divides a cohort (medtl/dataset/folds.py)."""

    by: Literal["patient", "site"] = Field("patient", description="site: each site is left out once")
    count: int = Field(5, ge=2, le=50, description="folds, by patient")
    repeats: int = Field(1, ge=1, le=100, description="times that patients are dealt out anew")


class GridConfig(Section):
    """Segmentation: bounds of what the plan may decide (medtl/dataset/grid.py)."""

    dimensions: Literal[2, 3] | None = Field(
        None, description="of a patch; null: 3 for volumes, 2 where slices are three times as far apart as pixels"
    )
    spacing_mm: tuple[Annotated[float, Field(gt=0, le=100)], ...] | None = Field(
        None, description="[slices, rows, columns] in mm; null: the training median"
    )
    neighbours: int = Field(0, ge=0, le=3, description="2.5-D: slices on each side, as further channels of a slice")
    intensity: Literal["auto", "window", "zscore", "nyul", "unit"] = Field(
        "auto", description="auto: window (percentiles of the foreground) for CT, zscore for MR, unit for pictures"
    )
    patch: tuple[Annotated[int, Field(ge=8, le=1024)], ...] | None = Field(
        None, description="size of what the network is trained on; null: from shapes and memory"
    )
    batch_size: int | None = Field(None, ge=1, le=256, description="patches; null: from memory")
    memory_gb: float = Field(4.0, gt=0, le=1024, description="that a training step may take")
    filters: int = Field(32, ge=4, le=256, description="channels of the network's first level")
    mirror: bool | None = Field(
        None,
        description="mirror patches in augmentation; null: pictures along both axes, bodies left to right, not along "
        "an axis on which a structure keeps to one side",
    )


class PatchesConfig(Section):
    """Segmentation: how patches are drawn and augmented (medtl/dataset/patches.py)."""

    per_study: int = Field(1, ge=1, le=1000, description="patches of each training study in an epoch")
    foreground: Fraction = Field(0.33, description="share of patches centred on a structure, each as often as others")
    rotate_degrees: float = Field(15.0, ge=0, le=180)
    scale: float = Field(0.2, ge=0, lt=1, description="zoom drawn from 1 ± scale")
    elastic: float = Field(
        0.0, ge=0, le=0.5, description="displacement at most, of the patch's side; up to 0.1 nothing folds"
    )
    warped: Fraction = Field(0.5, description="share of patches that are rotated, scaled and deformed")
    noise: float = Field(0.1, ge=0, le=2, description="standard deviation of added noise at most, of the patch's own")
    blur: float = Field(1.0, ge=0, le=5, description="standard deviation of blurring at most, in voxels")
    brightness: float = Field(0.15, ge=0, le=1, description="offset at most, of the patch's standard deviation")
    contrast: float = Field(0.25, ge=0, lt=1, description="gain drawn from 1 ± contrast")
    gamma: float = Field(0.3, ge=0, lt=1, description="exponent drawn from 1 ± gamma")
    colour: float = Field(
        0.0,
        ge=0,
        le=1,
        description="pictures in colour: each channel's gain drawn from e^±colour, its offset at most "
        "so much of its standard deviation",
    )
    low_resolution: Fraction = Field(0.15, description="share of patches that lose resolution")


class DatasetConfig(Section):
    """Cohort to arrays (medtl/dataset)."""

    split: SplitConfig = SplitConfig()
    folds: FoldsConfig = FoldsConfig()
    plan: PlanConfig = PlanConfig()
    transforms: TransformsConfig = TransformsConfig()
    grid: GridConfig = GridConfig()
    patches: PatchesConfig = PatchesConfig()


_TAGS = ("<name>", "<list>")  # of a value that may be either; no part of a path
Strategy = Literal["features", "probe", "staged", "lp-ft", "full", "scratch"]


class PhaseConfig(Section):
    """One phase of unfreezing (medtl/model/phases.py)."""

    name: Name
    unfreeze: Literal["head", "all"] | int | tuple[str, ...] = Field(
        description="head, all, the number of last trunk stages, or their names"
    )
    head: Literal["gradient", "logistic_regression", "linear_svm", "knn"] = Field(
        "gradient", description="how the head learns: by gradient, or by scikit-learn on the trunk's features"
    )
    epochs: int = Field(1, ge=1, le=10_000)
    lr: float = Field(1e-3, gt=0, le=10, description="peak learning rate of the head")
    decay: float = Field(0.5, gt=0, le=1, description="factor on the learning rate per stage below the head")
    optimiser: Literal["adamw", "sgd"] = Field("adamw", description="sgd: with momentum 0.9")
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the learning rate, to zero")
    warmup: Fraction = Field(0.1, description="share of the steps in which the learning rate rises to its peak")
    batchnorm: Literal["frozen", "with_stage"] = Field(
        "frozen", description="BatchNorm of unfrozen stages: frozen too, or trained with its stage"
    )
    augment: bool = True
    views: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto", "live"] = Field(
        "auto",
        description="augmented views of each image, drawn once and cycled; live: a new one each epoch; "
        "auto: 4 where a trunk is frozen, else live",
    )
    patience: int | None = Field(None, ge=1, description="stop after so many epochs without a better model.monitor")
    loss: Literal["cross_entropy", "focal", "class_balanced"] = Field(
        "cross_entropy", description="focal: gamma 2; class_balanced: weighted by the inverse frequency of the classes"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    mixup: float = Field(0.0, ge=0, le=10, description="alpha of mixup's Beta distribution; 0: off; needs live images")
    l2_sp: float = Field(0.0, ge=0, description="pull of the trunk towards the weights it started from")

    @property
    def cycled(self) -> int | None:
        """How many views are drawn once and cycled; None where every epoch has views of its own."""
        if not self.augment or self.mixup or self.views == "live":
            return None
        if self.views == "auto":
            return None if self.unfreeze == "all" else 4
        return self.views

    @model_validator(mode="after")
    def _solver_fits_the_head_alone(self) -> Self:
        if self.head == "gradient":
            return self
        if self.unfreeze != "head":
            raise ValueError(f"head: {self.head} learns on frozen features, so unfreeze must be head")
        if self.mixup or self.l2_sp or self.patience or self.epochs != 1:
            raise ValueError(f"head: {self.head} is solved once: epochs, patience, mixup and l2_sp do not apply")
        return self


_ALL = {"unfreeze": "all", "decay": 1.0}
STRATEGIES: Mapping[str, tuple[PhaseConfig, ...]] = {
    "features": (PhaseConfig(name="features", unfreeze="head", head="logistic_regression", augment=False),),
    "probe": (PhaseConfig(name="probe", unfreeze="head", epochs=10, lr=2e-3, augment=False),),
    "staged": (
        PhaseConfig(name="head", unfreeze="head", epochs=4, lr=2e-3, augment=False),
        PhaseConfig(name="last", unfreeze=1, epochs=3, lr=1e-3, decay=0.7),
        PhaseConfig(name="deep", unfreeze=2, epochs=3, lr=7e-4, decay=0.7),
        PhaseConfig(name="all", unfreeze="all", epochs=6, lr=5e-4, decay=0.8),
    ),
    "lp-ft": (  # Kumar et al., ICLR 2022: the head first, so that fine-tuning does not distort the features
        PhaseConfig(name="probe", unfreeze="head", epochs=10, lr=2e-3, augment=False),
        PhaseConfig(name="all", epochs=8, lr=3e-4, **_ALL),
    ),
    "full": (PhaseConfig(name="full", epochs=10, lr=5e-4, **_ALL),),
    "scratch": (PhaseConfig(name="scratch", epochs=15, lr=3e-4, batchnorm="with_stage", **_ALL),),
}


class CacheConfig(Section):
    """Activations of frozen layers, kept instead of computed again (medtl/model/cache.py).

    The cache never changes a result: an uncached run hands the same numbers on.
    """

    use: Literal["auto", "always", "never"] = Field("auto", description="auto: where it saves time and fits the budget")
    numbers: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="what a frozen trunk hands on, cached or not; auto: bf16 where it computes in it, else fp16"
    )
    budget_gb: float = Field(20.0, ge=0, description="disk that cached activations may take; the oldest are removed")


class SegmenterConfig(Section):
    """Segmentation: the network and what it learns by (medtl/model/segmenter.py)."""

    network: Literal[
        "auto", "unet", "dynunet", "segresnet", "attention_unet", "unetr", "swin_unetr", "encoder_unet"
    ] = Field(
        "auto",
        description="auto: dynunet, or encoder_unet where weights are wanted; encoder_unet: U-Net decoder on "
        "model.backbone",
    )
    deep_supervision: bool = Field(True, description="dynunet and encoder_unet: coarser outputs learn too")
    norm: Literal["instance", "batch"] = Field(
        "instance", description="batch: by what training measured, so that tiles of a scan give what the whole gives"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of a network that is not encoder_unet")
    loss: Literal["dice_ce", "dice_focal", "dice", "ce"] = "dice_ce"
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the running mean of the weights, which is kept; 0: off")
    members: int = Field(
        1,
        ge=1,
        le=20,
        description="networks whose probabilities are averaged, each trained without one fold of the training part",
    )
    refit: bool = Field(
        False,
        description="train a second network on training and validation together, as long as the first one's best "
        "state took; the second is tested and released, what validation decides the first decides",
    )
    validate_every: int | None = Field(
        None, ge=1, description="epochs from one validation to the next; null: 15 validations in a phase"
    )

    @model_validator(mode="after")
    def _refit_is_one_network(self) -> Self:
        if self.refit and self.members > 1:
            raise ValueError("refit and members are two ways to use more of the patients: set one of them")
        return self


class InferenceConfig(Section):
    """Segmentation: how whole scans are predicted (medtl/model/inference.py)."""

    way: Literal["auto", "whole", "tiles", "windows"] = Field(
        "auto", description="auto: the whole scan in one pass where it fits, exact tiles, else weighted windows"
    )
    overlap: float = Field(0.5, ge=0, lt=1, description="of windows")
    mirror: bool = Field(False, description="also predict mirrored (along the axes of augmentation), and average")
    memory_gb: float = Field(4.0, gt=0, le=1024, description="that a pass may take")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="as of training")
    skip_empty: bool = Field(
        False,
        description="call what has one value throughout background, unseen; only where that is so by definition, "
        "since a network may say something else of it",
    )


class ReconstructConfig(Section):
    """Pre-training without labels, `medtl pretrain`: what is hidden, and for how long (medtl/model/reconstruct.py)."""

    hidden: float = Field(0.75, gt=0, lt=1, description="share of a patch's blocks that are hidden")
    blocks: int = Field(6, ge=2, le=64, description="along each side of a patch; a block is 4 voxels wide at least")
    loss: Literal["l2", "l1"] = Field("l2", description="of hidden voxels: squared or absolute difference")
    epochs: int = Field(100, ge=1, le=100_000)
    lr: float = Field(1e-3, gt=0, le=10, description="peak learning rate; everything learns, from nothing")


class ModelConfig(Section):
    """The network, its weights and its phases (medtl/model)."""

    backbone: str = "resnet18"
    weights: str = Field("imagenet", description="none, imagenet, vault:NAME, or a file (.pth, .safetensors)")
    fetch: bool = Field(True, description="imagenet weights that the vault lacks may be downloaded")
    vault: Path | None = Field(None, description="folder of the weight vault; default: weights in the workspace")
    min_share: Fraction = Field(
        0.9, description="least share of the trunk that must load, else the weights are refused"
    )
    phases: Annotated[
        Annotated[Strategy, Tag(_TAGS[0])] | Annotated[tuple[PhaseConfig, ...], Field(min_length=1), Tag(_TAGS[1])],
        Discriminator(lambda given: _TAGS[0] if isinstance(given, str) else _TAGS[1]),
    ] = Field(
        "staged", description="a strategy by name (`medtl show strategies CONFIG` spells them out), or a list of phases"
    )
    cache: CacheConfig = CacheConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    inference: InferenceConfig = InferenceConfig()
    reconstruct: ReconstructConfig = ReconstructConfig()
    monitor: Literal["auroc", "average_precision", "balanced_accuracy", "loss"] = Field(
        "auroc", description="validation metric that chooses the best epoch and phase"
    )
    guard: Fraction = Field(
        0.8,
        description="a later phase replaces an earlier one if it is better in this share of validation resamples",
    )
    batch_size: int = Field(32, ge=2, le=4096)
    accumulate: int = Field(1, ge=1, le=1024, description="parts a batch is computed in, where memory is short")
    dropout: float = Field(0.2, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of training; auto: bf16 where the machine computes in it natively, else fp32"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    processes: int = Field(1, ge=1, le=64, description="processes that train together (torchrun), one a GPU")
    save_every_s: float = Field(20.0, ge=0, description="a crash costs at most so many seconds of training")
    threads: int | None = Field(None, ge=1, description="CPU threads; bits depend on it; default: the cores it may use")
    scratch: bool = Field(False, description="train the same network without weights too, on the same split or folds")
    scratch_phases: tuple[PhaseConfig, ...] | None = Field(
        None,
        description="default: strategy scratch, of a segmentation as the phase that unfreezes all at the highest rate; "
        "at least as many epochs as all phases together",
    )

    @property
    def schedule(self) -> tuple[PhaseConfig, ...]:
        """The phases, spelled out."""
        return STRATEGIES[self.phases] if isinstance(self.phases, str) else self.phases

    @property
    def origin(self) -> str:
        """Where the weights come from; strategy scratch takes none, whatever ``weights`` says."""
        return "none" if self.phases == "scratch" else self.weights

    @model_validator(mode="after")
    def _phases_follow_one_another(self) -> Self:
        names = [phase.name for phase in self.schedule]
        if len(set(names)) < len(names):
            raise ValueError("two phases have the same name")
        if any(phase.head == "knn" for phase in self.schedule[:-1]):
            raise ValueError("a head of nearest neighbours cannot learn further: make it the last phase")
        return self

    @model_validator(mode="after")
    def _parts_are_not_empty(self) -> Self:
        if self.accumulate > self.batch_size:
            raise ValueError("accumulate cuts a batch into more parts than it has images")
        return self


class ThresholdConfig(Section):
    """How the operating point is chosen on validation (medtl/evaluation/threshold.py)."""

    rule: Literal["youden", "sensitivity", "specificity", "cost"] = "youden"
    target: Fraction = Field(0.9, description="wanted sensitivity or specificity")
    cost: float = Field(1.0, gt=0, le=1e6, description="of rule cost: false alarms that weigh as much as one miss")
    prevalence: float | None = Field(
        None, gt=0, lt=1, description="of rule cost: share of diseased where the model serves; default: validation's"
    )


IntervalMethod = Literal["auto", "percentile", "bca", "analytic"]


class UncertaintyConfig(Section):
    """Patients drawn again, and left out one by one (medtl/evaluation/uncertainty.py)."""

    method: IntervalMethod = Field(
        "auto",
        description="auto: Student's t on a scale that fits the metric, which holds the truth also with few patients; "
        "percentile and bca: of the bootstrap; analytic: DeLong for AUROC, Wilson for shares, auto for the rest",
    )
    resamples: int = Field(2000, ge=100, le=100_000)
    level: float = Field(0.95, gt=0.5, lt=1)


class CalibrationConfig(Section):
    """How probabilities are made to come true, fitted on validation (medtl/evaluation/calibration.py)."""

    method: Literal["none", "auto", "temperature", "platt", "isotonic"] = Field(
        "auto", description="auto: the simplest with the lowest cross-validated log loss on validation, or none"
    )
    fewest_patients: int = Field(
        10, ge=2, description="patients with and without a class that validation needs; with fewer nothing is fitted"
    )


class AbstentionConfig(Section):
    """When the model should not answer, by conformal prediction (medtl/evaluation/abstention.py)."""

    method: Literal["none", "lac", "aps"] = Field(
        "lac", description="lac: small sets; aps: larger ones for studies that are hard; none: always answer"
    )
    coverage: float = Field(0.9, ge=0.5, lt=1, description="wanted share of studies whose set holds the true class")
    per_class: bool = Field(
        True, description="promise it to the studies of each class, not only to all studies together"
    )


class NoveltyConfig(Section):
    """How far a study is from what the model was trained on (medtl/evaluation/novelty.py)."""

    method: Literal["none", "mahalanobis", "relative", "knn"] = Field(
        "mahalanobis", description="relative: less the distance to all classes together; knn keeps training features"
    )
    flagged_share: float = Field(0.05, gt=0, le=0.5, description="of studies like those of validation")
    neighbours: int = Field(10, ge=1, le=1000, description="of knn: the distance to which neighbour counts")


class SubgroupsConfig(Section):
    """For whom the model works less well (medtl/evaluation/subgroups.py)."""

    age_edges: tuple[Annotated[float, Field(gt=0, lt=150)], ...] = Field(
        (18.0, 40.0, 60.0, 80.0), description="years at which a new age band begins, ascending"
    )
    fewest_patients: int = Field(10, ge=1, description="a group of fewer is shown as too few")
    fewest_of_an_outcome: int = Field(5, ge=1, description="patients with, and without, the finding")

    @model_validator(mode="after")
    def _edges_ascend(self) -> Self:
        if list(self.age_edges) != sorted(set(self.age_edges)):
            raise ValueError("age_edges ascend, for instance [18, 40, 60, 80]")
        return self


class MasksConfig(Section):
    """Segmentation: how predicted masks are measured and cleaned (medtl/evaluation/masks.py)."""

    tolerance_mm: float = Field(1.0, gt=0, le=100, description="of the normalised surface distance; images: pixels")
    convention: Literal["surfels", "voxels"] = Field("surfels", description="what a surface is made of")
    empty: Literal["unknown", "agree"] = Field("unknown", description="what two empty masks are")
    lesions: bool = Field(False, description="also count the separate lesions that were found, missed and invented")
    lesion_iou: Fraction = Field(0.1, description="overlap from which a lesion counts as found")
    components: Literal["auto", "all", "largest"] = Field(
        "auto", description="what is kept of each structure; auto: the largest part alone where validation is better"
    )
    holes: Literal["auto", "keep", "fill"] = Field(
        "auto", description="what becomes of holes in each structure; auto: filled where validation is better"
    )
    fail_below: Fraction = Field(0.7, description="Dice below which a mask counts as failed, and is to be flagged")


class EvaluationConfig(Section):
    """What is measured on the test part (medtl/evaluation)."""

    threshold: ThresholdConfig = ThresholdConfig()
    uncertainty: UncertaintyConfig = UncertaintyConfig()
    calibration_bins: int = Field(10, ge=2, le=100)
    margin: float | None = Field(
        None, gt=0, lt=1, description="by how much a model may be worse than its reference and still be non-inferior"
    )
    explain: Literal["auto", "grad_cam", "occlusion"] = Field(
        "auto",
        description="how it is shown where the network looked; auto: Grad-CAM, or occlusion where it has no map for "
        "that; occlusion explains any network and costs a hundred times as much",
    )
    ordered: bool = Field(False, description="classes are grades in this order: quadratic-weighted kappa too")
    calibration: CalibrationConfig = CalibrationConfig()
    abstention: AbstentionConfig = AbstentionConfig()
    novelty: NoveltyConfig = NoveltyConfig()
    subgroups: SubgroupsConfig = SubgroupsConfig()
    masks: MasksConfig = MasksConfig()


class ReportConfig(Section):
    """What the report says besides the facts (medtl/report)."""

    title: str | None = None
    intended_use: str | None = None
    limits: tuple[str, ...] = ()
    learning_curve: int = Field(
        0, ge=0, le=8,
        description="so many times, train again on a half, a quarter, ... of the training part's patients and draw "
        "what validation makes of each; together they cost about one more training",
    )  # fmt: skip


class GateConfig(Section):
    """One condition on one metric."""

    metric: str
    bound: Literal["value", "low", "high"] = "low"
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate needs at_least or at_most")
        return self


class IncumbentConfig(Section):
    """How a candidate must do beside the release that is live, on the candidate's test part."""

    metric: str = "auroc"
    margin: Fraction = Field(0.02, description="the lower bound of the difference may be so far below zero")


class FloorConfig(Section):
    """How every subgroup that has figures must do."""

    metric: Literal["auroc", "sensitivity", "specificity"] = "auroc"
    bound: Literal["value", "low"] = "value"
    at_least: Fraction


class PromotionConfig(Section):
    """When a candidate becomes validated (medtl/registry/promotion.py)."""

    gate: tuple[GateConfig, ...] = ()
    clean: bool = Field(True, description="refuse what was trained on a split that has somebody on two sides")
    licences: tuple[str, ...] | None = Field(
        None, description="licences that the start weights may have, as the vault names them; default: not asked"
    )
    subgroup_floor: FloorConfig | None = Field(None, description="no subgroup does worse; default: not asked")
    incumbent: IncumbentConfig | None = Field(None, description="not worse than the live release; default: not asked")


class RegistryConfig(Section):
    """Releases (medtl/registry)."""

    promotion: PromotionConfig = PromotionConfig()


class AuditConfig(Section):
    """Where the head of the audit trail is kept too, after each run (pipelines/trail.py)."""

    anchor_file: Path | None = Field(None, description="a file outside the workspace; one line is added for each run")
    anchor_command: tuple[str, ...] = Field(
        (), description="a program and its words, {head} and {events} filled in; for instance one that posts it"
    )


class Config(Section):
    """A run."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**32)
    workspace: Path = Path("workspace")
    scans: ScansConfig = ScansConfig()
    studies: StudiesConfig = StudiesConfig()
    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    registry: RegistryConfig = RegistryConfig()
    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _what_is_for_diagnosis_is_not_asked_of_masks(self) -> Self:
        promotion = self.registry.promotion
        asked = {
            "dataset.folds.repeats": self.dataset.folds.repeats > 1,
            "registry.promotion.incumbent": promotion.incumbent is not None,
            "registry.promotion.subgroup_floor": promotion.subgroup_floor is not None,
        }
        wrong = [name for name, is_set in asked.items() if self.segments and is_set]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: for diagnosis only. Leave it out, and gate masks by their metrics")
        return self

    @model_validator(mode="after")
    def _empty_masks_are_read(self) -> Self:
        if self.studies.labels.empty_masks == "keep" and self.scans.checks.policy.get("blank") != "accept":
            raise ValueError(
                "studies.labels.empty_masks: keep needs scans.checks.policy: {blank: accept}; to intake an empty mask "
                "is a blank picture, and refused"
            )
        return self

    @property
    def segments(self) -> bool:
        """Tell a segmentation from a diagnosis."""
        return self.studies.labels.mask is not None


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file into a checked configuration.

    Args:
        path: YAML file, read with ``yaml.safe_load``.
        overrides: ``a.b=c`` each; the value is YAML (``1e-3``, ``[1, 2]``, ``null``). An entry of a list goes by its
            name or its number from 0: ``model.phases.all.epochs=40``.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest known one is named), a key given twice, or a value out
            of its bounds.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; a run is one short YAML file.")
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({_reason(error)}). Give the path of a YAML file.") from error
    raw = _read_yaml(text, where=str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a mapping of keys is wanted; see configs/demo.yaml.")
    return parse_config(raw, str(path), overrides)


def parse_config(raw: Mapping[str, Any], where: str = "config", overrides: Iterable[str] = ()) -> Config:
    """Check a mapping and freeze it.

    Args:
        overrides: as of :func:`load_config`.

    Raises:
        ConfigError: see :func:`load_config`.
    """
    changed = dict(raw)
    for override in overrides:
        _apply(changed, override)
    try:
        return Config.model_validate(changed)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(item) for item in error.errors())) from error


def _read_yaml(text: str, where: str) -> Any:
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{where}: YAML aliases (*name) are not read; write the value where it is used.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_CONFIG_DEPTH:
                raise ConfigError(f"{where}: nested more than {MAX_CONFIG_DEPTH} deep; no key lies that deep.")
        for key in _keys_given_twice(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{where}: '{key}' is given twice; YAML would keep the last one only. Join them.")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {_one_line(error)}") from error
    except ValueError as error:  # a value that looks like a date or a number and is none
        raise ConfigError(f"{where}: a value cannot be read ({_one_line(error)}). Put it in quotes.") from error


def _keys_given_twice(node: yaml.Node | None) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        yield from (name for (_, name), times in keys.items() if times > 1)
        for _, value in node.value:
            yield from _keys_given_twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _keys_given_twice(value)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: write it as a.b=c, for instance --set model.backbone=resnet50")
    value = _read_yaml(text, where=f"--set {override}")
    node: Any = raw
    for step in path[:-1]:
        place = _place(node, step, override)
        child = node.setdefault(place, {}) if isinstance(node, dict) else node[place]
        if child is None:
            child = node[place] = {}
        if not isinstance(child, dict | list):
            raise ConfigError(f"--set {override}: '{step}' is a value, not a section.")
        node = child
    node[_place(node, path[-1], override)] = value


def _place(node: dict[str, Any] | list[Any], step: str, override: str) -> str | int:
    """Give the key of a section, or the place of a list's entry: by its ``name``, or counted from 0."""
    if isinstance(node, dict):
        return step
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
    if names.count(step) == 1:
        return names.index(step)
    if step.isdecimal() and int(step) < len(node):
        return int(step)
    known = ", ".join(str(number if name is None else name) for number, name in enumerate(names)) or "none"
    raise ConfigError(f"--set {override}: the list has no entry '{step}'; its entries are: {known}.")


def _explain(item: Any) -> str:
    place = [step for step in item["loc"] if step not in _TAGS]
    where = ".".join(str(step) for step in place)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), _known(place[:-1]), n=1, cutoff=0.4)
        return f"unknown key '{where}'" + (f"; did you mean '{near[0]}'?" if near else "; see docs/config.md")
    return f"'{where}': {item['msg']}"


def _known(loc: Iterable[Any]) -> list[str]:
    model: Any = Config
    for step in loc:
        if isinstance(step, int):
            continue
        field = model.model_fields.get(step) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = _section_of(field.annotation)
    return list(getattr(model, "model_fields", {}))


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found is not None:
            return found
    return None


def _reason(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
