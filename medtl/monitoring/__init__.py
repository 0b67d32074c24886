"""Is it still the same world: what a release says now, beside what it said of its own test part.

::

    answers ─▶ tally ─▶ Tally ─▶ the trail ─▶ drift.measure ─▶ Drift
"""
