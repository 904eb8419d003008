"""A frequency as arithmetic on whole steps: timestamps, grids, calendar features. NumPy and zoneinfo only.

A series has its own grid: the timestamp of its first row is step 0, everything else is an int64 step. Timestamps are
naive UTC. Steps of fixed length (second to week) are counted from the first timestamp, whatever its phase; month,
quarter and year steps want the first (`MS`, `QS`, `YS`) or the last day (`ME`, `QE`, `YE`) of a month.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
from jaxtyping import Bool, Float32, Int64

_SECOND = 1_000_000_000
_DAY = 86_400 * _SECOND
_FIXED = {"ms": 1_000_000, "s": _SECOND, "min": 60 * _SECOND, "h": 3_600 * _SECOND, "D": _DAY, "W": 7 * _DAY}
_MEAN_MONTH = 30.436875 * _DAY
_REACH = 9.2e18  # nanoseconds from 1970 that int64 holds, with some months to spare
_MONTHS = {"MS": 1, "ME": 1, "QS": 3, "QE": 3, "YS": 12, "YE": 12}
# M, Q, Y and A alone are period aliases, as GluonTS uses them: the step is the month, its stamp the first day.
_ALIASES = {
    "L": "ms", "S": "s", "T": "min", "H": "h", "M": "MS", "Q": "QS", "Y": "YS", "A": "YS", "AS": "YS",
}  # fmt: skip
_WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
_MONTH_NAMES = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")

# Cycles that the calendar features of a frequency describe, with the number of harmonics of each.
_CYCLES: dict[str, tuple[tuple[str, int], ...]] = {
    "ms": (("minute", 1), ("hour", 1)),
    "s": (("minute", 1), ("hour", 1), ("day", 2), ("week", 2)),
    "min": (("hour", 1), ("day", 2), ("week", 2), ("year", 2)),
    "h": (("day", 2), ("week", 2), ("year", 2)),
    "D": (("week", 2), ("month", 1), ("year", 2)),
    "B": (("week", 2), ("month", 1), ("year", 2)),
    "W": (("month", 1), ("year", 2)),
    "M": (("year", 2),),
    "Q": (("year", 1),),
    "Y": (),
}


class Clock:
    """The grid of a frequency.

    Args:
        freq: a pandas (>= 2.2) alias with an optional multiple: `s`, `5min`, `h`, `D`, `B`, `7D`, `W`, `W-TUE`, `MS`,
            `ME`, `QS`, `QE`, `YS`, `YE`; the older `T`, `H`, `M`, `Q`, `A`, ... are accepted.

    Attributes:
        freq: the canonical alias.
        seasons: season lengths in steps of the seasonal memory, 1 (the last value) first.
        seasonality: the season length that GluonTS takes for this frequency, the `m` of published MASE.
        patch_size: steps per patch that suit the frequency.
        calendar_size: number of calendar features.

    Raises:
        ValueError: the alias is unknown.
    """

    def __init__(self, freq: str):
        match = re.fullmatch(r"\s*(\d*)([A-Za-z]+)(?:-([A-Za-z]{3}))?\s*", freq) if isinstance(freq, str) else None
        name = _ALIASES.get(match[2], match[2]) if match else "?"
        anchor = (match[3] or "").upper() if match else ""
        multiple = int(match[1] or 1) if match else 0
        if name in _FIXED or name == "B" or name in _MONTHS:
            anchors = _WEEKDAYS if name == "W" else _MONTH_NAMES if name in _MONTHS and _MONTHS[name] > 1 else ()
            known = not anchor or anchor in anchors
        else:
            known = False
        if not known or multiple < 1:
            raise ValueError(
                f"freq {freq!r} is not known; use one of s, min, 15min, h, D, B, 7D, W, MS, ME, QS, QE, YS, YE, "
                "with a multiple before it if need be"
            )
        self.multiple = multiple
        if name == "W":
            anchor = anchor or "SUN"
        for larger, smaller, factor in (("s", "ms", 1000), ("min", "s", 60), ("h", "min", 60), ("D", "h", 24)):
            if name == smaller and self.multiple % factor == 0:  # 60min is h
                name, self.multiple = larger, self.multiple // factor
        self._name = name
        self.freq = (str(self.multiple) if self.multiple > 1 else "") + name + (f"-{anchor}" if anchor else "")
        self._months = _MONTHS.get(name, 0) * self.multiple
        self._at_end = name in ("ME", "QE", "YE")
        self._step = _FIXED.get(name, 0) * self.multiple
        self._kind = self._kind_of()
        self.calendar_size = 2 * sum(harmonics for _, harmonics in _CYCLES[self._kind])

    def _kind_of(self) -> str:
        if self._name == "B":
            return "B"
        if self._months:
            return "Y" if self._months % 12 == 0 else "Q" if self._months % 3 == 0 else "M"
        if self._step % (7 * _DAY) == 0:
            return "W"
        return self._name

    def __repr__(self) -> str:
        return f"Clock({self.freq!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Clock) and other.freq == self.freq

    def __hash__(self) -> int:
        return hash(self.freq)

    @property
    def patch_size(self) -> int:
        """Steps per patch: year and quarter 1, month and week 4, day to hour 8, below the hour 16."""
        return {"Y": 1, "Q": 1, "M": 4, "W": 4, "D": 8, "B": 8, "h": 8}.get(self._kind, 16)

    @property
    def seasons(self) -> tuple[int, ...]:
        """Season lengths of the seasonal memory, the last value (1) first."""
        lengths = {
            "B": [5], "Y": [], "Q": [12 / max(1, self._months)], "M": [12 / max(1, self._months)], "W": [52 * 7],
            "D": [7, 364], "h": [24, 168],
            "min": [1440, 10080] if self.multiple >= 5 else [60, 1440], "s": [60], "ms": [],
        }[self._kind]  # fmt: skip
        if self._kind == "W":
            lengths = [lengths[0] * _DAY / self._step]
        elif self._kind not in ("M", "Q"):
            lengths = [length / self.multiple for length in lengths]
        return (1, *sorted({int(length) for length in lengths if length == int(length) and length > 1}))

    @property
    def seasonality(self) -> int:
        """Season length as GluonTS 0.17 takes it: 1 for days and weeks, and where the multiple does not divide it."""
        base = {"s": 3600, "min": 1440, "h": 24, "B": 5, "MS": 12, "ME": 12, "QS": 4, "QE": 4}.get(self._name, 1)
        return base // self.multiple if base % self.multiple == 0 else 1

    def timestamp(self, start: np.datetime64 | np.ndarray, steps: int | np.ndarray) -> np.ndarray:
        """The timestamps of `steps` on the grid that starts at `start`; the two broadcast, steps may be negative.

        Raises:
            ValueError: a `start` is not on the grid (a weekend for `B`, a mid-month day for `MS`), or a step lies
                outside the years 1679 to 2261, which nanoseconds cannot tell.
        """
        start, steps = np.broadcast_arrays(np.asarray(start, "M8[ns]"), np.asarray(steps, np.int64))
        self._require_on_grid(start)
        size = self._step or self._months * _MEAN_MONTH or self.multiple * 1.4 * _DAY
        beyond = np.abs(start.astype(np.int64) + steps * float(size)) > _REACH
        if beyond.any():
            raise ValueError(
                f"step {steps[beyond].ravel()[0]} of freq {self.freq!r} after {show(start[beyond].ravel()[0])} lies "
                "outside the years 1679 to 2261; take fewer steps or a shorter freq"
            )
        if self._step:
            return np.asarray(start + (steps * self._step).astype("m8[ns]"))
        day = start.astype("M8[D]")
        time = start - day
        if self._months:
            month = start.astype("M8[M]") + steps * self._months
            moved = (month + 1).astype("M8[D]") - 1 if self._at_end else month.astype("M8[D]")
        else:
            moved = np.busday_offset(day, steps * self.multiple, roll="forward")
        return np.asarray(moved.astype("M8[ns]") + time)

    def steps(
        self, start: np.datetime64 | np.ndarray, stamps: np.datetime64 | np.ndarray
    ) -> tuple[Int64[np.ndarray, "..."], Bool[np.ndarray, "..."]]:
        """The step of each stamp on the grid that starts at `start`, rounded down, and whether it lies on the grid.

        Raises:
            ValueError: a `start` is not on the grid itself, or a stamp is NaT.
        """
        start, stamps = np.broadcast_arrays(np.asarray(start, "M8[ns]"), np.asarray(stamps, "M8[ns]"))
        if np.isnat(stamps).any():
            raise ValueError("a timestamp is missing (NaT); every row needs one")
        self._require_on_grid(start)
        if self._step:
            steps, rest = np.divmod((stamps - start).astype(np.int64), self._step)
            return np.asarray(steps), np.asarray(rest == 0)
        # The time of day belongs to the grid: it is counted from that of the first row.
        shifted = stamps - (start - start.astype("M8[D]"))
        day = shifted.astype("M8[D]")
        on_grid = shifted == day
        if self._months:
            distance = (day.astype("M8[M]") - start.astype("M8[M]")).astype(np.int64)
            edge = day + 1 if self._at_end else day
            whole = edge == edge.astype("M8[M]")
            if self._at_end:  # before its last day, a month's step has not come yet
                distance = distance - ~whole
            steps, rest = np.divmod(distance, self._months)
            return np.asarray(steps), np.asarray(on_grid & whole & (rest == 0))
        weekday = np.is_busday(day)
        # busday_count leaves a weekend day on the Friday before it: count to the day after, minus one.
        distance = self._business_index(day) - self._business_index(start.astype("M8[D]"))
        steps, rest = np.divmod(distance, self.multiple)
        return np.asarray(steps), np.asarray(on_grid & weekday & (rest == 0))

    def on_grid(self, start: np.datetime64 | np.ndarray) -> np.ndarray:
        """Whether a grid of this frequency can start at `start`."""
        start = np.asarray(start, "M8[ns]")
        day = start.astype("M8[D]")
        if self._name == "B":
            return np.asarray(np.is_busday(day))
        if self._months:
            edge = day + 1 if self._at_end else day
            return np.asarray(edge == edge.astype("M8[M]"))
        return np.asarray(~np.isnat(start))

    def calendar(self, start: np.datetime64, first: int, last: int) -> Float32[np.ndarray, "F n_steps"]:
        """Calendar features of the steps [first, last): sines and cosines of the cycles that suit the frequency."""
        cycles = _CYCLES[self._kind]
        if not cycles or last <= first:
            return np.zeros((self.calendar_size, max(0, last - first)), np.float32)
        stamps = self.timestamp(start, np.arange(first, last))
        rows = []
        for cycle, harmonics in cycles:
            angle = 2 * np.pi * self._phase(stamps, cycle)
            for harmonic in range(1, harmonics + 1):
                rows += [np.sin(harmonic * angle), np.cos(harmonic * angle)]
        return np.stack(rows).astype(np.float32)

    def _phase(self, stamps: np.ndarray, cycle: str) -> np.ndarray:
        """Share of a cycle that has passed, in [0, 1)."""
        day = stamps.astype("M8[D]")
        nanoseconds = (stamps - day).astype(np.int64)
        if cycle in ("minute", "hour", "day"):
            size = {"minute": 60 * _SECOND, "hour": 3600 * _SECOND, "day": _DAY}[cycle]
            return (nanoseconds % size) / size
        time = nanoseconds / _DAY
        if cycle == "week":
            return ((day.astype(np.int64) + 3) % 7 + time) / 7  # 1970-01-01 was a Thursday; 0 is Monday
        if cycle == "year" and self._months:
            return (stamps.astype("M8[M]").astype(np.int64) % 12) / 12  # month ends and month starts alike
        unit = "M8[M]" if cycle == "month" else "M8[Y]"
        begin = stamps.astype(unit)
        length = ((begin + 1).astype("M8[D]") - begin.astype("M8[D]")).astype(np.int64)
        return ((day - begin.astype("M8[D]")).astype(np.int64) + time) / length

    def _require_on_grid(self, start: np.ndarray) -> None:
        good = self.on_grid(start)
        if not good.all():
            bad = np.asarray(start)[~good].ravel()[0]
            remedy = {
                "B": "business days are Monday to Friday",
                "MS": "months start on day 1; for month ends use 'ME'",
                "QS": "quarters start on day 1 of a month; for quarter ends use 'QE'",
                "YS": "years start on day 1 of a month; for year ends use 'YE'",
                "ME": "month ends are last days; for month starts use 'MS'",
                "QE": "quarter ends are last days of a month; for quarter starts use 'QS'",
                "YE": "year ends are last days of a month; for year starts use 'YS'",
            }.get(self._name, "give every series a first timestamp")
            raise ValueError(f"a grid of freq {self.freq!r} cannot start at {show(bad)}: {remedy}")

    @staticmethod
    def _business_index(day: np.datetime64 | np.ndarray) -> np.ndarray:
        """Number of the latest business day at or before `day`."""
        return np.asarray(np.busday_count(np.datetime64("1970-01-01"), day + 1) - 1)

    def to_utc(self, stamps: Sequence[np.datetime64] | np.ndarray, tz: str) -> np.ndarray:
        """Local times of `tz` (an IANA name) as naive UTC.

        Raises:
            ValueError: the zone is unknown, or a local time is skipped or repeated by a change of the clocks.
        """
        try:
            zone = ZoneInfo(tz)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"time zone {tz!r} is not known; use an IANA name such as Europe/Berlin") from error
        local = np.asarray(stamps, "M8[ns]")
        seconds, inverse = np.unique(local.astype("M8[s]"), return_inverse=True)
        offsets = np.empty(len(seconds), np.int64)
        for i, stamp in enumerate(seconds.astype(object)):
            early, late = stamp.replace(tzinfo=zone, fold=0), stamp.replace(tzinfo=zone, fold=1)
            if early.utcoffset() != late.utcoffset():
                back = early.astimezone(UTC).astimezone(zone).replace(tzinfo=None)
                what = "occurs twice" if back == stamp else "does not exist"
                raise ValueError(f"{show(seconds[i])} {what} in {tz}: give such timestamps in UTC")
            offsets[i] = round(early.utcoffset().total_seconds())  # pyright: ignore[reportOptionalMemberAccess]
        return local - (offsets * _SECOND).astype("m8[ns]")[inverse].reshape(local.shape)


@lru_cache(maxsize=256)
def clock(freq: str) -> Clock:
    """The clock of a frequency; clocks have no state, so one serves all."""
    return Clock(freq)


def show(stamp: np.datetime64) -> str:
    """A timestamp as people write it: no zeros that say nothing."""
    if np.isnat(stamp):
        return "NaT"
    stamp = stamp.astype("M8[ns]")
    for unit in ("D", "m", "s", "ms"):
        if stamp == stamp.astype(f"M8[{unit}]"):
            return str(stamp.astype(f"M8[{unit}]")).replace("T", " ")
    return str(stamp).replace("T", " ")


def parse(text: str) -> np.datetime64:
    """One ISO 8601 timestamp as naive UTC; an offset or `Z` is honoured.

    Raises:
        ValueError: the text is no timestamp.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{text!r} is no ISO 8601 timestamp such as 2024-01-31 or 2024-01-31T14:00:00Z") from error
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC).replace(tzinfo=None)
    return np.datetime64(moment, "ns")
