"""The page of folds shows what folds have."""

from __future__ import annotations

from dataclasses import replace

from medtl.records import FoldScores, Score
from medtl.report.folds import Design, render


def test_a_metric_that_no_fold_has_by_itself_is_pooled_and_has_no_empty_column(make_facts):
    evaluation = make_facts().evaluation
    folds = tuple(FoldScores(f"{n}", 0, 25, 12, {"auroc": 0.9 + n / 100, "pixel_auroc": None}) for n in (1, 2))
    pixels = Score("pixel_auroc", "macro", 0.97, 0.96, 0.98, 50, 25)
    design = Design("patient", "Vessels", "encoder_unet", "none", 50, 25, True)
    text = render(replace(evaluation, folds=folds, scores=(*evaluation.scores, pixels)), design)
    pooled, each = text.split("What each fold", 1)
    assert "AUROC of pixels, all images together" in pooled and "AUROC of pixels" not in each
    assert "0.910" in each and "0.920" in each


def test_distances_of_pictures_are_in_pixels(make_facts):
    folds = (FoldScores("1", 0, 25, 12, {"hd95_mm": 3.5}),)
    distance = Score("hd95_mm", "macro", 3.5, 3.0, 4.0, 50, 25)
    evaluation = replace(make_facts().evaluation, folds=folds, scores=(distance,))
    design = Design("patient", "Vessels", "encoder_unet", "none", 50, 25, True)
    assert render(evaluation, design).count("HD95, mm") == 2
    text = render(evaluation, replace(design, unit="pixels"))
    assert (text.count("HD95, pixels"), text.count("HD95, mm")) == (2, 0)
