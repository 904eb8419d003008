"""Which implementation of an op runs: by device and number format, never by training mode or length."""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal

import torch

try:
    HAS_TRITON = find_spec("triton") is not None
except ModuleNotFoundError:
    HAS_TRITON = False
TESTED = ((9, 0),)
"""Compute capabilities on which the Triton kernels have passed `make test-gpu`."""


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """`torch.autocast(enabled=False)`; nothing where autocast is off, since entering it costs more than small ops."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def kernel_for(device: torch.device, dtype: torch.dtype) -> Literal["torch", "triton"]:
    """The implementation for tensors of this device and number format; `TSGDN_KERNEL=torch|triton|auto` overrides.

    auto is Triton for float32 and narrower on a GPU generation of `TESTED`, else torch. On another generation a warning
    says so: the compiler has produced wrong numbers from right kernels there before.

    Raises:
        RuntimeError: Triton was demanded and cannot run here.
        ValueError: the variable holds another word.
    """
    demand = os.environ.get("TSGDN_KERNEL", "auto")
    if demand not in ("torch", "triton", "auto"):
        raise ValueError(f"TSGDN_KERNEL is {demand!r}; expected torch, triton or auto")
    # float64 is the tests' number format: only the torch path has it.
    if demand == "torch" or dtype == torch.float64 or (demand == "auto" and device.type != "cuda"):
        return "torch"
    if demand == "triton":
        if not HAS_TRITON:
            raise RuntimeError("TSGDN_KERNEL=triton, but triton cannot be imported; install it, or use torch or auto")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"TSGDN_KERNEL=triton, but the tensors are on {device.type}; move them to a GPU, use torch or auto, "
                "or set TRITON_INTERPRET=1 before the start to interpret the kernels slowly"
            )
        return "triton"
    return "triton" if HAS_TRITON and _is_tested(device) else "torch"


def _is_tested(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    if capability in TESTED:
        return True
    warnings.warn(
        f"the Triton kernels were tested on compute capability {', '.join(f'{a}.{b}' for a, b in TESTED)} and this GPU "
        f"has {capability[0]}.{capability[1]}: running the slower torch path. Run `make test-gpu` and set "
        "TSGDN_KERNEL=triton to use them",
        stacklevel=3,
    )
    return False
