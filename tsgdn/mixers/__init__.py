"""Mixers along time, (R, N, D) -> (R, N, D), by name. One may be put in the place of another.

A mixer takes the tokens of R rows and the state after the tokens before, and gives what is to be added to each token
and the state after the last. The laws of `tsgdn.streamable` hold. A new one is a file with `@register(name)` above its
class, and a line here.
"""

from tsgdn.mixers.attention import GatedAttention as GatedAttention
from tsgdn.mixers.attention import SlidingWindowAttention as SlidingWindowAttention
from tsgdn.mixers.gated_deltanet import GatedDeltaNet as GatedDeltaNet
from tsgdn.mixers.gated_deltanet2 import GatedDeltaNet2 as GatedDeltaNet2
from tsgdn.mixers.gated_deltaproduct import GatedDeltaProduct as GatedDeltaProduct
from tsgdn.mixers.gru import GRU as GRU
from tsgdn.mixers.ham import HAM as HAM
from tsgdn.mixers.kda import KDA as KDA
from tsgdn.mixers.mamba2 import Mamba2 as Mamba2
from tsgdn.mixers.mamba3 import Mamba3 as Mamba3
from tsgdn.mixers.oryx import Oryx as Oryx
from tsgdn.mixers.registry import MIXERS as MIXERS
from tsgdn.mixers.registry import Mixer as Mixer
from tsgdn.mixers.registry import build as build
from tsgdn.mixers.rwkv7 import RWKV7 as RWKV7
from tsgdn.mixers.slstm import SLSTM as SLSTM
from tsgdn.mixers.variates import VariateMixer as VariateMixer
