"""Tensors in, tensors out: the ops with state that the mixers are made of."""

from tsgdn.kernels.causal_conv import causal_conv
from tsgdn.kernels.choice import kernel_for
from tsgdn.kernels.gated_delta_rule import gated_delta_rule
from tsgdn.kernels.ssd import ssd

__all__ = ["causal_conv", "gated_delta_rule", "kernel_for", "ssd"]
