"""Tensors in, tensors out: the ops with state that the mixers are made of."""

from tsgdn.kernels.causal_conv import causal_conv
from tsgdn.kernels.choice import kernel_for, without_autocast
from tsgdn.kernels.gated_delta_rule import Readout, gated_delta_rule
from tsgdn.kernels.prologue import prologue, silence, within
from tsgdn.kernels.readout import readout
from tsgdn.kernels.ssd import ssd
from tsgdn.kernels.unit_length import unit_length

__all__ = [
    "Readout",
    "causal_conv",
    "gated_delta_rule",
    "kernel_for",
    "prologue",
    "readout",
    "silence",
    "ssd",
    "unit_length",
    "within",
    "without_autocast",
]
