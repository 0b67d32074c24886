"""Predictions go back to the clinic: today as a table.

::

    probabilities + operating points ─▶ table.decide ─▶ table.rows_of ─▶ io
"""
