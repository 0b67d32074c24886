"""A cohort becomes a split, a plan and one packed array.

::

    Cohort ─▶ split ─▶ plan (training part only) ─▶ transforms.prepare ─▶ loading.Pack (memory-mapped)
                                                                            └─▶ loading: batches
"""
