"""Scans and labels become a cohort: one study per scan, each with a target and a patient.

::

    io.read_table ─▶ labels.rows_of (raw names become keys here) ─┐
    Scans ────────────────────────────────────────────────────────┴▶ labels.join ─▶ grouping ─▶ Cohort
"""
