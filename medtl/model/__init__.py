"""A plan becomes a network, in phases of unfreezing; a network becomes predictions.

::

    backbones (the table) ─▶ surgery (stages, stem, head) ─▶ fit ──┐
    vault ─▶ weights (names, did they arrive?) ──┘   (losses, cache) ├▶ trainer ─▶ predict, or
      ├ pickles   read in a child process                            │  inference of masks (reach)
      └ download  checked before it is opened                        │
    segmenters (the table) ─▶ segmenter (instance_norm) ─▶ segment_fit ┘
                                                     (mask_losses)
    trainer: one phase after the other, on phases (who learns, how fast; the proof), devices, parallel
    fit:     what is frozen runs once (cache); heads that scikit-learn solves (heads)
    before: advise (which backbone), lr_find (which rate), estimate (how long, how much memory)
    after:  explain (where it looked, and whether that depends on what it learned)  onnx (out of the house)

Files are touched by io (checkpoints, progress, kept activations), vault, pickles and download alone.
"""
