"""Facts of a small study, complete enough that every section of a report has something to say."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from medtl.config import Config
from medtl.records import (
    AbstentionFindings,
    CalibrationFindings,
    Calibrator,
    Case,
    Checkpoint,
    CleanProof,
    Cohort,
    Comparison,
    ConformalRule,
    Curve,
    CurvePoint,
    Epoch,
    Evaluation,
    Examination,
    Exclusion,
    Explanations,
    FeatureCheck,
    Gap,
    GateCheck,
    LearningCurve,
    LoadReport,
    NoveltyFindings,
    OperatingPoint,
    PairedTest,
    Phase,
    Plan,
    Predictions,
    Probe,
    SanityCheck,
    Score,
    ShortcutFindings,
    Split,
    Study,
    Subgroup,
    SubgroupFindings,
)
from medtl.report.acquired import Acquisition
from medtl.report.facts import Facts

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")


def make_cohort(task, classes, demographics=True):
    studies = []
    for i in range(200):
        if task == "multilabel":
            target = tuple(None if (i + c) % 11 == 0 else int((i + c) % 4 == 0) for c in range(len(classes)))
        else:
            target = tuple(int(c == i % len(classes)) for c in range(len(classes)))
        known = {"site": f"site {i % 3}", "sex": "FM"[i // 2 % 2], "age_years": 30.0 + i % 60, "scanner": "Alpha XR"}
        studies.append(
            Study(f"s-{i}", f"scan-{i}", f"p-{i // 2}", target, f"px-{i}", **(known if demographics else {}))
        )
    left_out = (Exclusion("s-x", "studies", "no_label", "The label table has no row for this image."),)
    return Cohort(task, classes, tuple(studies), left_out)


def make_split(cohort):
    ids = [study.study_id for study in cohort.studies]
    groups = {study.study_id: study.patient for study in cohort.studies}
    return Split(tuple(ids[:120]), tuple(ids[120:150]), tuple(ids[150:]), groups, predefined=False)


def make_acquisitions(cohort):
    return {s.study_id: Acquisition("DX", 2000 + 500 * (i % 2), 1500) for i, s in enumerate(cohort.studies)}


def make_checkpoint(task, classes, weights):
    phases = tuple(
        Phase(name, STAGES[-n:], STAGES[:-n], 10_000 * n**3, 11_180_000 - 10_000 * n**3,
              {stage: 2e-3 * 0.5**k for k, stage in enumerate(reversed(STAGES[-n:]))}, "ab" * 32, "ab" * 32, 3,
              0.41 - 0.02 * n, 0.84 + 0.012 * n, kept=n == 6, epochs=3)
        for n, name in ((1, "head"), (3, "deep"), (6, "all"))
    )  # fmt: skip
    history = tuple(
        Epoch(p.name, e, 0.7 * 0.9 ** (3 * i + e), 0.72 * 0.93 ** (3 * i + e), 0.9 - 0.3 * 0.75 ** (3 * i + e))
        for i, p in enumerate(phases)
        for e in (1, 2, 3)
    )
    return Checkpoint("resnet18", task, classes, 1, (224, 224), STAGES, weights, phases, history, 11_180_000,
                      "cd" * 32, {"python": "3.11", "torch": "2.10"})  # fmt: skip


def make_evaluation(task, classes, shift=0.0):
    labels = classes[-1:] if task == "binary" else ("macro", *classes)
    values = {"auroc": 0.912, "average_precision": 0.874, "sensitivity": 0.881, "specificity": 0.833, "ppv": 0.792,
              "npv": 0.9, "balanced_accuracy": 0.857, "prevalence": 0.5, "brier": 0.108}  # fmt: skip
    scores = [
        Score(metric, label, v, v - 0.047, v + 0.036, 50, 25)
        for metric, best in values.items()
        for v in [best + shift if metric == "brier" else best - shift]
        for label in labels
    ]
    for metric, value in (("mcc", 0.71), ("positive_likelihood_ratio", 5.28), ("net_benefit", 0.31),
                          ("calibration_slope", 0.94)):  # fmt: skip
        scores.append(Score(metric, labels[0], value, 0.8 * value, 1.3 * value, 50, 25))
    scores.append(Score("f1", labels[0], None, None, None, 50, 25, "not estimable: no healthy patient was cleared"))
    x = tuple(i / 40 for i in range(41))
    reported = classes[-1:] if task == "binary" else classes
    curves = [Curve("roc", name, x, tuple(v ** (0.071 + 0.05 * k) for v in x)) for k, name in enumerate(reported)]
    bins = (0.06, 0.2, 0.4, 0.62, 0.8, 0.93)
    curves += [Curve("pr", name, x, tuple(1 - 0.55 * v**3 - 0.03 * k for v in x)) for k, name in enumerate(reported)]
    for name in reported:
        at = x[:-1]
        curves.append(Curve("decision", name, at, tuple(max(0.0, 0.45 - 0.5 * v) for v in at)))
        curves.append(Curve("decision_all", name, at, tuple(0.5 - 0.5 * v / (1 - v) for v in at)))
        curves.append(Curve("decision_none", name, at, (0.0,) * len(at)))
    curves += [
        Curve("calibration", name, bins, tuple(min(1, b**1.15 + 0.04 * k) for b in bins), (14, 6, 5, 5, 8, 12))
        for k, name in enumerate(reported)
    ]
    points = tuple(OperatingPoint(name, 0.437, "Youden's index", "val") for name in reported)
    confusion = {"binary": ((21, 4), (3, 22)), "multilabel": ((21, 4), (3, 22)) * len(classes)}.get(
        task, tuple(tuple(15 if i == j else 1 for j in range(len(classes))) for i in range(len(classes)))
    )
    notes = ("The test part holds 25 patients only; intervals from so few are wide and rough.",)
    return Evaluation(task, classes, tuple(scores), points, tuple(curves), confusion, 50, 25, 2000, notes)


def make_score(metric, label, value, spread=0.05):
    return Score(metric, label, value, max(0.0, value - spread), min(1.0, value + spread), 50, 25)


def make_subgroups(reported):
    values = {
        "sex": ("F", "M"),
        "age": ("under 40", "40 to under 65", "65 and over"),
        "site": ("north", "south", "east"),
    }
    groups, gaps = [], []
    for label in reported:
        for column, names in values.items():
            for k, name in enumerate(names):
                scores = [("auroc", 0.93), ("sensitivity", 0.9), ("specificity", 0.84), ("calibration_error", 0.12)]
                shown = tuple(make_score(metric, label, v - 0.06 * k, 0.04 + 0.02 * k) for metric, v in scores)
                if name == "east":
                    groups.append(Subgroup(column, name, label, None, None, None, (), "fewer than 10 patients"))
                else:
                    groups.append(Subgroup(column, name, label, 20 - k, 12 - k, 0.45, shown))
            gap = Score("auroc difference", label, 0.06 * (len(names) - 1), 0.01, 0.2, 40, 22)
            statement = (
                f"{label}: the AUROC is 0.060 lower for {column} {names[-1]} than for {names[0]}: more than chance."
            )
            gaps.append(Gap(column, label, "auroc", names[0], names[-1], gap, 0.031, statement))
    return SubgroupFindings(tuple(groups), tuple(gaps), 9, 0.95, ("1 groups show no figures: fewer than 10 patients.",))


def make_examination(task, classes):
    reported = classes[-1:] if task == "binary" else classes
    label = reported[-1] if task == "binary" else "macro"
    rows = ("all", *classes) if task != "multilabel" else classes
    bins = Curve("calibration", label, (0.1, 0.5, 0.9), (0.12, 0.49, 0.88), (20, 10, 20))
    sets = tuple((1.0, 0.9) for _ in reported)
    probe = Probe(
        "site from the features", make_score("auroc", "macro", 0.83), 0.51, 0.6, 0.005, 3, "The site is told."
    )
    quiet = Probe("label from the site alone", make_score("auroc", label, 0.52), 0.5, 0.58, 0.4, 3, "")
    flat = Probe("label from image properties alone", make_score("auroc", label, 0.61), 0.5, 0.62, 0.06, 8, "")
    return Examination(
        CalibrationFindings(
            Calibrator(task, "temperature", "least log loss on validation", temperature=1.7, patients=34),
            (make_score("brier", label, 0.14), make_score("calibration_error", label, 0.11)),
            (make_score("brier", label, 0.108), make_score("calibration_error", label, 0.05)),
            (Score("brier difference", label, -0.032, -0.05, -0.01, 50, 25),
             Score("calibration_error difference", label, -0.06, -0.1, 0.01, 50, 25)),
            (bins,),
        ),
        AbstentionFindings(
            ConformalRule(task, classes, "lac", 0.9, True, sets, tuple((17, 17) for _ in reported)),
            *(tuple(make_score(metric, name, value) for name in rows)
              for metric, value in (("coverage", 0.92), ("answered", 0.8), ("right where answered", 0.94))),
            tuple(Score("set size", name, 1.3, 1.1, 1.5, 50, 25) for name in rows),
            tuple(make_score("patients covered", name, 0.88) for name in rows),
        ),
        NoveltyFindings("relative", "", 1.8, 0.05, make_score("flagged", "all", 0.06),
                        (make_score("detection", "noise", 0.97, 0.02), make_score("detection", "blur", 0.81))),
        make_subgroups(reported),
        ShortcutFindings((probe,), (quiet,), flat, make_score("auroc difference", label, 0.3), ()),
        neighbours=FeatureCheck(200, 0.0031, 0.0142, {"train-val": 0, "train-test": 0, "val-test": 0}),
    )  # fmt: skip


def make_thumbnail(number, looked_at):
    """Draw a bright disc on noise, as a PNG in base64; with colour on it for where the network looked."""
    rows, columns = np.indices((160, 128))
    disc = np.hypot(rows - 60 - 12 * number, columns - 64) < 24
    grey = np.random.default_rng(number).integers(0, 80, disc.shape) + 120 * disc
    pixels = np.repeat(grey[..., None], 3, 2).astype(np.uint8)
    if looked_at:
        pixels[disc, 0] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def make_explanations(task, classes):
    truths = [f"{classes[-1]} {so}" for so in ("absent", "present")] if task == "multilabel" else classes[:2]
    answers = ((truths[0], truths[1], 0.97), (truths[1], truths[0], 0.91),
               (truths[1], truths[1], 0.99), (truths[0], truths[0], 0.98))  # fmt: skip
    cases = tuple(
        Case(truth == said, truth, said, chance, make_thumbnail(number, False), make_thumbnail(number, True))
        for number, (truth, said, chance) in enumerate(answers)
    )
    return Explanations("Grad-CAM", cases, SanityCheck("Grad-CAM", 4, 5, (("head", 0.6), ("stem", 0.1)), 0.5))


def make_beside():
    difference = Score("auroc difference", "macro", 0.02, -0.01, 0.05, 50, 25)
    live = Score("auroc", "macro", 0.892, 0.84, 0.93, 50, 25)
    tests = (PairedTest("DeLong, clustered by patient", 1.31, 0.19),)
    return Comparison("auroc", "this model", "r-11aa22bb", difference, live, tests, 0.02, "non-inferior")


def make_predictions(cohort, split):
    known = {study.study_id: study for study in cohort.studies}
    studies = [known[name] for name in split.test]
    truth = np.array([[np.nan if t is None else float(t) for t in s.target] for s in studies])
    noise = np.random.default_rng(3).normal(0, 1.1, truth.shape)
    scores = 1 / (1 + np.exp(-(3 * (np.nan_to_num(truth, nan=0.5) - 0.5) + noise)))
    return Predictions("test", split.test, tuple(s.patient for s in studies), truth, scores)


def make_growth(metric="auroc"):
    points = [
        CurvePoint(patients, 2 * patients, Score(metric, "macro", value, value - 0.05, value + 0.03, 34, 17))
        for patients, value in ((15, 0.714), (30, 0.803), (60, 0.861))
    ]
    gain = Score(f"{metric} difference", "macro", 0.058, 0.011, 0.104, 34, 17)
    return LearningCurve(tuple(points), "Nothing is trained on fewer than 15 patients.", gain)


def make_facts(task="binary", classes=("normal", "pneumonia"), scratch=True, demographics=True, full=False, **changes):
    """Make facts; ``full`` ones have curves and findings beyond the metrics too, and take a second to draw."""
    cohort = make_cohort(task, classes, demographics)
    weights = LoadReport("vault:radimagenet-resnet18", "ef" * 32, 120, (), ("fc.weight", "fc.bias"), 1.0,
                         "CC BY 4.0", "Mei et al., RadImageNet, Radiology: Artificial Intelligence 2022")  # fmt: skip
    none = LoadReport("none", None, 0, (), (), 0.0)
    difference = Score("auroc difference", "macro", 0.064, 0.011, 0.121, 50, 25)
    facts = Facts(
        title="Pneumonia on chest radiographs",
        config=Config(name="chest", seed=7, workspace="/home/anna/secret").model_dump(mode="json"),
        intended_use="Sorting the reading list of adult chest radiographs; a radiologist reads every image.",
        limits=("Children were not studied.",),
        files=231,
        scans=204,
        exclusions=(
            *(Exclusion(f"f-{i}", "scans", "not_an_image", "The file holds no image.") for i in range(24)),
            *(Exclusion(f"g-{i}", "scans", "truncated", "The pixel data end too early.") for i in range(3)),
        ),
        cohort=cohort,
        split=make_split(cohort),
        proof=CleanProof({"train": 120, "val": 34, "test": 50}, {"patient": 204, "pixels": 204, "near": 204}, (), 0.95,
                         0.5, 0, None),
        plan=Plan(task, classes, (224, 224), 1, 8, "fixed", 0.0, 255.0, (0.5, 99.5),
                  {"images": 120, "median_side": 1024.0, "modalities": ["DX"]},
                  {"size": "224: the median longer side, held to max_size", "bits": "8: every image has 8 bits"}),
        checkpoint=make_checkpoint(task, classes, weights),
        evaluation=make_evaluation(task, classes),
        scratch=make_checkpoint(task, classes, none) if scratch else None,
        scratch_evaluation=make_evaluation(task, classes, 0.064) if scratch else None,
        comparison=Comparison("auroc", "transfer", "scratch", difference,
                              Score("auroc", "macro", 0.848, 0.79, 0.9, 50, 25)) if scratch else None,
        release_status="validated",
        gate=(GateCheck("lower bound of auroc >= 0.8", 0.865, True),),
        release_id="r-3f9a1c20",
        provenance={"cohort": "12" * 32, "config": "34" * 32, "environment": {"torch": "2.10"}},
        test_openings=1,
        scan_patients=102,
        acquisitions=make_acquisitions(cohort) if demographics else {},
        examination=make_examination(task, classes) if full else None,
        beside=make_beside() if full else None,
        predictions=make_predictions(cohort, make_split(cohort)) if full else None,
        explanations=make_explanations(task, classes) if full else None,
        growth=make_growth() if full else None,
        resources={"seconds_per_step": 0.213, "peak_memory_mb": 1893.0},
    )  # fmt: skip
    if not full:
        evaluation = replace(facts.evaluation, curves=())
        facts = replace(facts, evaluation=evaluation, checkpoint=replace(facts.checkpoint, history=()))
    return replace(facts, **changes)


def pytest_runtest_setup(item):
    """Leave out what needs Chromium, poppler and WeasyPrint, unless MEDTL_TEST_BROWSER=1 says that they are there."""
    if item.get_closest_marker("browser") and os.environ.get("MEDTL_TEST_BROWSER") != "1":
        pytest.skip("needs Chromium, poppler and WeasyPrint: make test-browser")


@pytest.fixture(scope="session", name="make_facts")
def facts_maker():
    """Give the function that makes facts: of a task, of classes, with changes."""
    return make_facts


@pytest.fixture(scope="session", name="make_growth")
def growth_maker():
    """Give the function that makes a learning curve of a metric."""
    return make_growth


@pytest.fixture(name="check_print")
def print_checker(tmp_path):
    """Give the function that draws a PDF with poppler, and wants ink on each page and none in its margins."""

    def check(path, dots_per_inch=50):
        told = subprocess.run(["pdfinfo", path], capture_output=True, check=True).stdout.decode()
        subprocess.run(["pdftoppm", "-gray", "-r", str(dots_per_inch), path, tmp_path / "page"], check=True)
        drawn = sorted(tmp_path.glob("page-*.pgm"))
        assert len(drawn) == int(re.search(r"Pages: +(\d+)", told).group(1)) > 1
        side, bottom = (int(mm / 25.4 * dots_per_inch) for mm in (16, 18))  # as in page.css; the top is as the side
        for number, file in enumerate(drawn, 1):
            ink = np.asarray(Image.open(file)) < 250
            inner = np.zeros_like(ink)
            inner[side:-bottom, side:-side] = True
            assert ink[inner].mean() > 0.01, f"page {number} is blank"
            inner[-bottom:, ink.shape[1] * 3 // 4 : -side] = True  # its number
            assert not (ink & ~inner).any(), f"page {number} has ink in its margins"

    return check


class Chromium:
    """One tab of a headless Chromium, over the DevTools protocol (JSON, each message closed by a zero byte)."""

    def __init__(self, folder):
        inward, outward = os.pipe(), os.pipe()
        program = shutil.which("chromium") or shutil.which("chromium-browser") or "google-chrome"
        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL without a GPU
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        joined = f'exec "$@" 3<&{inward[0]} 4>&{outward[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", joined, "bash", program, *flags, "about:blank"],
            pass_fds=(inward[0], outward[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(inward[0])
        os.close(outward[1])
        self.write, self.read, self.rest = inward[1], outward[0], b""
        self.numbers, self.events, self.session = itertools.count(1), [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        answer = self.until(lambda said: said.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def until(self, wanted, seconds=60):
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self.rest:
                line, self.rest = self.rest.split(b"\0", 1)
                said = json.loads(line)
                self.events.append(said)
                if wanted(said):
                    return said
            assert select.select([self.read], [], [], max(0, end - time.monotonic()))[0], "Chromium does not answer"
            self.rest += os.read(self.read, 1 << 20)

    def open(self, path, width, dark=False):
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=path.as_uri())
        self.until(lambda said: said.get("method") == "Page.loadEventFired")
        time.sleep(0.3)  # for a late request

    def ask(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression, seconds=60):
        end = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < end, f"{expression} does not come true"
            time.sleep(0.1)

    def photograph(self, path):
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(taken))
        return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L"))

    def named(self, method):
        return [said["params"] for said in self.events if said.get("method") == method]

    def requests(self):
        return [said["request"]["url"] for said in self.named("Network.requestWillBeSent")]

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        os.close(self.read)
        os.close(self.write)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Give a tab of a Chromium, the same to all."""
    made = Chromium(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()
