"""A cohort becomes a split, a plan and one packed array.

::

    Cohort ─▶ split ─▶ plan (training part only) ─▶ transforms.prepare ─▶ loading.Pack (memory-mapped)
                                                                            └─▶ loading: batches
                     └▶ grid (a segmentation's plan) ─▶ io: packed volumes ─▶ patches: augmented crops
                                                        prediction on the grid ─▶ restore: back to the scan's voxels
    leaks prove that nobody is on two sides (lookalikes: by features too); folds; perturb for stress tests
"""
