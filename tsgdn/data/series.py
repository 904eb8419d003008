"""One series: V variates on one clock."""

from dataclasses import dataclass, replace

import numpy as np

from tsgdn.data.clock import Clock, clock


@dataclass(frozen=True, eq=False)
class Series:
    """V variates on one clock; row 0 is step 0.

    Attributes:
        item_id: name of the series.
        start: timestamp of step 0, naive UTC.
        freq: pandas alias of the step.
        values: (V, T) float64, NaN = missing.
        known: (F, T') known-future features without the calendar, T' >= T; NaN = absent.
        static: categories, 0 = unknown.
        variates: V names.

    Raises:
        ValueError: shapes that do not fit, infinite values, a start that is not on the grid.
    """

    item_id: str
    start: np.datetime64
    freq: str
    values: np.ndarray
    known: np.ndarray | None = None
    static: tuple[int, ...] = ()
    variates: tuple[str, ...] = ("target",)

    def __post_init__(self) -> None:
        values = np.asarray(self.values, np.float64)
        if values.ndim != 2:
            raise ValueError(f"series {self.item_id!r}: values have shape {values.shape}, expected (variates, steps)")
        if len(values) != len(self.variates):
            raise ValueError(f"series {self.item_id!r}: {len(values)} rows of values, {len(self.variates)} variates")
        if np.isinf(values).any():
            step = int(np.isinf(values).any(0).argmax())
            raise ValueError(f"series {self.item_id!r}: infinite value at step {step}; write NaN for a missing value")
        if self.known is not None:
            known = np.asarray(self.known)
            if known.ndim != 2 or known.shape[1] < values.shape[1]:
                raise ValueError(
                    f"series {self.item_id!r}: known features have shape {known.shape}, "
                    f"expected (features, at least {values.shape[1]} steps)"
                )
            if np.isinf(known).any():
                step = int(np.isinf(known).any(0).argmax())
                raise ValueError(f"series {self.item_id!r}: infinite known feature at step {step}; write NaN if absent")
            object.__setattr__(self, "known", known)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "start", np.asarray(self.start, "M8[ns]")[()])
        object.__setattr__(self, "freq", self.clock.freq)

    def __len__(self) -> int:
        return self.values.shape[1]

    @property
    def clock(self) -> Clock:
        """The clock of the series."""
        return clock(self.freq)

    @property
    def timestamps(self) -> np.ndarray:
        """Timestamps of the T steps."""
        return self.clock.timestamp(self.start, np.arange(len(self)))

    def slice(self, first: int, last: int | None = None) -> "Series":
        """Steps [first, last), counted from 0; views, not copies. Known features keep their future."""
        last = len(self) if last is None else last
        if not 0 <= first <= last <= len(self):
            raise ValueError(f"series {self.item_id!r}: no steps [{first}, {last}) among {len(self)}")
        return replace(
            self,
            start=self.clock.timestamp(self.start, first)[()] if first else self.start,
            values=self.values[:, first:last],
            known=None if self.known is None else self.known[:, first:],
        )

    def univariate(self) -> list["Series"]:
        """One series per variate, named `item_id` if there is one variate only, else `item_id/variate`."""
        if len(self.variates) == 1:
            return [self]
        return [
            replace(self, item_id=f"{self.item_id}/{name}", values=self.values[v : v + 1], variates=("target",))
            for v, name in enumerate(self.variates)
        ]
