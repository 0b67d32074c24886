"""One of several processes that train together; torchrun starts it: ``python -m pipelines.worker JOB.json``."""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import threading
from pathlib import Path

from medtl.config import Config
from medtl.errors import MedtlError
from pipelines.environment import end_with
from pipelines.training import Job, train_here

_PATIENCE = datetime.timedelta(hours=12)  # the leader may run a trunk over everything before the others are needed


def main(path: Path) -> int:
    """Join the others and train."""
    import torch
    import torch.distributed as dist

    said = json.loads(path.read_bytes())
    threading.Thread(target=end_with, args=(said["started_by"],), daemon=True).start()
    folders = {name: Path(said[name]) for name in ("cohort", "split", "plan", "pack", "unfinished")}
    config = Config.model_validate(said["config"])
    job = Job(
        config=config, **folders, pack_digest=said["pack_digest"], label=said["label"], threads=said["threads"],
        shared=said["shared"], unlabelled=said["unlabelled"], chosen=Path(said["chosen"]) if said["chosen"] else None,
    )  # fmt: skip
    first = os.environ.get("RANK") == "0"
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING, format="medtl: %(message)s", stream=sys.stderr
    )
    cuda = config.model.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        train_here(job, Path(said["folder"]))
        dist.barrier()
    except MedtlError as error:
        sys.stderr.write(f"medtl-error: {error}\n")
        return 1
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
