"""Sizes at which mixers compare like with like: the same bytes of state per layer, the same number of parameters.

State bytes are set by the mixer's own sizes, parameters then by the hidden width of the MLPs. Recurrent networks whose
whole state is a vector (gru, slstm) keep hidden = width: bytes like those of a matrix memory would take millions of
parameters. Where the state grows with the stream (gated_attention) there are no bytes to match.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from tsgdn.mixers import build
from tsgdn.mixers.registry import arguments
from tsgdn.model.backbone import Backbone, cycle

HEADS = 2
STATE_BYTES = 10_496
"""Bytes per layer of gated_deltanet with two heads of 32 x 32: the presets' size."""
CACHE_SHARE = 0.6  # of the bytes for the memory, where a cache or a window lies beside it


class Matched(NamedTuple):
    """Arguments of a `Forecaster`, and what came out.

    Attributes:
        parameters: of the backbone.
        state_bytes: of a row, all layers together, before the first token.
    """

    mixer: str
    mixer_args: dict[str, Any]
    mlp_ratio: float
    parameters: int
    state_bytes: int


def sizes(name: str, width: int, state_bytes: int = STATE_BYTES) -> dict[str, Any]:
    """Arguments of a mixer whose state takes as near as possible to so many bytes.

    Args:
        name: a key of `tsgdn.mixers.MIXERS`.
        width: of the tokens.
        state_bytes: per row and layer.

    Raises:
        ValueError: even the smallest memory is larger.
    """
    open_ = arguments(name)

    def measure(args: dict[str, Any]) -> int:
        return build(name, width, args).state_bytes()

    if "key_dim" not in open_:
        return {}
    mixer = build(name, width, {"heads": HEADS})
    if mixer.state_bytes(1 << 20) != mixer.state_bytes(0):
        return {"heads": HEADS, "key_dim": 32}
    beside = next((key for key in ("slots", "window") if key in open_), None)
    if beside and not hasattr(mixer.initial_state(1), "memory"):
        return _nearest({"heads": HEADS, "key_dim": 32}, beside, 2, state_bytes, measure)
    least = {} if beside is None else {beside: 2}
    room = state_bytes if beside is None else CACHE_SHARE * state_bytes
    fitting = [d for d in range(8, 129, 8) if measure({"heads": HEADS, "key_dim": d, "value_dim": d, **least}) <= room]
    if not fitting:
        raise ValueError(f"state_bytes is {state_bytes}; {name} with {HEADS} heads of 8 x 8 takes more already")
    args = {"heads": HEADS, "key_dim": max(fitting), "value_dim": max(fitting), **least}
    return _nearest(args, beside or "value_dim", args[beside or "value_dim"], state_bytes, measure)


def _nearest(args: dict[str, Any], knob: str, start: int, wanted: int, measure: Any) -> dict[str, Any]:
    """`args` with the value of `knob`, from `start` up, that comes nearest to `wanted`."""
    value = start
    while measure({**args, knob: value}) < wanted:
        value += 1
    around = [{**args, knob: v} for v in (value, max(start, value - 1))]
    return min(around, key=lambda found: abs(measure(found) - wanted))


def matched(mixer: str, *, width: int, depth: int, state_bytes: int = STATE_BYTES, mlp_ratio: float = 2.0) -> Matched:
    """A mixer or hybrid with the state of `state_bytes` per layer and the parameters of gated_deltanet.

    Args:
        mixer: a mixer or hybrid.
        width: of the tokens.
        depth: blocks.
        state_bytes: per row and layer.
        mlp_ratio: of the gated_deltanet whose parameters are matched.

    Raises:
        ValueError: the mixer alone has more parameters, or its smallest state is too large.
    """

    def backbone(name: str, args: dict[str, Any], ratio: float) -> Backbone:
        return Backbone(width, depth, name, args, ratio)

    wanted = _parameters(backbone("gated_deltanet", sizes("gated_deltanet", width, state_bytes), mlp_ratio))
    names = cycle(mixer)
    each = {name: sizes(name, width, state_bytes) for name in names}
    args = each[mixer] if names == (mixer,) else each
    hidden = round(mlp_ratio * width)
    at = _parameters(backbone(mixer, args, mlp_ratio))
    hidden += round((wanted - at) / (3 * width * depth))
    if hidden < 1:
        raise ValueError(f"{mixer} has {at - wanted:,} parameters more than gated_deltanet; choose a larger mlp_ratio")
    found = backbone(mixer, args, hidden / width)
    return Matched(mixer, args, hidden / width, _parameters(found), found.state_bytes())


def _parameters(backbone: Backbone) -> int:
    return sum(p.numel() for p in backbone.parameters())


# ---- the retention study: four heads, sizes written down instead of searched

REGIME_HORIZON = (4.0, 16384.0)
"""Initial memory of every mixer that decays, in tokens: beyond the longest gap of the tests."""
_ONE = {"heads": 4}
_SQUARE = {kib: {**_ONE, "key_dim": d, "value_dim": d} for kib, d in ((1, 8), (4, 16), (16, 32), (64, 64))}
_SQUARE[2] = {"heads": 2, "key_dim": 16, "value_dim": 16}  # the smoke test's
_SQUARE_MIXERS = ("gated_deltanet", "gated_linear", "deltanet", "kda", "gated_deltanet2", "mamba2_heads")


def _shapes(*sizes: tuple[int, int, int, int], more: str = "", **fixed: Any) -> dict[int, dict[str, Any]]:
    """Arguments by KiB, from (KiB, Dk, Dv, number called `more`)."""
    args = {kib: {**_ONE, **fixed, "key_dim": key, "value_dim": value} for kib, key, value, _ in sizes}
    return {kib: {**args[kib], more: extra} if more else args[kib] for kib, _, _, extra in sizes}


REGIME_SIZES: dict[str, dict[int, dict[str, Any]]] = {
    **dict.fromkeys(_SQUARE_MIXERS, _SQUARE),
    "mamba2": {
        2: {"heads": 2, "key_dim": 20, "value_dim": 15},
        **_shapes((1, 12, 8, 0), (4, 20, 16, 0), (16, 36, 32, 0), (64, 68, 64, 0)),
    },
    "gated_deltaproduct": _shapes((4, 14, 14, 0), (16, 32, 27, 0), (64, 64, 59, 0)),
    "mamba3": _shapes((4, 16, 22, 0), (16, 36, 34, 0), (64, 68, 66, 0)),
    "rwkv7": _shapes((4, 16, 24, 0), (16, 32, 40, 0), (64, 64, 72, 0)),
    "sliding_window_attention": _shapes((4, 16, 16, 25), (16, 32, 32, 41), (64, 64, 64, 73), more="window", kv_heads=2),
    "ham": _shapes((4, 16, 8, 6), (16, 32, 16, 11), (64, 64, 32, 22), more="slots"),
    "oryx": _shapes((4, 16, 8, 7), (16, 32, 16, 12), (64, 64, 32, 23), more="window"),
}
"""Mixer and KiB of matrix state per layer: arguments. State bytes in all agree with gated_deltanet's within 2 %."""
UNMATCHED_STATES = ("gru", "slstm", "gated_attention")
"""Matched in parameters only: a vector for a state, or a state that grows. Shown with their bytes, outside claims."""


def regime_width(state_kib: int) -> int:
    """Width of the tokens in the retention study."""
    return 128 if state_kib >= 64 else 32 if state_kib == 2 else 64


@cache
def regime_sizes(
    mixer: str, *, state_kib: int, depth: int = 2, init: str = "horizon", mlp_ratio: float = 2.0
) -> Matched:
    """A mixer or hybrid of the retention study: bytes of gated_deltanet within 2 %, parameters within 3 %.

    Args:
        mixer: a mixer or hybrid.
        state_kib: matrix state per layer: 1, 4, 16 or 64 (2: the smoke test's).
        depth: blocks; a hybrid has at least one round of its mixers.
        init: `decay_init` of every mixer that has one.
        mlp_ratio: of the gated_deltanet whose parameters are matched.

    Raises:
        ValueError: there is no such size of this mixer, or it alone has more parameters.
    """

    def args(name: str) -> dict[str, Any]:
        if name == "gated_attention":
            found: dict[str, Any] = {**_ONE, "key_dim": width // 4}
        elif name in UNMATCHED_STATES:
            found = {}
        elif state_kib in REGIME_SIZES.get(name, {}):
            found = dict(REGIME_SIZES[name][state_kib])
        else:
            there = ", ".join(str(kib) for kib in sorted(REGIME_SIZES.get(name, {})) if kib != 2) or "none"
            raise ValueError(f"{name} has no size of {state_kib} KiB in the retention study; it has {there}")
        open_ = arguments(name)
        timing = {"decay_init": init, "horizon": REGIME_HORIZON}
        return found | {key: value for key, value in timing.items() if key in open_}

    def backbone(name: str, given: dict[str, Any], hidden: int) -> Backbone:
        return Backbone(width, depth, name, given, hidden / width, variate_every=0)

    width, names = regime_width(state_kib), cycle(mixer)
    hidden = round(mlp_ratio * width)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        wanted = _parameters(backbone("gated_deltanet", args("gated_deltanet"), hidden))
        given = args(mixer) if names == (mixer,) else {name: args(name) for name in names}
        at = _parameters(backbone(mixer, given, hidden))
        hidden += round((wanted - at) / (3 * width * depth))
        if hidden < 1:
            raise ValueError(f"{mixer} has {at - wanted:,} parameters more than gated_deltanet")
        found = backbone(mixer, given, hidden)
    return Matched(mixer, given, hidden / width, _parameters(found), found.state_bytes())
