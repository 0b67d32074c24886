"""What the page of a segmentation promises, on masks measured here."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import io
import json
import re
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from medtl.config import Config, EvaluationConfig, MasksConfig, UncertaintyConfig
from medtl.evaluation.masks import assess_masks, choose_components, choose_holes, compare_masks, measure_case
from medtl.records import Checkpoint, Cohort, Epoch, GridPlan, LoadReport, MaskQuality, Phase, Score, Structure
from medtl.report.acquired import Acquisition
from medtl.report.io import write_mask_report
from medtl.report.masks import (
    PREDICTED_LINE,
    SECTIONS,
    TRUE_LINE,
    MaskCase,
    MaskFacts,
    pictures,
    render,
)
from medtl.report.page import render as render_diagnosis
from medtl.report.pdf import as_pdf

HOSTILE = '"><script>alert(1)</script>{{ 7*7 }}'
EVALUATION = EvaluationConfig(uncertainty=UncertaintyConfig(resamples=100), masks=MasksConfig(lesions=True))


@functools.cache
def ball(shift, most=2, shape=(12, 14, 16)):
    places = np.indices(shape) - np.array([6, 7, 8]).reshape(3, 1, 1, 1) - np.array(shift).reshape(3, 1, 1, 1)
    apart = np.sqrt((places**2).sum(0))
    return np.minimum(np.where(apart < 2.5, 2, np.where(apart < 4.5, 1, 0)), most).astype(np.uint8)


def structures(*names):
    return tuple(Structure(name, (k,)) for k, name in enumerate(names, 1))


@functools.cache
def measured(names, seed=0, spread=2.0, studies=12):
    rng, known = np.random.default_rng(seed), structures(*names)
    found = []
    for i in range(studies):
        masks = [ball(tuple(shift), len(names)) for shift in ((0, 0, 0), rng.normal(0, spread, 3))]
        who = f"s-{150 + i}", f"p-{75 + i // 2}"
        found += measure_case(*who, *masks, (1.0, 1.0, 1.5), known, False, EVALUATION.masks)
    return tuple(found)


@functools.cache
def assessed(names, studies=12):
    return assess_masks(measured(names, studies=studies), EVALUATION, seed=0)


def make_plan(names):
    return GridPlan(
        structures(*names), None, 3, "axial", 0, 1, (1.0, 1.0, 1.0), "zscore", None, None, None, None, (),
        (40, 56, 40), 2, ((1, 1, 1), (2, 2, 2)), ((3, 3, 3), (3, 3, 3)), (32, 64), (), {"studies": 120},
        {"patch": "40 × 56 × 40: the whole of most volumes", "mirror": "nothing: sides differ"},
    )  # fmt: skip


def make_checkpoint(names):
    phase = Phase("scratch", ("head",), (), 1_400_000, 0, {"head": 1e-3}, "", "", 3, 0.14, None, kept=True, epochs=4,
                  monitor="dice", watched=0.861)  # fmt: skip
    history = tuple(Epoch("scratch", e, 1.2 / e, float("nan") if e == 2 else 1 - 0.2 * e, None) for e in (1, 2, 3, 4))
    none = LoadReport("none", None, 0, (), (), 0.0)
    return Checkpoint("dynunet", "multilabel", names, 1, (40, 56, 40), ("head",), none, (phase,), history, 1_400_000,
                      "cd" * 32, {"torch": "2.10"}, head="mask")  # fmt: skip


def make_case(results, worst):
    truth, predicted = ball((0, 0, 0)), ball((1, 0, 0))
    image = truth / 2.0
    return MaskCase(worst, results, pictures(image, truth, predicted, (1.0, 1.0, 1.5), 2, False, "axial"))


@pytest.fixture(scope="session", name="mask_facts")
def mask_facts_maker(make_facts):
    def make(names=("anterior", "posterior"), **changes):
        base = make_facts("multilabel", names, scratch=False)
        results = measured(names)
        cohort = Cohort("multilabel", names, base.cohort.studies, base.cohort.exclusions, structures=structures(*names))
        config = Config(name="hippocampus", evaluation=EVALUATION).model_dump(mode="json")
        quality = MaskQuality("linear", "error 0.021 on patients kept aside, 0.060 by the mean alone",
                              ("entropy", "views"), 0.7, (0.1, -0.2), (0.3, 0.2), (0.1, 0.1), 0.8, error=0.021,
                              error_of_the_mean=0.06, failures=3, failures_flagged=2, flagged=4,
                              studies=30)  # fmt: skip
        facts = {field.name: getattr(base, field.name) for field in fields(base)} | {
            "plan": make_plan(names),
            "config": config,
            "cohort": cohort,
            "acquisitions": {s.study_id: Acquisition("MR", 56, 40, 1.5, 0.75) for s in cohort.studies},
            "checkpoint": make_checkpoint(names),
            "evaluation": assessed(names),
            "results": results,
            "cases": (make_case(results[:2], worst=True), make_case(results[2:4], worst=False)),
            "components": choose_holes(
                choose_components(np.full((3, len(names)), 0.8), np.full((3, len(names)), 0.81), names, MasksConfig()),
                np.full((3, len(names)), 0.81),
                np.full((3, len(names)), 0.83),
                MasksConfig(),
            ),
            "quality": quality,
            "quality_scores": (Score("failures_flagged", "all", 0.8, 0.5, 0.95, 5, 5),),
        }
        return MaskFacts(**(facts | changes))

    return make


@pytest.fixture(scope="module")
def facts(mask_facts):
    return mask_facts()


@pytest.fixture(scope="module")
def page(facts):
    return render(facts)


def text_of(page):
    return re.sub(r"<[^>]+>", " ", page.split("<body>")[1])


def test_sections_come_in_order_and_are_named_and_linked(page):
    assert re.findall(r'<section id="(\w+)"', page) == list(SECTIONS)
    for name in SECTIONS:
        assert f'aria-labelledby="{name}-title"' in page
        assert f'<li><a href="#{name}">' in page


@pytest.mark.parametrize(
    "said",
    ["Segmentation report", "outlines 2 structures", "have a mean Dice below 0.7", "Weakest structure", "within 1 mm",
     "Studies with a mask", "the largest part alone", "0.8100 with the largest part alone",
     "0.8300 with holes filled", "or nothing, as where a structure is not outlined", "Empty masks",
     "Lesions found",
     "Val. Dice", "0.861", "40 × 56 × 40", "sides differ", "2 levels", "of 3 failures on validation 2 were",
     "Among the worst", "r-3f9a1c20", "Children were not studied.", "two readers differ",
     "CLAIM 2024"],
)  # fmt: skip
def test_what_a_reader_needs_is_on_the_page(page, said):
    assert said in text_of(page)


@pytest.mark.parametrize(
    "row",
    ["Scans decoded, masks among them 102 patients 204 scans", "Modality: MR 60 15 25",
     "Rows × columns: 56 × 40 60 15 25", "Slice spacing, mm: median (quartiles) 1.5 (1.5 to 1.5)",
     "In-plane spacing, mm: median (quartiles) 0.75", "no learning curve"],
)  # fmt: skip
def test_it_says_how_many_patients_there_are_and_how_they_were_scanned(page, row):
    assert row in " ".join(text_of(page).split())


def test_every_structure_stands_with_its_interval(page, facts):
    for name in ("anterior", "posterior"):
        score = next(s for s in facts.evaluation.scores if (s.metric, s.label) == ("dice", name))
        assert f"{score.value:.3f} [{score.low:.3f},\u00a0{score.high:.3f}]" in page


def test_what_means_nothing_for_masks_is_not_said(page):
    for word in ("Sensitivity", "Predictive values", "operating point", "probability of"):
        assert word not in text_of(page)


def test_the_same_facts_give_the_same_bytes(tmp_path, mask_facts):
    first, second = (write_mask_report(tmp_path / name, mask_facts()) for name in ("one", "two"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    record = json.loads((tmp_path / "one" / "report.json").read_bytes())
    assert record["masks"]["components"][0]["keep"] == "largest"
    assert record["plan"]["patch"] == [40, 56, 40]
    assert record["checklists"]["CLAIM 2024"]


@pytest.mark.browser
def test_no_page_of_its_pdf_is_blank_and_nothing_reaches_into_its_margins(tmp_path, page, check_print):
    (tmp_path / "report.pdf").write_bytes(as_pdf(page))
    check_print(tmp_path / "report.pdf")


def test_nobody_can_be_told_from_the_page_or_its_record(tmp_path, facts):
    for path in write_mask_report(tmp_path, facts):
        assert not re.search(rb"\b[ps]-\d+\b", path.read_bytes())


def test_other_masks_give_another_page(page, facts):
    results = measured(facts.evaluation.classes, seed=1)
    assert render(replace(facts, results=results)) != page


def test_hostile_names_stay_text(mask_facts):
    page = render(mask_facts((HOSTILE, "posterior")))
    assert "<script" not in page and "{{ 7*7 }}" in text_of(page)
    assert "&lt;script&gt;" in page


def test_nothing_is_fetched_or_run(page):
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = html.unescape(re.search(r'Security-Policy" content="([^"]*)"', page).group(1))
    assert f"style-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert " style=" not in page


def test_headings_skip_no_level_and_pictures_are_described_each_in_its_own_words(page):
    levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", page)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    words = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(set(words)) == len(words) == 10
    assert min(map(len, words)) > 40


def test_no_identifier_is_used_twice_and_what_scrolls_is_reached_by_keyboard(page):
    names = re.findall(r' id="([^"]+)"', page)
    assert len(set(names)) == len(names)
    assert page.count('class="scroll"') == page.count('class="scroll" tabindex="0" role=')


def test_one_structure_and_little_else_make_a_page_too(mask_facts, facts):
    results = measured(("vessel",), studies=2)
    bare = mask_facts(
        ("vessel",), results=results, evaluation=assessed(("vessel",), 2), cases=(), components=(),
        quality=None, quality_scores=(), gate=(), unit="pixels",
        checkpoint=replace(facts.checkpoint, classes=("vessel",), history=()),
        plan=replace(make_plan(("vessel",)), dimensions=2, axis=None, spacing_mm=None, patch=(64, 64)),
    )  # fmt: skip
    said = text_of(render(bare))
    for words in ("outlines “vessel”", "No single cases are shown", "within 1 pixels", "HD95, pixels"):
        assert words in said


def test_empty_masks_are_not_estimable_and_not_zero(mask_facts):
    nothing = np.zeros((3, 4, 5), np.uint8)
    two, masks = structures("a", "b"), EVALUATION.masks
    cases = [(f"s-{150 + i}", f"p-{75 + i}", nothing, nothing, (1.0,) * 3, two, False, masks) for i in range(3)]
    results = tuple(one for case in cases for one in measure_case(*case))
    page = render(mask_facts(("a", "b"), results=results, evaluation=assess_masks(results, EVALUATION, seed=0)))
    assert "not estimable: no case has a value" in text_of(page)


def test_a_comparison_stands_with_its_verdict(mask_facts, facts):
    worse = measured(facts.evaluation.classes, seed=5, spread=4.0)
    comparison = compare_masks(facts.results, worse, ("with weights", "from scratch"), EVALUATION, seed=0)
    weights = LoadReport("vault:some", "ef" * 32, 12, (), (), 1.0)
    checkpoint = replace(facts.checkpoint, weights=weights)
    changed = replace(facts, comparison=comparison, checkpoint=checkpoint, scratch_evaluation=facts.evaluation)
    said = text_of(render(changed))
    assert "Transfer helped: Dice is higher by" in said
    assert "Wilcoxon signed-rank" in said
    assert "How both were trained" not in said  # nothing is known of the other
    bare = replace(facts.checkpoint, phases=(replace(facts.checkpoint.phases[0], learning_rates={"head": 1e-4}),))
    said = text_of(render(replace(changed, scratch=bare)))
    assert said.index("Transfer helped") < said.index("Before you believe it") < said.index("How both were trained")
    assert "learned at a rate of 0.0001, with transfer at 0.001" in said and "Best Dice on validation" in said


def test_the_page_of_a_diagnosis_is_as_it_was(make_facts):
    said = text_of(render_diagnosis(make_facts()))
    assert "Studies with a label" in said and "Model report" in said


def decoded(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.png))))


def test_planes_are_taken_where_the_structure_is_largest_and_lines_lie_on_it():
    truth = np.zeros((10, 20, 30), np.uint8)
    truth[2:5, 4:9, 20:26] = 1
    truth[3, 2:12, 18:28] = 1  # the largest axial plane
    image = np.full(truth.shape, 0.25)
    drawn = pictures(image, truth, np.zeros_like(truth), (3.0, 1.0, 1.0), 1, False, "axial")
    assert [one.plane for one in drawn] == ["axial", "coronal", "sagittal"]
    axial = decoded(drawn[0])
    lines = np.argwhere((axial == TRUE_LINE).all(-1))
    scale = axial.shape[1] / 30
    assert axial.shape[:2] == (round(20 * scale), 320)
    assert lines.min(0) / scale == pytest.approx([2, 18], abs=0.2)
    assert lines.max(0) / scale == pytest.approx([12, 28], abs=0.2)
    assert decoded(drawn[1]).shape[:2] == (320, 320)  # 10 slices of 3 mm beside 30 columns of 1 mm


def test_the_prediction_is_dashed_and_another_colour():
    truth, predicted = np.zeros((2, 40, 40), np.uint8)
    truth[10:20, 10:20] = predicted[20:30, 20:30] = 1
    (drawn,) = pictures(np.zeros((40, 40, 3)), truth, predicted, (1.0, 1.0), 1, False)
    shown = decoded(drawn)
    true, told = ((shown == colour).all(-1) for colour in (TRUE_LINE, PREDICTED_LINE))
    assert 0.35 < told.sum() / true.sum() < 0.65
    assert not (true & told).any()


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_the_head_and_the_front_are_at_the_top_in_every_plane(axis):
    """A bright corner at the head, the front and the right lies at the top left of each plane that shows it."""
    towards = {"axial": "SPL", "coronal": "AIL", "sagittal": "RIP"}[axis]  # slices, rows, columns ascend to
    corner = tuple(slice(6, 8) if letter in "SAR" else slice(0, 2) for letter in towards)
    image = np.zeros((8, 8, 8))
    truth = np.zeros(image.shape, np.uint8)
    truth[corner] = 1
    for fixed, one in enumerate(pictures(image, truth, truth * 0, (1.0,) * 3, 1, False, axis)):
        shown = (decoded(one) == TRUE_LINE).all(-1)
        assert shown[:160, :160].any(), (axis, fixed)
        assert not shown[160:].any() and not shown[:, 160:].any()


def test_pictures_of_other_shapes_are_refused():
    mask = np.zeros((4, 5, 6), np.uint8)
    with pytest.raises(ValueError, match="equal ones"):
        pictures(np.zeros((4, 5, 5)), mask, mask, (1.0,) * 3, 1, False, "axial")
    with pytest.raises(ValueError, match="how it is turned"):
        pictures(np.zeros((4, 5, 6)), mask, mask, (1.0,) * 3, 1, False)


def test_a_learning_curve_is_of_dice(mask_facts, make_growth):
    page = render(mask_facts(growth=make_growth("dice")))
    assert "Learning curve: Dice on validation over the number of training patients" in page
    assert "0.861 [0.811, 0.891]" in page
