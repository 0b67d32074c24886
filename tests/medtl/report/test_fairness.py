"""What a page says about how both networks of a comparison were trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from medtl.records import Checkpoint, Comparison, Epoch, LoadReport, Phase, Refit, Score
from medtl.report.fairness import curves, of, terms
from medtl.report.figures import COLOURS
from medtl.report.folds import Design
from medtl.report.folds import render as render_folds
from medtl.report.page import render

LOADED, NOTHING = LoadReport("imagenet", "ef" * 32, 60, (), (), 1.0), LoadReport("none", None, 0, (), (), 0.0)
RISEN = (0.6, 0.7, 0.8, 0.82, 0.84, 0.85, 0.855, 0.858, 0.859, 0.861, 0.86, 0.861, 0.862, 0.861, 0.862)
RISING = (*RISEN[:12], 0.87, 0.88, 0.89)  # by .0193 in the last fifth


def trained(weights, values=RISEN, rate=1e-3, mask=False, frozen=()):
    """Describe a network with one phase; ``values`` are what validation showed, one an epoch."""
    phase = Phase("all", ("stem", "head"), frozen, 1000, 0, {"stem": rate / 2, "head": rate}, "", "", 3, 0.4, 0.9,
                  kept=True, epochs=len(values))  # fmt: skip
    history = tuple(
        Epoch("all", number, 0.5, 1 - value if mask else 0.4, None if mask else value)
        for number, value in enumerate(values, 1)
    )
    return Checkpoint("resnet18", "binary", ("a", "b"), 1, (64, 64), ("stem", "head"), weights, (phase,), history, 1000,
                      "cd" * 32, {}, head="mask" if mask else "linear")  # fmt: skip


def compared(value, reference_low=0.7, metric="auroc"):
    difference = Score(f"{metric} difference", "macro", value, value - 0.01, value + 0.01, 50, 25)
    return Comparison(
        metric, "transfer", "scratch", difference, Score(metric, "macro", 0.8, reference_low, 0.9, 50, 25)
    )


def cautions(with_weights, without, comparison=None):
    return terms([with_weights], [without], comparison or compared(0.05)).cautions


def test_two_trainings_that_are_alike_need_no_caution():
    assert cautions(trained(LOADED), trained(NOTHING)) == ()


@pytest.mark.parametrize(("rate", "said"), [(1e-4, True), (3.3e-4, True), (3.4e-4, False), (1e-2, False)])
def test_a_reference_with_a_lower_rate_is_said(rate, said):
    found = cautions(trained(LOADED), trained(NOTHING, rate=rate))
    assert ("learned at a rate" in " ".join(found)) is said
    assert not said or (f"{rate:.2g}" in found[0] and "0.001" in found[0])


def test_the_rate_of_a_head_alone_is_compared_with_nothing():
    head = trained(LOADED, rate=1e-1, frozen=("stem",))
    both = terms([head], [trained(NOTHING)], compared(0.05))
    assert both.transfer.rate is None and both.scratch.rate == 1e-3 and not both.cautions


def test_the_rate_is_the_highest_of_the_phases_in_which_all_of_it_learned():
    (phase,) = trained(LOADED).phases
    polish = replace(phase, name="polish", learning_rates={"stem": 5e-7, "head": 1e-6})
    solved = replace(phase, name="solved", head="logistic_regression", learning_rates={"head": 1.0})
    several = replace(trained(LOADED), phases=(phase, polish, solved))
    assert terms([several], [trained(NOTHING)]).transfer.rate == 1e-3


def test_far_fewer_epochs_are_said():
    (found,) = cautions(trained(LOADED), trained(NOTHING, RISEN[-11:]))
    assert "for 11 epochs, with transfer for 15" in found and "patience" in found
    assert cautions(trained(LOADED), trained(NOTHING, RISEN[-12:])) == ()
    assert cautions(trained(LOADED, RISEN[-8:]), trained(NOTHING)) == ()
    assert "for one epoch, with" in cautions(trained(LOADED), trained(NOTHING, (0.8,)))[0]


@pytest.mark.parametrize(
    ("with_weights", "without", "difference", "named"),
    [
        (RISEN, RISING, 0.05, "From scratch"),
        (RISEN, RISING, 0.5, None),  # what was gained is little beside the difference
        (RISEN, RISING, -0.05, None),  # it won as it was
        (RISING, RISEN, -0.05, "With transfer"),
        (RISING, RISEN, 0.05, None),
        (RISEN, RISING, 0.005, None),  # nobody lost: the interval holds 0
        (RISEN, (*RISEN[:12], 0.862, 0.864, 0.865), 0.011, None),  # too little to matter
        (RISEN, (*RISEN[:10], 0.84, 0.86, 0.88, 0.85, 0.9), 0.05, None),  # no more than it goes up and down
        (RISEN, RISING[-5:], 0.05, None),  # one epoch is no slope
    ],
)
def test_the_side_that_lost_while_it_was_still_rising(with_weights, without, difference, named):
    found = [c for c in cautions(trained(LOADED, with_weights), trained(NOTHING, without), compared(difference))
             if "improving" in c]  # fmt: skip
    assert len(found) == (named is not None)
    assert named is None or (found[0].startswith(f"{named} was still improving") and "0.019" in found[0])


@pytest.mark.parametrize(("epochs", "folds"), [(12, 1), (15, 5), (36, 1), (36, 5)])
def test_noise_is_seldom_called_a_change_and_a_collapse_always_is(epochs, folds):
    chance, said = np.random.default_rng(0), Counter()
    learns = 0.85 - 0.25 * np.exp(-8 * np.arange(epochs) / epochs)
    for _ in range(100):
        one, other = ([trained(weights, learns + chance.normal(0, 0.03, epochs)) for _ in range(folds)]
                      for weights in (LOADED, NOTHING))  # fmt: skip
        words = " ".join(terms(one, other, compared(0.02)).cautions)
        said.update(word for word in ("improving", "fell back") if word in words)
    assert said["improving"] <= 6 and said["fell back"] <= 6
    dies = np.where(np.arange(epochs) < epochs / 2, learns, 0.5) + chance.normal(0, 0.03, epochs)
    others = [trained(NOTHING, learns) for _ in range(folds - 1)]
    assert "fell back" in " ".join(terms([trained(LOADED)], [trained(NOTHING, dies), *others]).cautions)


def test_the_last_fifth_is_one_of_epochs_however_often_they_were_validated():
    seldom = [0.5 + min(epoch, 60) / 200 if epoch % 10 == 0 or epoch <= 20 else float("nan") for epoch in range(1, 101)]
    both = terms([trained(LOADED, mask=True)], [trained(NOTHING, seldom, mask=True)], compared(0.05, metric="dice"))
    assert both.scratch.rise == pytest.approx(0) and not both.cautions


def test_a_gain_on_validation_is_held_against_a_difference_of_the_same_metric_alone():
    far = compared(0.5, metric="average_precision")
    (found,) = cautions(trained(LOADED), trained(NOTHING, RISING), far)
    assert "still improving" in found


DIED = (0.8, 0.96, 0.9, 0.6, *[0.5] * 11)


def test_a_reference_that_collapsed_is_named():
    (found,) = cautions(trained(LOADED), trained(NOTHING, DIED))
    assert "From scratch fell back: in its last epochs the AUROC on validation is 0.387 below" in found
    assert cautions(trained(LOADED), trained(NOTHING, (*RISEN[:12], 0.85, 0.845, 0.84))) == ()  # it overfits a little


def test_one_collapse_among_the_folds_is_enough():
    nine = [trained(NOTHING)] * 9
    (found,) = terms([trained(LOADED)] * 10, [*nine, trained(NOTHING, DIED)], compared(0.05)).cautions
    assert "fell back in 1 of 10 folds" in found


def test_a_reference_that_learned_nothing_is_named():
    (found,) = cautions(trained(LOADED), trained(NOTHING), compared(0.3, reference_low=0.48))
    assert "may have learned nothing" in found
    assert cautions(trained(LOADED, mask=True), trained(NOTHING, mask=True), compared(0.3, 0.2, "dice")) == ()


def test_where_nothing_was_transferred_there_is_nothing_to_be_fair_about():
    both = terms([trained(NOTHING)], [trained(NOTHING, rate=1e-5)], compared(0.05))
    assert both.cautions == () and "Nothing was transferred" in both.warnings[0] and len(both.warnings) == 1
    alike = terms([trained(LOADED)], [trained(NOTHING, rate=1e-5)], compared(0.05))
    assert alike.warnings == alike.cautions and len(alike.cautions) == 1


def test_masks_are_watched_by_dice_and_not_in_every_epoch():
    values = (0.5, float("nan"), 0.6, float("nan"), 0.7, 0.75, 0.8, 0.9)
    both = terms([trained(LOADED, mask=True)], [trained(NOTHING, values, mask=True)], compared(0.05, metric="dice"))
    assert (both.scratch.metric, both.scratch.epochs, both.scratch.best) == ("dice", 8, pytest.approx(0.9))
    assert [epoch for epoch, _ in both.scratch.courses[0]] == [1, 3, 5, 6, 7, 8]
    assert both.scratch.rise == pytest.approx((0.8 + 0.9) / 2 - (0.7 + 0.75) / 2)  # of the epochs after 6.4; to there
    assert both.scratch.rise_error is not None
    assert "Best Dice on validation" in {row[0]: row for row in both.table().rows}


def test_folds_give_the_mean_and_a_line_each():
    longer = trained(NOTHING, (*RISEN, 0.87))
    both = terms([trained(LOADED)] * 2, [trained(NOTHING), longer], compared(0.05))
    drawn = curves(both) or ""
    assert all(drawn.count(colour) >= 2 for colour in COLOURS[:2])  # a line for each fold of either side, and a name
    assert drawn != curves(terms([trained(LOADED)] * 2, [trained(NOTHING)] * 2))
    assert len(drawn) > len(curves(terms([trained(LOADED)], [trained(NOTHING)])) or drawn)
    assert both.scratch.epochs == 15.5 and len(both.scratch.courses) == 2
    assert both.scratch.best == pytest.approx((0.862 + 0.87) / 2)
    assert {row[0]: row[1:] for row in both.table().rows}["Epochs"] == ("15", "15.5")


def test_a_fold_that_cannot_be_validated_hides_no_other():
    blind = trained(NOTHING)
    blind = replace(blind, history=tuple(replace(epoch, val_auroc=None) for epoch in blind.history))
    both = terms([trained(LOADED)] * 2, [trained(NOTHING), blind], compared(0.05))
    assert curves(both) == curves(terms([trained(LOADED)] * 2, [trained(NOTHING)]))
    assert both.scratch.best == pytest.approx(0.862)
    assert "0.862 (of 1 of 2 folds)" in str(both.table().rows)
    assert "folds)" not in str(terms([trained(LOADED)], [blind]).table().rows)
    assert curves(terms([trained(LOADED)], [blind])) is None


def test_few_epochs_tell_nothing_of_a_slope_and_one_draws_no_line():
    short = trained(NOTHING, (0.5, 0.9))
    both = terms([trained(LOADED)], [short], compared(0.05))
    assert both.scratch.rise is None and both.scratch.fallen == () and curves(both) is not None
    assert curves(terms([trained(LOADED)], [trained(NOTHING, (0.5,))])) is None


def test_without_a_comparison_only_what_needs_none_is_said():
    found = terms([trained(LOADED)], [trained(NOTHING, RISING, rate=1e-4)]).cautions
    assert len(found) == 1 and "rate" in found[0]


def again(checkpoint, losses):
    """Train it a second time, on validation too; ``losses`` are what was left of each epoch."""
    epochs = tuple(Epoch("all", number, loss, float("nan"), None) for number, loss in enumerate(losses, 1))
    return replace(checkpoint, refit=Refit("cd" * 32, 20, 10, checkpoint.phases, epochs))


def test_second_trainings_are_named_and_their_lengths_shown():
    one, other = again(trained(LOADED), (0.6, 0.5, 0.5)), again(trained(NOTHING), (0.6, 0.5))
    both = terms([one, again(one, (0.5,) * 4)], [other, other], compared(0.05))
    assert (both.transfer.again, both.scratch.again, both.cautions) == (3.5, 2, ())
    assert ("Epochs of the second training", "3.5", "2") in both.table().rows
    once = terms([trained(LOADED)], [trained(NOTHING)], compared(0.05))
    assert (once.transfer.again, once.twice, both.twice) == (None, False, True)
    assert len(both.table().rows) == len(once.table().rows) + 1


@pytest.mark.parametrize(("ends", "said"), [(0.74, False), (0.75, True), (1.5, True)])
def test_a_second_training_that_went_otherwise_is_said(ends, said):
    one, other = again(trained(LOADED), (0.5,)), again(trained(NOTHING), (0.5, ends))  # 0.5 was left by the first
    found = cautions(one, other)
    assert bool(found) is said
    assert not said or f"From scratch the second training ended with up to {ends / 0.5:.2g} times" in found[0]
    several = terms([one] * 3, [again(other, (0.75,)), other, again(other, (0.5,))], compared(0.05)).cautions
    assert f"From scratch {1 + said} of 3 ended with up to {max(1.5, ends / 0.5):.2g} times" in several[0]
    turned = cautions(again(trained(LOADED), (0.5, ends)), again(trained(NOTHING), (0.5,)))
    assert ("With transfer the second" in " ".join(turned)) is said


def test_the_loss_of_a_second_training_is_held_against_the_state_that_was_kept():
    first = trained(LOADED)
    (phase,) = first.phases  # its best epoch is the third
    losses = (4.0, 3.0, 0.2, *(epoch.train_loss for epoch in first.history[3:]))
    history = tuple(replace(epoch, train_loss=loss) for epoch, loss in zip(first.history, losses, strict=True))
    before = Epoch("head", 1, 9.0, 0.5, 0.5)
    first = replace(first, phases=(replace(phase, name="head", kept=False), phase), history=(before, *history))
    assert cautions(again(first, (0.29,)), again(trained(NOTHING), (0.5,))) == ()
    assert "up to 1.6 times" in cautions(again(first, (0.32,)), again(trained(NOTHING), (0.5,)))[0]


def test_the_page_of_a_diagnosis_shows_both_and_warns(make_facts):
    facts = make_facts()
    facts = replace(facts, scratch=trained(NOTHING, (0.85,) * 9, rate=2e-3))
    assert of(replace(facts, scratch=None)) is None
    assert of(facts).cautions == () and "Before you believe it" not in render(facts)
    assert "How both were trained" in render(facts)
    text = render(replace(facts, scratch=trained(NOTHING, (0.85,) * 9, rate=2e-4)))
    said = text.split("Transfer or scratch", 1)[1]
    assert said.index("Transfer helped") < said.index("Before you believe it") < said.index("How both were trained")
    assert "at a rate of 0.0002, with transfer at 0.002" in said


def test_the_page_of_folds_shows_both_and_warns(make_facts):
    evaluation, comparison = make_facts().evaluation, compared(0.05)
    both = terms([trained(LOADED)] * 2, [trained(NOTHING, rate=1e-4)] * 2, comparison)
    design = Design("patient", "Cells", "resnet18", "imagenet", 50, 25, True, scratch=evaluation, comparison=comparison)
    text = render_folds(evaluation, replace(design, terms=both))
    assert text.count("Before you believe it") == 1 and text.count("How both were trained") == 2  # caption and region
    assert "a line for each network" in text and "second time" not in text and "second training" not in text
    twice = terms([again(trained(LOADED), (0.5,))] * 2, [again(trained(NOTHING), (0.5,))] * 2, comparison)
    said = render_folds(evaluation, replace(design, terms=twice, twice=True))
    assert "Both were trained a second time" in said and "Epochs of the second training" in said
    assert "comes from a second training, on its training and validation parts together" in said
