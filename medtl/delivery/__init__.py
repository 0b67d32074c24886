"""Predictions and masks go back to the clinic.

::

    probabilities + operating points ─▶ table.decide ─▶ table.rows_of ─▶ io
    codes ─▶ masks.dicom_seg, masks.mask_nifti ─▶ io
"""
