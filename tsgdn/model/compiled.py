"""One token of a stream, compiled: the same functions with their hundreds of small launches made one."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tsgdn.model.patching import Patches
from tsgdn.streamable import map_state


class CompiledSteps:
    """One patch and one forecast, compiled for some numbers of series; a call that does not fit runs as it is.

    Args:
        take_in: see `Forecaster._take_in`.
        window: the forecast of a token.
        read: the forecast of the last token of a state.
    """

    MISS: ClassVar[Literal["eager_on_recompile", "fail_on_recompile"]] = "eager_on_recompile"
    """What a call does that fits nothing compiled; compiling then and there would hold up a stream."""

    def __init__(self, take_in: Callable[..., Any], window: Callable[..., Any], read: Callable[..., Any]) -> None:
        self.sizes: set[tuple[int, int]] = set()
        self._take_in, self._window, self._read = (
            torch.compile(fn, fullgraph=True, dynamic=False) for fn in (take_in, window, read)
        )
        self._flags = torch.tensor(False), torch.tensor(True)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # it belongs to one model: a copy of that compiles for itself

    def compile(self, series: int, variates: int, example: tuple[Patches, Any]) -> None:
        """Compiles for calls of this size."""
        patches, state = example
        # every model and size is one more version of the same functions
        with torch._dynamo.config.patch(recompile_limit=1024):  # pyright: ignore[reportAttributeAccessIssue]
            token, _ = self._take_in(*self._of_patch(patches, state, state.static, False))
            self._window(map_state(_dense, token))
            self._read(self._of_state(state))
        self.sizes.add((series, variates))

    def take_in(self, patches: Patches, state: Any, static: Tensor, as_tokens: bool) -> tuple[Any, Any]:
        """See `Forecaster._take_in`."""
        with torch.compiler.set_stance(self.MISS):
            return self._take_in(*self._of_patch(patches, state, static, as_tokens))

    def window(self, token: Any) -> Tensor:
        """All steps of the forecast of a token."""
        with torch.compiler.set_stance(self.MISS):
            return self._window(map_state(_dense, token))

    def read(self, state: Any) -> Tensor:
        """All steps of the forecast of the last token of a state."""
        with torch.compiler.set_stance(self.MISS):
            return self._read(self._of_state(state))

    # What was compiled fits one layout in memory and takes no branch that depends on what the rows hold; leaves that it
    # does not read are left out.

    def _of_patch(self, patches: Patches, state: Any, static: Tensor, as_tokens: bool) -> tuple[Any, ...]:
        patches = Patches(*map_state(_dense, tuple(patches[:5])), full=False)
        return patches, map_state(_dense, state._replace(patching=())), static, self._flags[as_tokens], False

    def _of_state(self, state: Any) -> Any:
        return map_state(_dense, state._replace(backbone=()))


def _dense(x: Tensor) -> Tensor:
    """With the strides of a new tensor; also dimensions of size 1 have one, which says nothing but is compared."""
    stride, strides = 1, []
    for size in reversed(x.shape):
        strides.append(stride)
        stride *= max(size, 1)
    return x if x.stride() == tuple(reversed(strides)) else x.clone(memory_format=torch.contiguous_format)
