"""Small arguments for any mixer, odd where they may be, so that no two dimensions are confused unnoticed."""

from tsgdn.mixers.registry import arguments
from tsgdn.model.backbone import cycle

SMALL = {
    "heads": 2,
    "key_dim": 8,
    "value_dim": 5,
    "hidden": 10,
    "window": 6,
    "slots": 5,
    "mode_chunk": 4,
}


def small_args(name, **args):
    """Those of `SMALL` that the mixer of that name takes, and what is given."""
    taken = arguments(name)
    return {**{key: value for key, value in SMALL.items() if key in taken}, **args}


def small_model_args(mixer):
    """The same for the `mixer_args` of a model, whose mixer may be a hybrid."""
    names = cycle(mixer)
    return small_args(mixer) if names == (mixer,) else {name: small_args(name) for name in names}
