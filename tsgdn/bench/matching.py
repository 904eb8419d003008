"""Sizes at which mixers compare like with like: the same bytes of state per layer, the same number of parameters.

State bytes are set by the mixer's own sizes, parameters then by the hidden width of the MLPs. Recurrent networks whose
whole state is a vector (gru, slstm) keep hidden = width: bytes like those of a matrix memory would take millions of
parameters. Where the state grows with the stream (gated_attention) there are no bytes to match.
"""

from typing import Any, NamedTuple

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
