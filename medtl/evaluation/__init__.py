"""Predictions become figures that cannot flatter themselves. numpy, scipy and scikit-learn only.

::

    val  ─▶ checks ─▶ calibration ─▶ threshold (the operating point is chosen here) ─┐
    test ─▶ checks ─▶ calibrated ──▶ metrics ◀─ uncertainty (patients drawn again) ──┴▶ assess ─▶ Evaluation ─▶ pooling
                                                bounds (what so few patients leave open)                     (of folds)
    two models: comparison (paired, the same drawn patients), delong (without drawing)
    beside it:  abstention (when not to answer)  novelty (unlike training)  subgroups (for whom is it worse)
                shortcuts (is it right for a wrong reason)  cases, pointing (what to look at)
                growth (would more patients help, on validation)
    masks:      overlap, surfaces ─▶ masks ─▶ Evaluation     boxes and points: detection
"""
