"""Files become scans, or exclusions with a reason.

::

    io.survey ─▶ io.ingest ─▶ headers (may it be decoded?) ─▶ pixels (what do the values mean?) ─▶ Scan + pixel store

``phantom`` goes the other way: it writes a synthetic hospital to try everything on.
"""
