"""The page of folds shows what folds have."""

from __future__ import annotations

from dataclasses import replace

from medtl.records import Comparison, FoldScores, PairedTest, Score
from medtl.report.folds import Design, render, strip


def test_a_metric_that_no_fold_has_by_itself_is_pooled_and_has_no_empty_column(make_facts):
    evaluation = make_facts().evaluation
    folds = tuple(FoldScores(f"{n}", 0, 25, 12, {"auroc": 0.9 + n / 100, "pixel_auroc": None}) for n in (1, 2))
    pixels = Score("pixel_auroc", "macro", 0.97, 0.96, 0.98, 50, 25)
    design = Design("patient", "Vessels", "encoder_unet", "none", 50, 25, True)
    text = render(replace(evaluation, folds=folds, scores=(*evaluation.scores, pixels)), design)
    pooled, each = text.split("What each fold", 1)
    assert "AUROC of pixels, all images together" in pooled and "AUROC of pixels" not in each
    assert "0.910" in each and "0.920" in each


def test_both_beginnings_stand_side_by_side_with_what_chance_would_say(make_facts):
    evaluation = make_facts().evaluation
    folds = tuple(FoldScores(f"{n}", 0, 25, 12, {"dice": 0.8 + n / 100}) for n in (1, 2))
    with_weights = replace(evaluation, folds=folds, scores=(Score("dice", "macro", 0.815, 0.8, 0.83, 50, 25),))
    without = replace(
        evaluation,
        folds=tuple(replace(one, values={"dice": 0.7}) for one in folds),
        scores=(Score("dice", "macro", 0.7, 0.68, 0.72, 50, 25), Score("nsd", "macro", 0.6, 0.5, 0.7, 50, 25)),
    )
    difference = Score("dice", "macro", 0.115, 0.1, 0.13, 50, 25)
    tests = (PairedTest("Wilcoxon", 3.0, 0.0006), PairedTest("sign", 1.0, 0.0123))
    comparison = Comparison("dice", "transfer", "scratch", difference, without.scores[0], tests)
    design = Design("patient", "Vessels", "encoder_unet", "imagenet", 50, 25, True)
    alone = render(with_weights, design)
    text = render(with_weights, replace(design, scratch=without, comparison=comparison))
    assert "hollow" not in alone and "hollow" in text
    assert strip(with_weights) != strip(with_weights, without)
    said = text.split("Transfer or scratch", 1)[1]
    assert all(
        figure in said for figure in ("0.815 [", "0.700 [", "0.115 [", "p &lt;0.001 (Wilcoxon)", "p 0.012 (sign)")
    )
    assert said.index("With weights<") < said.index("Without<") < said.index("0.815 [") < said.index("0.700 [")
    assert "Transfer helped: Dice is higher by 0.115" in said
    assert "Normalised surface distance" not in said  # which only one of them has
    assert "says nothing about transfer" in render(
        with_weights, replace(design, weights="none", scratch=without, comparison=comparison)
    )


def test_distances_of_pictures_are_in_pixels(make_facts):
    folds = (FoldScores("1", 0, 25, 12, {"hd95_mm": 3.5}),)
    distance = Score("hd95_mm", "macro", 3.5, 3.0, 4.0, 50, 25)
    evaluation = replace(make_facts().evaluation, folds=folds, scores=(distance,))
    design = Design("patient", "Vessels", "encoder_unet", "none", 50, 25, True)
    assert render(evaluation, design).count("HD95, mm") == 2
    text = render(evaluation, replace(design, unit="pixels"))
    assert (text.count("HD95, pixels"), text.count("HD95, mm")) == (2, 0)
