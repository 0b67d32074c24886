"""Where to compute, in which numbers, and with the same result each time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from medtl.config import ModelConfig
from medtl.errors import ModelError
from medtl.model.cache import Precision


def device_of(config: ModelConfig) -> torch.device:
    """Choose where to compute.

    Raises:
        ModelError: CUDA or MPS is wanted and there is none.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if config.device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    if not there[config.device]:
        raise ModelError(
            f"model.device is '{config.device}' and this machine has no usable one. Set it to auto or cpu."
        )
    return torch.device(config.device)


def precision_of(config: ModelConfig, device: torch.device) -> Precision:
    """Choose what training computes in: bf16 where the processor does so natively, unless the config says otherwise.

    Raises:
        ModelError: the precision is not one that this device computes in.
    """
    if config.precision == "fp16" and device.type == "mps":
        raise ModelError("model.precision fp16 is not supported on MPS here. Set it to auto.")
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _has_bf16_units() else "fp32"


def _has_bf16_units() -> bool:
    """Ask for instructions: oneDNN says that AVX-512 alone will do, and there bf16 is slower than fp32."""
    said: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not say: fp32 then
    return any(bool(said.get(unit)) for unit in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def make_deterministic(seed: int, threads: int) -> None:
    """Seed torch, ask for deterministic kernels and fix the threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports the compiler: seconds
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(threads)
