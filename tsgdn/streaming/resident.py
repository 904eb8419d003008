"""A predictor whose evicted series go somewhere, instead of being forgotten."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from tsgdn.streaming.predictor import StatefulPredictor


@runtime_checkable
class Home(Protocol):
    """Where evicted series go."""

    @property
    def predictor(self) -> StatefulPredictor:
        """The one whose series these are."""
        ...

    def spill(self, items: Sequence[str]) -> None:
        """Takes what these series are, before they are evicted."""
        ...

    def reload(self, items: Sequence[str]) -> None:
        """Brings back those of these series that were evicted."""
        ...


class Resident(StatefulPredictor):
    """A predictor that evicts into a store. Its forks have none: a what-if cannot be committed."""

    _home: Home

    def _spill(self, items: Sequence[str]) -> None:
        if self._home.predictor is self:
            self._home.spill(items)

    def _reload(self, items: Sequence[str]) -> None:
        if self._home.predictor is self:
            self._home.reload(items)


def settle(predictor: StatefulPredictor, home: Home) -> None:
    """Makes a predictor evict into a store from now on."""
    predictor.__class__ = Resident
    predictor._home = home  # pyright: ignore[reportAttributeAccessIssue]
