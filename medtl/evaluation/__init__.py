"""Predictions become figures that cannot flatter themselves. numpy and scikit-learn only.

::

    val  ─▶ threshold (the operating point is chosen here) ─┐
    test ─▶ metrics ◀─ uncertainty (patients drawn again) ──┴▶ assess ─▶ Evaluation
            calibration, comparison (paired, the same drawn patients)
"""
