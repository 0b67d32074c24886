"""nnU-Net v2 for a given time: run by `nnunet.py` with the Python of an environment that has nnunetv2.

    python benchmarks/nnunet_peers.py WORK MINUTES [MINUTES ...] --threads N

WORK/raw/Dataset001_Peer holds imagesTr, labelsTr, imagesTs and dataset.json, as nnU-Net wants them. Plans and
preprocesses once; then, for each time, trains its own 3d_fullres trainer for so long, its learning rate falling as its
polynomial schedule does over the whole of it, and predicts imagesTs into WORK/out/MINUTES. Nothing else of it is
changed: network, patch, batch, augmentation, loss, mirrored and weighted windows. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

DATASET, NAME, CONFIGURATION, PLANS = 1, "Dataset001_Peer", "3d_fullres", "nnUNetPlans"
_POWER = 0.9  # of nnU-Net's polynomial schedule


def main() -> None:
    """Prepare, train for each time, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("minutes", type=float, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    for kind in ("raw", "preprocessed", "results"):  # read when nnunetv2 is imported
        os.environ[f"nnUNet_{kind}"] = str(given.work / kind)
    os.environ.update({"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"})
    began = time.monotonic()
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    extract_fingerprints([DATASET], num_processes=given.threads, check_dataset_integrity=True)
    plan_experiments([DATASET])
    preprocess([DATASET], PLANS, (CONFIGURATION,), (given.threads,))
    prepared = time.monotonic() - began
    runs = [trained(given.work, minutes, given.threads) for minutes in given.minutes]
    print(json.dumps({"prepared_s": round(prepared, 1), "runs": runs}), flush=True)


def trained(work: Path, minutes: float, threads: int) -> dict[str, Any]:
    """Train for some minutes and predict; say what was done in them."""
    import nnunetv2
    import torch
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    folder = work / "preprocessed" / NAME
    plans = {**load_json(str(folder / f"{PLANS}.json")), "continue_training": False}
    trainer = nnUNetTrainer(plans, CONFIGURATION, "all", load_json(str(folder / "dataset.json")), torch.device("cpu"))
    trainer.on_train_start()
    next(trainer.dataloader_train)  # its workers have started
    trainer.network.train()
    began, budget, steps, losses = time.monotonic(), 60 * minutes, 0, []
    while (gone := (time.monotonic() - began) / budget) < 1:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - gone) ** _POWER
        losses.append(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))
        steps += 1
    taken = time.monotonic() - began
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        "nnUNetTrainer", trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    predictor.list_of_parameters = [trainer.network.state_dict()]
    out = work / "out" / f"{minutes:g}"
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    predictor.predict_from_files_sequential(str(work / "raw" / NAME / "imagesTs"), str(out))
    return {
        "minutes": minutes,
        "seconds": round(taken, 1),
        "steps": steps,
        "batch": trainer.batch_size,
        "patch": [int(side) for side in trainer.configuration_manager.patch_size],
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "loss": round(sum(losses[-5:]) / max(1, len(losses[-5:])), 4),
        "predict_s": round(time.monotonic() - began, 1),
        "version": getattr(nnunetv2, "__version__", None),
    }


if __name__ == "__main__":
    main()
