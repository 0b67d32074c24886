"""Which section of the page answers which item of the reporting checklists, and which item nothing answers.

The items are named in our words, by their published numbers; whoever submits fills in the originals. What is answered
follows from the facts of the run: an item counts as reported only where the page says it.

Sources: CLAIM 2024 (Tejani et al., Radiology: Artificial Intelligence 6, 2024, e240300); TRIPOD+AI (Collins et al., BMJ
385, 2024, e078378); STARD-AI (Sounderajah et al., Nature Medicine 31, 2025, 3283); model cards (Mitchell et al., FAT*
2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medtl.report.facts import Facts, has_unseen_sites

SECTIONS: Mapping[str, str] = {
    "summary": "Summary",
    "data": "Data",
    "split": "Split",
    "model": "Model",
    "results": "Results",
    "calibration": "Calibration",
    "abstention": "When not to answer",
    "subgroups": "Subgroups",
    "shortcuts": "Shortcuts",
    "robustness": "Robustness",
    "explanations": "Where it looked",
    "comparison": "Comparisons",
    "plan": "Plan",
    "gate": "Gate",
    "provenance": "Provenance",
    "limits": "Limits",
    "checklists": "Checklists",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """Where the page answers, and what of the item it leaves open; no section means not reported."""

    sections: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a checklist with its answer."""

    number: str
    asks: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Checklist:
    """One checklist, item by item."""

    name: str
    items: tuple[Item, ...]

    @property
    def reported(self) -> int:
        """Items that some section answers."""
        return sum(bool(item.answer.sections) for item in self.items)


def checklists(facts: Facts) -> tuple[Checklist, ...]:
    """Answer every item of every checklist from the facts."""
    known = _always() | _where_known(facts) | _where_examined(facts)
    return tuple(
        Checklist(name, tuple(Item(number, asks, known.get(topic, Answer())) for number, asks, topic in items))
        for name, items in _CHECKLISTS.items()
    )


def as_json(facts: Facts) -> dict[str, list[dict[str, Any]]]:
    """Give every item with the sections that answer it; none means not reported."""
    return {
        checklist.name: [
            {
                "item": item.number,
                "asks": item.asks,
                "sections": list(item.answer.sections),
                "remark": item.answer.remark,
            }
            for item in checklist.items
        ]
        for checklist in checklists(facts)
    }


def _always() -> dict[str, Answer]:
    return {
        "identity": Answer(("summary", "model")),
        "abstract": Answer(("summary",)),
        "eligibility": Answer(("data",), "what was left out, by code and reason; clinical criteria are not recorded"),
        "preprocessing": Answer(("plan",)),
        "quality": Answer(("data", "plan")),
        "subsets": Answer(("data", "split")),
        "deidentification": Answer(("data",)),
        "missing": Answer(("data",), "unknown is counted as unknown, never as negative"),
        "partition": Answer(("split",)),
        "disjoint": Answer(("split",)),
        "architecture": Answer(("model", "plan")),
        "software": Answer(("provenance",)),
        "initialization": Answer(("model",)),
        "training": Answer(("model", "provenance")),
        "selection": Answer(("model",)),
        "ensemble": Answer(("model",), "one network, no ensemble"),
        "metrics": Answer(("results",)),
        "uncertainty": Answer(("results", "comparison")),
        "internal": Answer(("split", "results")),
        "counts": Answer(("data", "results")),
        "performance": Answer(("results",)),
        "limitations": Answer(("limits",)),
        "details": Answer(("provenance",), "settings and digests; no study protocol"),
        "balance": Answer(("data", "provenance"), "shares of each class; how they were weighed is in the settings"),
        "output": Answer(("summary", "results")),
        "between parts": Answer(("data",)),
        "specification": Answer(("plan", "provenance"), "digests of weights, code and settings; not how to get them"),
        "audit": Answer(("provenance",), "every result is named by its digest on the audit trail"),
        "version": Answer(("summary", "provenance"), "release and digests; the page carries no date"),
        "caveats": Answer(("summary", "limits")),
    }


def _where_known(facts: Facts) -> dict[str, Answer]:
    studies = facts.cohort.studies
    found = {"flow": Answer(("data",), _flow_remark(facts))}
    if facts.intended_use is not None:
        found["use"] = Answer(("summary",))
        found["background"] = Answer(("summary",), "intended use only")
        found["implications"] = Answer(("summary", "limits"))
    if facts.limits:
        found["out of scope"] = Answer(("summary", "limits"))
    if any(study.site for study in studies):
        found["sources"] = Answer(("data",), "sites; not how or when images were collected")
        found["setting"] = Answer(("data",), "sites only")
    if any(study.scanner for study in studies):
        found["devices"] = Answer(("data", "provenance"), "scanners and software")
    if taken := _acquired(facts):
        found["acquisition"] = Answer(("data", "plan"), f"{', '.join(taken)} and preprocessing; not the protocol")
    if any(study.sex or study.age_years is not None for study in studies):
        found["demographics"] = Answer(("data",), "sex, age, site and scanner, as far as recorded")
    if has_unseen_sites(facts):
        found["external"] = Answer(("data", "results"), "no site of the test part was trained on")
    if facts.evaluation.confusion:
        found["cross table"] = Answer(("results",))
        found["failures"] = Answer(("results",), "confusion table; no single cases")
    if facts.explanations is not None and facts.explanations.cases:
        held = "held against what was drawn" if facts.explanations.pointing else "not compared with marks"
        found["explanations"] = Answer(("explanations",), f"maps with a check by forgetting; {held}")
    if facts.checkpoint.weights.licence:
        found["licence"] = Answer(("model",), "of the weights it started from")
    return found


def _flow_remark(facts: Facts) -> str:
    if not facts.cohort.patients_known:
        return "scans and studies; patients are not known"
    if facts.scan_patients is None:
        return "patients from the studies to each part; whose scans left before is not known"
    return "patients and studies, from the decoded scans to each part"


def _acquired(facts: Facts) -> list[str]:
    """Name what is recorded of how scans were taken; the size of an image alone says nothing of it."""
    taken = facts.acquisitions.values()
    known = {
        "scanners": any(study.scanner for study in facts.cohort.studies),
        "modality": any(one.modality for one in taken),
        "spacing": any(one.slice_mm is not None for one in taken),
    }
    return [name for name, is_known in known.items() if is_known]


def _where_examined(facts: Facts) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    examined = facts.examination
    if examined is None:
        return found
    flagged = "" if examined.novelty.threshold is None else "; unlike images are flagged"
    found["input"] = Answer(("data", "abstention"), f"unreadable files are refused by code{flagged}")
    if examined.robustness.tests:
        found["robustness"] = Answer(("robustness",))
    if examined.calibration.calibrator.method != "none":
        found["updating"] = Answer(("calibration",))
    if examined.abstention.rule.method != "none":
        found["indeterminate"] = Answer(("abstention",))
    shown = [group for group in examined.subgroups.groups if group.scores]
    if shown:
        found["fairness"] = Answer(("subgroups",))
        found["factors"] = Answer(("subgroups", "shortcuts"))
        found["variability"] = Answer(("subgroups",))
        if facts.evaluation.confusion:
            found["failures"] = Answer(("results", "subgroups"), "confusion table and weakest groups; no single cases")
    if any(group.column in ("site", "scanner") for group in shown):
        found["clusters"] = Answer(("subgroups",))
    return found


_CLAIM = (
    ("1", "AI named as the method, and which kind", "identity"),
    ("2", "Structured summary", "abstract"),
    ("3", "Background, intended use and role", "background"),
    ("4", "Aims and hypotheses", "aims"),
    ("5", "Prospective or retrospective", "time"),
    ("6", "Goal of the study", "aims"),
    ("7", "Where the data come from", "sources"),
    ("8", "Who and what was let in or left out", "eligibility"),
    ("9", "Preprocessing", "preprocessing"),
    ("10", "How subsets were selected", "subsets"),
    ("11", "De-identification", "deidentification"),
    ("12", "Missing data", "missing"),
    ("13", "Acquisition protocol", "acquisition"),
    ("14", "Reference standard: how it was made", "reference"),
    ("15", "Reference standard: why this one", "reference"),
    ("16", "Reference standard: who annotated", "annotators"),
    ("17", "How the test part was annotated", "annotators"),
    ("18", "Agreement of annotators", "annotators"),
    ("19", "How data were assigned to parts", "partition"),
    ("20", "Level at which parts are disjoint", "disjoint"),
    ("21", "Size of the test part and its reason", "size"),
    ("22", "Model in detail", "architecture"),
    ("23", "Software and versions", "software"),
    ("24", "Initial weights", "initialization"),
    ("25", "Training in detail", "training"),
    ("26", "How the final model was chosen", "selection"),
    ("27", "Ensembles", "ensemble"),
    ("28", "Metrics", "metrics"),
    ("29", "Uncertainty and significance", "uncertainty"),
    ("30", "Robustness or sensitivity analysis", "robustness"),
    ("31", "Explanations, and whether they were checked", "explanations"),
    ("32", "Testing on internal data", "internal"),
    ("33", "Testing on external data", "external"),
    ("34", "Trial registration", "registration"),
    ("35", "Numbers included and excluded", "flow"),
    ("36", "Demographics of each part", "demographics"),
    ("37", "Performance of the final model", "performance"),
    ("38", "Diagnostic accuracy and its precision", "performance"),
    ("39", "Analysis of failures", "failures"),
    ("40", "Limitations", "limitations"),
    ("41", "Implications for practice", "implications"),
    ("42", "Protocol or technical details", "details"),
    ("43", "Availability of software, model and data", "availability"),
    ("44", "Funding", "funding"),
)
_TRIPOD = (
    ("1", "Title: model, population, outcome", "identity"),
    ("2", "Abstract", "abstract"),
    ("3a", "Context and rationale", "background"),
    ("3b", "Target population, purpose, users", "use"),
    ("3c", "Known health inequalities", "inequalities"),
    ("4", "Objectives", "aims"),
    ("5a", "Sources of data", "sources"),
    ("5b", "Dates of data", "dates"),
    ("6a", "Setting and centres", "setting"),
    ("6b", "Eligibility", "eligibility"),
    ("6c", "Treatments", "treatments"),
    ("7", "Data preparation and quality checks", "quality"),
    ("8a", "Outcome and how it was assessed", "reference"),
    ("8b", "Who assessed the outcome", "annotators"),
    ("8c", "Blinding of outcome assessment", "blinding"),
    ("9a", "Choice of predictors", "preprocessing"),
    ("9b", "Definition of predictors", "preprocessing"),
    ("9c", "Who assessed predictors", "annotators"),
    ("10", "Sample size", "size"),
    ("11", "Missing data", "missing"),
    ("12a", "How data were used and partitioned", "partition"),
    ("12b", "How predictors were handled", "preprocessing"),
    ("12c", "Type of model, building steps, internal validation", "training"),
    ("12d", "Differences between clusters: how handled", "clusters"),
    ("12e", "Measures and plots of performance", "metrics"),
    ("12f", "Updating, such as recalibration", "updating"),
    ("12g", "How predictions were calculated", "specification"),
    ("13", "Class imbalance", "balance"),
    ("14", "Fairness: what was done", "fairness"),
    ("15", "Output and thresholds", "output"),
    ("16", "Differences of training and evaluation data", "between parts"),
    ("17", "Ethical approval", "ethics"),
    ("18a", "Funding", "funding"),
    ("18b", "Conflicts of interest", "conflicts"),
    ("18c", "Protocol", "protocol"),
    ("18d", "Registration", "registration"),
    ("18e", "Sharing of data", "availability"),
    ("18f", "Sharing of code", "availability"),
    ("19", "Involvement of patients and public", "public"),
    ("20a", "Flow of participants", "flow"),
    ("20b", "Characteristics of participants", "demographics"),
    ("20c", "Evaluation data beside development data", "between parts"),
    ("21", "Participants and events in each analysis", "counts"),
    ("22", "Full model for new individuals", "specification"),
    ("23a", "Performance with intervals, in subgroups too", "performance"),
    ("23b", "Performance across clusters", "clusters"),
    ("24", "Results of updating", "updating"),
    ("25", "Interpretation, fairness included", "interpretation"),
    ("26", "Limitations", "limitations"),
    ("27a", "Input that is poor or missing, in use", "input"),
    ("27b", "What users must do and know", "users"),
    ("27c", "Next steps", "next steps"),
)
_STARD = (
    ("1", "Title or abstract: AI accuracy study, with a measure", "identity"),
    ("2", "Structured abstract", "abstract"),
    ("3", "Background, intended use, workflow", "background"),
    ("4", "Objectives and hypotheses", "aims"),
    ("5", "Prospective or retrospective", "time"),
    ("6", "Ethical approval", "ethics"),
    ("7", "Eligibility of participants and of data", "eligibility"),
    ("8", "How participants were identified", "recruitment"),
    ("9", "Where and when", "recruitment"),
    ("10", "Consecutive, random or convenience series", "recruitment"),
    ("11", "Source of data and why they were collected", "sources"),
    ("12", "Who annotated, and how", "annotators"),
    ("13", "Devices and software", "devices"),
    ("14", "Acquisition and preprocessing", "acquisition"),
    ("15a", "Index test in detail", "architecture"),
    ("15b", "How the index test was developed", "training"),
    ("15c", "Cut-offs of the index test", "output"),
    ("15d", "Intended users and their expertise", "users"),
    ("16a", "Reference standard in detail", "reference"),
    ("16b", "Reference standard: why this one", "reference"),
    ("16c", "Cut-offs of the reference standard", "reference"),
    ("17a", "Blinding of the index test", "blinding"),
    ("17b", "Blinding of the reference standard", "blinding"),
    ("18", "Statistical methods", "uncertainty"),
    ("19", "Indeterminate results", "indeterminate"),
    ("20", "Missing data", "missing"),
    ("21", "Analyses of variability", "variability"),
    ("22", "Sample size", "size"),
    ("23", "Analysis of errors, bias and fairness", "fairness"),
    ("24", "Flow of participants, as a diagram", "flow"),
    ("25", "Characteristics of each part", "demographics"),
    ("26a", "Severity of disease", "severity"),
    ("26b", "Other diagnoses", "severity"),
    ("27", "Time between index test and reference", "interval"),
    ("28", "Whether data represent intended use", "representative"),
    ("29", "How external data differ", "external"),
    ("30", "Cross table of test and reference", "cross table"),
    ("31", "Accuracy and its precision", "performance"),
    ("32", "Adverse events", "harm"),
    ("33", "Limitations", "limitations"),
    ("34", "Implications for practice", "implications"),
    ("35", "Ethics and fairness of use", "ethics"),
    ("36", "Registration", "registration"),
    ("37", "Protocol", "protocol"),
    ("38", "Funding", "funding"),
    ("39", "Commercial interests", "conflicts"),
    ("40a", "Availability of data and code", "availability"),
    ("40b", "Whether outputs are stored and auditable", "audit"),
)
_CARD = (
    ("1", "Model details: name, version, type", "version"),
    ("1", "Model details: training, parameters, features", "training"),
    ("1", "Model details: licence and citation", "licence"),
    ("1", "Model details: owner and contact", "contact"),
    ("2", "Intended use", "use"),
    ("2", "Intended users", "users"),
    ("2", "Out-of-scope use", "out of scope"),
    ("3", "Factors: groups, instruments, environment", "factors"),
    ("4", "Metrics, thresholds, uncertainty", "metrics"),
    ("5", "Evaluation data", "counts"),
    ("6", "Training data", "between parts"),
    ("7", "Quantitative analyses, by group", "fairness"),
    ("8", "Ethical considerations", "ethics"),
    ("9", "Caveats and recommendations", "caveats"),
)
_CHECKLISTS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "CLAIM 2024": _CLAIM,
    "TRIPOD+AI": _TRIPOD,
    "STARD-AI": _STARD,
    "Model card": _CARD,
}
