"""A checkpoint with its evaluation becomes a release, and a gate says what it may be called.

::

    Evaluation + gate ─▶ promotion.check ─▶ Release (candidate ─▶ validated | refused) ─▶ io
"""
