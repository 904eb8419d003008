"""Which implementation of an op runs: by device and number format, never by training mode or length."""

import os
from importlib.util import find_spec
from typing import Literal

import torch

TRITON_MODULE = "tsgdn.kernels.gated_delta_rule.forward"
"""Where the Triton kernels live. It offers `chunkwise` with the signature of the torch one."""


def kernel_for(device: torch.device, dtype: torch.dtype) -> Literal["torch", "triton"]:
    """The implementation for tensors of this device and number format; `TSGDN_KERNEL=torch|triton|auto` overrides.

    Raises:
        RuntimeError: Triton was demanded and is not there.
        ValueError: the variable holds another word.
    """
    demand = os.environ.get("TSGDN_KERNEL", "auto")
    if demand not in ("torch", "triton", "auto"):
        raise ValueError(f"TSGDN_KERNEL is {demand!r}; expected torch, triton or auto")
    # float64 is the tests' number format: only the torch path has it.
    if demand == "torch" or (demand == "auto" and (device.type != "cuda" or dtype == torch.float64)):
        return "torch"
    missing = [name for name in ("triton", TRITON_MODULE) if find_spec(name) is None]
    if not missing:
        return "triton"
    if demand == "triton":
        raise RuntimeError(f"TSGDN_KERNEL=triton, but {' and '.join(missing)} cannot be imported; use torch or auto")
    return "torch"
