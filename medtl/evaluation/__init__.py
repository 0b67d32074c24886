"""Predictions become figures that cannot flatter themselves. numpy and scikit-learn only.

::

    val  ─▶ checks ─▶ threshold (the operating point is chosen here) ─┐
    test ─▶ checks ─▶ metrics ◀─ uncertainty (patients drawn again) ──┴▶ assess ─▶ Evaluation
                                 bounds (what so few patients leave open)
                      calibration, comparison (paired, the same drawn patients)
"""
