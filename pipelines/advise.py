"""``medtl advise CONFIG``: which backbone and which strategy, from what was measured; the test part stays sealed.

Every measurement is an artifact of its own: adding a backbone measures that one only, and a second call nothing.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from medtl.artifacts import (
    Store,
    code_digest,
    digest_of,
    load_array,
    read_record,
    save_array,
    storage_errors,
    write_bytes,
    write_json,
    write_record,
)
from medtl.audit import AuditedStore, AuditLog
from medtl.config import STRATEGIES, Config, ModelConfig
from medtl.errors import ConfigError, PlanError, WeightsError
from medtl.progress import advance, listening
from medtl.records import Artifact, Cohort, Predictions, Score, Split
from pipelines import steps, training
from pipelines.terminal import ConfigFile, Json, Sets, load_diagnosis, log_to_file, number, progress, show_table, table
from pipelines.upkeep import at_work

if TYPE_CHECKING:
    from medtl.model.advise import Lead
    from medtl.model.heads import Kind
    from medtl.report.advice import Advice, Way

log = logging.getLogger("medtl")
HEADS = ("logistic_regression", "knn")
_SHORT, _QUICK = 2, 4  # references train a half, or a quarter, of their strategy's epochs
_LOOKED_AT = 2000  # images at most that the hints are measured on
_ADVICE, _PAGE, _FACTS, _SCORE = "advice.json", "advice.html", "facts.json", "score.json"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backbone and where its weights come from, as ``model.weights`` says it."""

    backbone: str
    weights: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Common:
    """What every measurement shares."""

    config: Config
    scans: Artifact
    cohort: Artifact
    split: Artifact
    known: Cohort
    parts: Split

    def rows(self, chosen: Sequence[str]) -> list[int]:
        """Give the rows of studies in the cohort, and so in the pack, in their order."""
        place = {study.study_id: row for row, study in enumerate(self.known.studies)}
        return sorted(place[study_id] for study_id in chosen)

    def predictions(self, part: str, rows: Sequence[int], probabilities: Any) -> Predictions:
        """Join probabilities with who they are of."""
        studies = [self.known.studies[row] for row in rows]
        ids, people = tuple(s.study_id for s in studies), tuple(s.patient for s in studies)
        return Predictions(part, ids, people, self.known.targets[list(rows)], probabilities)


@dataclass(frozen=True, slots=True)
class Measured:
    """A way to a model with its predictions of patients that it did not learn from."""

    way: Way
    candidate: Candidate
    predictions: Predictions
    digest: str


def candidates_of(config: Config, names: Sequence[str] | None) -> list[Candidate]:
    """List what can be compared: what was named, or else what has weights here.

    Raises:
        ConfigError: there is no such backbone.
        WeightsError: nothing was named and there are no weights; says how to get some.
    """
    from medtl.model.backbones import BACKBONES
    from medtl.model.backbones import backbone as look_up
    from medtl.model.vault import Vault, imagenet_name

    here: list[Candidate] = []
    vault = Vault(training.vault_folder(config))
    if config.model.weights not in ("none", "imagenet"):
        here.append(Candidate(config.model.backbone, config.model.weights))
    for entry in vault.entries():
        row = BACKBONES.get(entry.backbone or "")
        if entry.backbone is not None and row is not None and row.dimensions == 2:
            word = "imagenet" if entry.name == imagenet_name(entry.backbone) else f"vault:{entry.name}"
            here.append(Candidate(entry.backbone, word))
    if names is None:
        if not here:
            raise WeightsError(
                "There are no weights to compare: the vault is empty and model.weights names no file. Get some: `medtl "
                "weights fetch resnet18`, or `medtl weights add FILE --backbone NAME` (with --vault WORKSPACE/weights)."
            )
        return _named(here)
    found: list[Candidate] = []
    for name in names:
        backbone, equals, weights = name.partition("=")
        if look_up(backbone).dimensions != 2:
            raise ConfigError(
                f"'{backbone}' reads volumes, and images are packed flat. Name backbones of two dimensions."
            )
        own = [one for one in here if one.backbone == backbone]
        found += [Candidate(backbone, weights)] if equals else own or [Candidate(backbone, "imagenet")]
    return _named(found)


def _named(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Name candidates by their backbone, and by their weights where it has several, or none."""
    once = list(dict.fromkeys(candidates))
    times = Counter(one.backbone for one in once if one.weights != "none")
    found = []
    for one in once:
        more = Path(one.weights).name.removeprefix("vault:") if times[one.backbone] > 1 else ""
        more = "without weights" if one.weights == "none" else more
        found.append(replace(one, name=f"{one.backbone} ({more})" if more else one.backbone))
    return found


@at_work
def advise_on(
    config: Config, candidates: Sequence[Candidate], heads: Sequence[Kind], references: bool, quick: bool
) -> tuple[Advice, Path]:
    """Measure every candidate, and references if wanted; give the advice and the page's path."""
    from medtl.dataset.io import read_split
    from medtl.report.advice import Advice, render
    from medtl.studies.io import read_cohort

    scans = steps.ingest_scans(config)
    cohort = steps.build_cohort(config, scans)
    split = steps.split_by_patient(to_split(config), scans, cohort)
    common = Common(config, scans, cohort, split, read_cohort(cohort.path), read_split(split.path))
    probes, left_out = _probes(common, candidates, heads)
    measured = [way for one, artifact in probes for way in cross_validated(common, one, artifact, heads)]
    judged = [one for one in measured if one.way.score.value is not None]
    if references and judged and common.parts.val:
        leader = max(judged, key=lambda one: one.way.score.value or 0.0).candidate
        measured += [reference(common, leader, strategy, quick) for strategy in _strategies_for(leader)]
    inputs = {
        "measured": [[one.way.name, one.digest] for one in measured],
        "evaluation": config.evaluation.uncertainty.model_dump(mode="json"),
        "left_out": left_out,
        "title": config.report.title or config.name,
        "seed": config.seed,
        "code": code_digest("model", "evaluation", "report"),
        "composition": _own_code(),
    }

    def build(folder: Path) -> None:
        advice = _compare(common, measured, probes)
        advice = replace(advice, notes=(*left_out, *advice.notes))
        write_record(folder / _ADVICE, advice)
        write_bytes(folder / _PAGE, render(advice).encode())

    artifact = AuditedStore(config.workspace).make("advice", inputs, build)
    return read_record(artifact.path / _ADVICE, Advice), _copy(config, artifact)


def to_split(config: Config) -> Config:
    """Give the config to split by: the study's own weights, of which advice needs none, are not fetched for it."""
    unfetched = config.model_copy(update={"model": config.model.model_copy(update={"fetch": False})})
    try:
        training.comparing_network(unfetched)
    except WeightsError:
        alone = config.dataset.split.model_copy(update={"near_in_features": False})
        return config.model_copy(update={"dataset": config.dataset.model_copy(update={"split": alone})})
    return config


def _probes(
    common: Common, candidates: Sequence[Candidate], heads: Sequence[Kind]
) -> tuple[list[tuple[Candidate, Artifact]], list[str]]:
    """Probe every candidate; one that cannot take these images is left out and said, unless none can."""
    found, left_out, last = [], [], None
    for done, one in enumerate(candidates, 1):
        try:
            found.append((one, probe(common, one, heads)))
        except (ConfigError, PlanError) as error:
            log.warning("%s is left out: %s", one.name, error)
            left_out.append(f"{one.name} was left out: {error}")
            last = error
        advance("measuring backbones", done, len(candidates))
    if not found and last is not None:
        raise last
    return found, left_out


def _plan_of_images(config: Config, common: Common) -> Artifact:
    from medtl.dataset.io import read_plan

    plan = steps.make_plan(config, common.scans, common.cohort, common.split)
    if read_plan(plan.path).volumes:
        raise ConfigError("advise compares backbones on images; this cohort holds volumes. Use `medtl study`.")
    return plan


def probe(common: Common, candidate: Candidate, heads: Sequence[Kind]) -> Artifact:
    """Pack images for a backbone, run its trunk once, and judge heads on its features by cross-validation."""
    from medtl.model import devices
    from medtl.model.vault import Vault, resolve_weights

    config = _with(common.config, candidate)
    plan = _plan_of_images(config, common)
    pack = steps.pack_images(config, common.scans, common.cohort, plan)
    vault = Vault(training.vault_folder(config))
    weights = resolve_weights(config.model.origin, candidate.backbone, vault, config.model.fetch)
    device = devices.device_of(config.model)
    inputs = {
        "split": common.split.digest,
        "pack": pack.digest,
        "backbone": candidate.backbone,
        "weights": [weights.sha256, asdict(weights.contract) if weights.contract else None] if weights else None,
        "min_share": config.model.min_share,
        "heads": list(heads),
        "batch_size": config.model.batch_size,
        "threads": config.model.threads,
        "device": [device.type, devices.precision_of(config.model, device)],
        "seed": config.seed,
        "code": code_digest("model", "dataset"),
        "composition": _own_code(),
        "libraries": training.versions("torch", "torchvision", "monai", "numpy", "scikit-learn"),
    }
    return AuditedStore(config.workspace).make(
        "probe", inputs, lambda folder: _measure(common, config, plan, pack, heads, folder)
    )


def _measure(
    common: Common, config: Config, plan: Artifact, pack: Artifact, heads: Sequence[Kind], folder: Path
) -> None:
    import numpy as np

    from medtl.dataset.io import read_pack, read_plan
    from medtl.model import devices, features
    from medtl.model.advise import out_of_fold

    device = devices.device_of(config.model)
    precision = devices.precision_of(config.model, device)
    devices.make_deterministic(config.seed, training.threads_for(config.model, 1))
    network, report = training.network_for(config, common.known, read_plan(plan.path))
    pixels, size = read_pack(pack.path), config.model.batch_size
    rows = np.asarray(common.rows([*common.parts.train, *common.parts.val]))
    targets = common.known.targets[rows]
    groups = [common.parts.groups[common.known.studies[row].study_id] for row in rows]
    store = training.activations_of(config)
    x = features.features_of(network, pixels, rows, size, device, precision, store, pack.digest)
    per_image = features.seconds_per_image(network, pixels[rows[:size]], size, device, precision)
    seconds: dict[str, float] = {}
    for head in heads:
        found = out_of_fold(head, x, targets, groups, common.known.task, config.seed)
        save_array(folder / f"{head}.npy", found.probabilities)
        seconds[head], folds = per_image * len(rows) + found.seconds, found.folds
    some = rows[:: -(-len(rows) // _LOOKED_AT)]
    trained = report.source != "none"  # statistics that nobody measured say nothing of a source
    apart = features.source_distance(network, pixels, some, size, device) if trained else None
    chosen = np.searchsorted(rows, some)
    facts = {
        "weights": report.source,
        "features": x.shape[1],
        "folds": folds,
        "seconds": seconds,
        "distance": asdict(apart) if apart else None,
        "logme": features.logme(x[chosen], targets[chosen]),
    }
    write_json(folder / _FACTS, facts)


def cross_validated(common: Common, candidate: Candidate, artifact: Artifact, heads: Sequence[Kind]) -> list[Measured]:
    """Score the predictions that cross-validation left, one way a head."""
    from medtl.report.advice import Way, head_name

    facts = json.loads((artifact.path / _FACTS).read_bytes())
    rows = common.rows([*common.parts.train, *common.parts.val])
    found = []
    for head in heads:
        predictions = common.predictions("train and val", rows, load_array(artifact.path / f"{head}.npy"))
        phases = "features" if head == HEADS[0] else f"[{{name: {head}, unfreeze: head, head: {head}, augment: false}}]"
        way = Way(
            name=f"{candidate.name}, {head_name(head)}",
            backbone=candidate.backbone,
            weights=facts["weights"],
            strategy=head,
            judged="cross-validation",
            score=_scored(common, predictions, [artifact.digest, head]),
            seconds=facts["seconds"][head],
            settings=_settings(common.config, candidate, phases),
        )
        found.append(Measured(way, candidate, predictions, artifact.digest))
    return found


def reference(common: Common, candidate: Candidate, strategy: str, quick: bool) -> Measured:
    """Train a strategy shortly on the training part and judge it on validation, which chose nothing.

    Epochs and phases are chosen on patients set aside from the training part.
    """
    from medtl.report.advice import Way

    settings = _with(common.config, candidate)
    plan = _plan_of_images(settings, common)
    pack = steps.pack_images(settings, common.scans, common.cohort, plan)
    inner = _inner_split(common)
    model = _short_model(settings, strategy, quick)
    config = settings.model_copy(update={"model": model})
    inputs = {
        "split": common.split.digest,
        "inner": inner.digest,
        "pack": pack.digest,
        "model": model.model_dump(mode="json", exclude={"weights", "vault", "cache", "fetch", "scratch_phases"}),
        "weights": None if strategy == "scratch" else _weights_digest(config),
        "transforms": config.dataset.transforms.model_dump(mode="json"),
        "seed": config.seed,
        "code": code_digest("model", "dataset"),
        "composition": _own_code(),
        "libraries": training.versions("torch", "torchvision", "monai", "numpy", "scikit-learn"),
    }
    artifact = AuditedStore(config.workspace).make(
        "reference", inputs, lambda folder: _train_reference(common, config, inner, plan, pack, folder)
    )
    facts = json.loads((artifact.path / _FACTS).read_bytes())
    predictions = common.predictions(
        "val", common.rows(common.parts.val), load_array(artifact.path / "probabilities.npy")
    )
    scratch = strategy == "scratch"
    called = candidate.backbone if scratch else candidate.name
    way = Way(
        name=f"{called}, {strategy} ({sum(phase.epochs for phase in model.schedule)} epochs)",
        backbone=candidate.backbone,
        weights="none" if scratch else facts["weights"],
        strategy=strategy,
        judged="hold-out",
        score=_scored(common, predictions, [artifact.digest]),
        seconds=facts["seconds"],
        settings=_settings(common.config, candidate, strategy),
    )
    return Measured(way, candidate, predictions, artifact.digest)


def _train_reference(
    common: Common, config: Config, inner: Artifact, plan: Artifact, pack: Artifact, folder: Path
) -> None:
    from medtl.dataset.io import read_pack
    from medtl.dataset.loading import EvaluationBatches
    from medtl.model import devices, io
    from medtl.model.predict import predict

    started = time.perf_counter()
    checkpoint = steps.fit_in_phases(config, common.cohort, inner, plan, pack)
    seconds = None if checkpoint.reused else time.perf_counter() - started
    rows = common.rows(common.parts.val)
    batches = EvaluationBatches(read_pack(pack.path), common.known.targets, rows, config.model.batch_size)
    network = io.read_network(checkpoint.path)
    save_array(
        folder / "probabilities.npy", predict(network, batches, common.known.task, devices.device_of(config.model))
    )
    write_json(folder / _FACTS, {"seconds": seconds, "weights": io.read_checkpoint(checkpoint.path).weights.source})


def _inner_split(common: Common) -> Artifact:
    """Set patients of the training part aside to choose epochs and phases on; validation and test are not in it."""
    from medtl.dataset.io import write_split
    from medtl.model.advise import FOLDS, grouped_folds

    inputs = {
        "split": common.split.digest,
        "inner": FOLDS,
        "seed": common.config.seed,
        "code": code_digest("model", "dataset"),
    }

    def build(folder: Path) -> None:
        rows = common.rows(common.parts.train)
        ids = [common.known.studies[row].study_id for row in rows]
        groups = [common.parts.groups[study_id] for study_id in ids]
        learn, out = grouped_folds(common.known.targets[rows], groups, FOLDS, common.config.seed)[0]
        train, val = (tuple(sorted(ids[i] for i in part)) for part in (learn, out))
        write_split(folder, Split(train, val, (), dict(sorted(zip(ids, groups, strict=True))), predefined=False))

    return AuditedStore(common.config.workspace).make("split", inputs, build)


def _compare(common: Common, measured: Sequence[Measured], probes: Sequence[tuple[Candidate, Artifact]]) -> Advice:
    """Compare everything measured with the best, paired by patient, and recommend."""
    from medtl.evaluation.comparison import compare
    from medtl.model.advise import Contender, recommend
    from medtl.report.advice import Advice, sentence_of

    by_name = {one.way.name: one for one in measured}
    config = common.config.evaluation.uncertainty
    contenders = [
        Contender(one.way.name, one.way.score.value, one.way.seconds, one.way.judged == "cross-validation")
        for one in measured
    ]
    found = recommend(contenders, lambda one, other: _lead(common, by_name[one], by_name[other]))
    ways = []
    for one in measured:
        lead, difference = found.leads.get(one.way.name) if found else None, None
        if found is not None and lead is not None:
            pair = _on_common(by_name[found.best].predictions, one.predictions)
            difference = compare(*pair, (found.best, one.way.name), config, common.config.seed).difference
        ways.append(replace(one.way, ahead=lead.share if lead else None, difference=difference))
    best, recommended = (next((w for w in ways if found and w.name == name), None) for name in
                         ((found.best, found.recommended) if found else ("", "")))  # fmt: skip
    rows = common.rows([*common.parts.train, *common.parts.val])
    facts = [json.loads((artifact.path / _FACTS).read_bytes()) for _, artifact in probes]
    held_out = len(common.parts.val) if any(one.way.judged == "hold-out" for one in measured) else 0
    return Advice(
        title=common.config.report.title or common.config.name,
        task=common.known.task,
        studies=len(rows),
        patients=len({common.known.studies[row].patient for row in rows}),
        held_out=held_out,
        folds=facts[0]["folds"],
        counts=_counts(common, rows),
        ways=tuple(ways),
        hints=tuple(_hint(one, own) for (one, _), own in zip(probes, facts, strict=True)),
        best=found.best if found else None,
        recommended=found.recommended if found else None,
        clear=found.clear if found else False,
        sentence=sentence_of(best, recommended, len(found.unbeaten) if found else 0, found.clear if found else False),
        notes=_notes(common, held_out),
        level=config.level,
    )


def _on_common(one: Predictions, other: Predictions) -> tuple[Predictions, Predictions]:
    """Cut two sets of predictions to the studies in both, in one order."""
    both = sorted(set(one.study_ids) & set(other.study_ids))

    def cut(given: Predictions) -> Predictions:
        place = {study_id: row for row, study_id in enumerate(given.study_ids)}
        rows = [place[study_id] for study_id in both]
        people = tuple(given.patients[row] for row in rows)
        return Predictions("common", tuple(both), people, given.targets[rows], given.probabilities[rows])

    return cut(one), cut(other)


def _lead(common: Common, one: Measured, other: Measured) -> Lead:
    """Judge a lead by the resamples, and by the lower limit of a two-sided interval that leaves 5 % below."""
    from medtl.evaluation.comparison import compare
    from medtl.evaluation.superiority import share_better
    from medtl.model.advise import CERTAIN, Lead

    a, b = _on_common(one.predictions, other.predictions)
    config, seed = common.config.evaluation.uncertainty, common.config.seed
    share = share_better(
        a.probabilities, b.probabilities, a.targets, a.study_ids, a.patients, "auroc", config.resamples, seed
    )
    one_sided = config.model_copy(update={"level": 2 * CERTAIN - 1})
    return Lead(share, compare(a, b, (one.way.name, other.way.name), one_sided, seed).difference.low)


def _scored(common: Common, predictions: Predictions, made_from: Sequence[str]) -> Score:
    """Score predictions once; ``made_from`` names them."""
    from medtl.evaluation.grouped import mean_auroc

    known, config = common.known, common.config
    inputs = {
        "predictions": list(made_from),
        "cohort": common.cohort.digest,
        "config": config.evaluation.uncertainty.model_dump(mode="json"),
        "seed": config.seed,
        "code": code_digest("evaluation"),
    }

    def build(folder: Path) -> None:
        score = mean_auroc(predictions, known.task, known.classes, config.evaluation.uncertainty, config.seed)
        write_record(folder / _SCORE, score)

    return read_record(AuditedStore(config.workspace).make("score", inputs, build).path / _SCORE, Score)


def _counts(common: Common, rows: Sequence[int]) -> Any:
    from medtl.report.advice import ClassCount

    studies = [common.known.studies[row] for row in rows]
    shown = [[s for s in studies if s.target[index] == 1] for index in range(len(common.known.classes))]
    return tuple(
        ClassCount(label, len(own), len({s.patient for s in own}))
        for label, own in zip(common.known.classes, shown, strict=True)
    )


def _hint(candidate: Candidate, facts: dict[str, Any]) -> Any:
    from medtl.report.advice import Hint

    apart = facts["distance"] or {"frechet": None, "per_channel": None, "images": 0}
    return Hint(
        candidate.backbone,
        facts["weights"],
        facts["features"],
        apart["frechet"],
        apart["per_channel"],
        facts["logme"],
        apart["images"],
    )


def _notes(common: Common, held_out: int) -> tuple[str, ...]:
    notes = ["The highest of several is a little too high by chance: its figure is for choosing, not for reporting."]
    if held_out:
        patients = len({s.patient for s in common.known.studies if s.study_id in set(common.parts.val)})
        notes.append(
            f"References were trained shortly, on the training part, and judged on {held_out} studies of {patients} "
            "patients that chose nothing; against them, others count on the same patients only."
        )
        notes.append("A longer training may change a reference's place: what is measured here is a start.")
    if not common.known.patients_known:
        notes.append("Patients are not known: each image counts as one, and intervals may be too narrow.")
    return tuple(notes)


def _with(config: Config, candidate: Candidate) -> Config:
    chosen = {"backbone": candidate.backbone, "weights": candidate.weights, "phases": "features"}
    return config.model_copy(update={"model": config.model.model_copy(update=chosen)})


def _short_model(config: Config, strategy: str, quick: bool) -> ModelConfig:
    """Give a strategy with fewer epochs; from scratch at least as many as staged has in all."""
    from medtl.model.advise import shortened

    divisor = _QUICK if quick else _SHORT
    phases = shortened(STRATEGIES[strategy], divisor)
    if strategy != "scratch":
        return config.model.model_copy(update={"phases": phases, "scratch": False})
    least = sum(phase.epochs for phase in shortened(STRATEGIES["staged"], divisor))
    phases = tuple(phase.model_copy(update={"epochs": max(phase.epochs, least)}) for phase in phases)
    return config.model.model_copy(update={"phases": phases, "scratch": False, "weights": "none"})


def _strategies_for(candidate: Candidate) -> tuple[str, ...]:
    return ("scratch",) if candidate.weights == "none" else ("staged", "scratch")


def _weights_digest(config: Config) -> str | None:
    from medtl.model.vault import Vault, resolve_weights

    vault = Vault(training.vault_folder(config))
    found = resolve_weights(config.model.weights, config.model.backbone, vault, config.model.fetch)
    return found.sha256 if found else None


def _settings(config: Config, candidate: Candidate, phases: str) -> tuple[str, ...]:
    """Spell out what trains this way; the path of a file that was named on the command line is not repeated."""
    weights = Path(candidate.weights).name if "/" in candidate.weights else candidate.weights
    chosen = [f"model.backbone={candidate.backbone}", f"model.phases={phases}"]
    if phases != "scratch" and candidate.weights != config.model.weights:
        chosen.insert(1, f"model.weights={weights}")
    return tuple(chosen)


def _own_code() -> str:
    from medtl.artifacts import file_digest

    return digest_of([file_digest(Path(__file__).parent / name) for name in ("advise.py", "training.py", "steps.py")])


def _copy(config: Config, artifact: Artifact) -> Path:
    """Put the page where people open it."""
    folder = Store(config.workspace).workspace / "reports"
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    path = folder / f"{config.name}-advice.html"
    write_bytes(path, (artifact.path / _PAGE).read_bytes())
    AuditLog(config.workspace).note_files("report.published", artifact.digest, [path])
    return path


def advise(
    config: ConfigFile,
    *,
    backbones: Annotated[
        str | None,
        Parameter(
            help="with commas: resnet18,densenet121; NAME=WEIGHTS as model.weights; default: all with weights here"
        ),
    ] = None,
    heads: Annotated[str, Parameter(help="solved on features: logistic_regression, linear_svm, knn")] = ",".join(HEADS),
    references: Annotated[bool, Parameter(help="also train shortly: staged, and from scratch")] = True,
    quick: Annotated[bool, Parameter(help="half as many epochs for the references", negative="")] = False,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Measure which backbone and strategy suit the data; the test part is not opened.

    Heads are judged by cross-validation that divides no patient, on features that are computed once. Says "no clear
    winner" when that is so. A second call computes nothing.
    """
    settings = load_diagnosis(config, set_, "advise")
    Store(settings.workspace)
    log_to_file(settings.workspace)
    names = None if backbones is None else [name.strip() for name in backbones.split(",") if name.strip()]
    if names == []:
        raise ConfigError("--backbones names one or more, with commas: resnet18,densenet121")
    kinds = _heads_in(heads)
    with progress() as listener, listening(listener) if listener else nullcontext():
        candidates = candidates_of(settings, names)
        advice, page = advise_on(settings, candidates, kinds, references, quick)
    _show(advice, page, json_)


def _heads_in(text: str) -> tuple[Kind, ...]:
    from typing import get_args

    from medtl.model.heads import Kind

    known: tuple[Kind, ...] = get_args(Kind)
    asked = dict.fromkeys(head.strip() for head in text.split(",") if head.strip())
    wrong = [head for head in asked if head not in known]
    if wrong or not asked:
        raise ConfigError(f"--heads takes {', '.join(known)}" + (f", not '{wrong[0]}'." if wrong else "."))
    return tuple(kind for head in asked for kind in known if kind == head)


def _show(advice: Advice, page: Path, as_json: bool) -> None:
    recommended = advice.way(advice.recommended)
    value = {
        **{name: getattr(advice, name) for name in ("studies", "patients", "best", "clear", "sentence", "notes")},
        "recommended": asdict(recommended) if recommended else None,
        "ways": [asdict(way) for way in advice.ways],
        "hints": [asdict(hint) for hint in advice.hints],
        "page": str(page),
    }
    if as_json:
        show_table(value, True, "", (), ())
        return
    rows = [
        (
            ("* " if way.name == advice.recommended else "") + way.name,
            number(way.score.value),
            f"{number(way.score.low)} - {number(way.score.high)}",
            way.score.patients,
            "-" if way.seconds is None else f"{way.seconds:.1f}",
            "-" if way.ahead is None else f"{100 * way.ahead:.0f} %",
        )
        for way in advice.ways
    ]
    columns = ("way", "AUROC", f"{100 * advice.level:.0f} % interval", "patients", "seconds", "best is ahead in")
    table(f"{advice.title}: {advice.studies} studies of {advice.patients} patients; test part unopened", columns, rows)
    table("Advice", ("what", "value"), [("advice", advice.sentence), ("page", page)])
