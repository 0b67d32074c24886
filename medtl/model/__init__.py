"""A plan becomes a network, in phases of unfreezing; a network becomes predictions.

::

    backbones (the table) ─▶ surgery (stages, stem, head) ─▶ fit, phase by phase ─▶ predict
    vault ─▶ weights (names, did they arrive?) ──┘             ├ phases   who learns, how fast; the proof
      ├ pickles   read in a child process                      ├ cache    what is frozen runs once
      └ download  checked before it is opened                  ├ losses, heads (solved by scikit-learn)
                                                               └ parallel several processes as one
    masks:  segmenters (the table) ─▶ segmenter (instance_norm) ─▶ segment_fit (mask_losses) ─▶ inference (reach)
    before: advise (which backbone), lr_find (which rate), estimate (how long, how much memory)
    after:  explain (where it looked, and whether that depends on what it learned)  onnx (out of the house)

Files are touched by io (checkpoints, progress, kept activations), vault, pickles and download alone.
"""
