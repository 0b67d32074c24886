"""Several processes that train as one: each takes its share of every batch, gradients are added up.

Without torch.distributed every function is what one process alone would do. Losses are sums divided by the size of the
whole batch, so added gradients are those of one process up to the order of additions. BatchNorm that learns sees a
process's share only; :func:`prepare` makes it look at all of them where torch can, and refuses where it cannot.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medtl.config import PhaseConfig
from medtl.errors import ConfigError
from medtl.model.surgery import StagedNetwork
from medtl.records import FloatArray, IntArray

T = TypeVar("T")
Network = TypeVar("Network", bound=StagedNetwork)


def together() -> bool:
    """Tell whether this process trains with others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Give this process's number; 0 leads, and alone writes checkpoints."""
    return dist.get_rank() if together() else 0


def world() -> int:
    """Give the number of processes."""
    return dist.get_world_size() if together() else 1


def share_of(rows: IntArray, whole: bool = False) -> IntArray:
    """Give this process's share of some rows: every so-manieth, or (``whole``) one unbroken piece."""
    if not together():
        return rows
    return np.array_split(rows, world())[rank()] if whole else rows[rank() :: world()]


def add(value: Tensor) -> Tensor:
    """Add a tensor over all processes, in place."""
    if together():
        dist.all_reduce(value)
    return value


def add_number(value: float) -> float:
    """Add a number over all processes."""
    return float(add(torch.tensor(value, dtype=torch.float64)))


def add_gradients(network: nn.Module) -> None:
    """Add the gradients of everything that learns over all processes, in one message."""
    if not together():
        return
    learning = [p for p in network.parameters() if p.requires_grad]
    for parameter in learning:
        if parameter.grad is None:  # this process's share of the batch was empty
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.reshape(-1) for p in learning if p.grad is not None])
    dist.all_reduce(flat)
    start = 0
    for parameter in learning:
        assert parameter.grad is not None
        parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
        start += parameter.numel()


def gather(rows: FloatArray) -> FloatArray:
    """Put the pieces of all processes together, in the order of their numbers."""
    if not together():
        return rows
    pieces: list[FloatArray | None] = [None] * world()
    dist.all_gather_object(pieces, rows)
    return np.concatenate([piece for piece in pieces if piece is not None])


def agree(value: T) -> T:
    """Take the leader's value: what rests on time or on a disk must be the same for all."""
    if not together():
        return value
    said: list[T | None] = [value]
    dist.broadcast_object_list(said, src=0)
    assert said[0] is not None
    return said[0]


def wait() -> None:
    """Wait until every process has come here."""
    if together():
        dist.barrier()


def prepare(network: Network, phases: tuple[PhaseConfig, ...], device: torch.device) -> Network:
    """Make BatchNorm that learns look at the whole batch.

    Raises:
        ConfigError: it learns on a CPU, where torch cannot.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not together() or not norms or all(p.batchnorm == "frozen" or p.unfreeze == "head" for p in phases):
        return network
    if device.type != "cuda":
        raise ConfigError(
            "BatchNorm that learns cannot be shared by several processes on a CPU: set batchnorm: frozen in every "
            "phase, or model.processes: 1."
        )
    synchronised: Network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return synchronised
