"""A plan becomes a network, in phases of unfreezing; a network becomes predictions.

::

    backbones (the table) ─▶ surgery (stages, stem, head) ─▶ phases (who learns, how fast) ─▶ fit ─▶ predict
                              weights (did they arrive?) ──┘
"""
