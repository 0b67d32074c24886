"""Files become scans, or exclusions with a reason.

::

    sources ─▶ intake ─┬▶ io.look ─▶ headers ─▶ elements      what is this file, what does it say (mosaic, nuclear)
    (what is           ├▶ series ─▶ checks ─▶ geometry        what belongs together, is it whole, where does it lie
     there)            ├▶ io.Reader ─▶ frames, decoding,      the values; compressed ones in a process that may die
                       │               pixels, formats, nifti, masks
                       └▶ segments                            the pixel store; scans.json, exclusions.json

Beside it: ``convert`` (to NIfTI, nothing remembered), ``handover`` ─▶ ``deidentify`` ─▶ ``profile`` (without the
patients' identities), ``pacs`` (scans over the network), ``quarantine`` (what was refused, and a person's word).
``phantom`` goes the other way: it writes a synthetic hospital to try everything on.
"""
