"""What makes forecasts out of rows for `tsgdn stream`: one predictor in this process, with a store or without.

`workers` has the same for several processes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tsgdn.cli.sinks import Forecast

Held = dict[tuple[str, str], list[float | None]]


class Forecasting(NamedTuple):
    """Which forecasts are made after a tick.

    Attributes:
        levels: of the quantiles.
        emit: "touched" series that moved, those that filled a "patch", or "none".
        calibrated: whether a forecast says what live calibration makes of it; None: the predictor has none.
    """

    levels: tuple[float, ...]
    emit: str
    calibrated: bool | None = None


class Outcome(NamedTuple):
    """What became of a tick.

    Attributes:
        report: of the rows.
        forecasts: that are due.
        held: what waits for other rows to agree with it, if anything does.
        signals: lines for the stream of alarms.
    """

    report: Any
    forecasts: list[Forecast]
    held: Held
    signals: list[bytes]


@runtime_checkable
class Engine(Protocol):
    """Takes ticks in and keeps what has been taken in.

    Attributes:
        variates: names along V.
        clock: of all series.
        shards: how many shards it holds; 1 without.
        durable: whether there is a store.
    """

    variates: tuple[str, ...]
    clock: Any
    shards: int
    durable: bool

    def places(self, source: str) -> list[bytes | None]:
        """Per shard the place in a source that the states hold."""
        ...

    def again(self) -> list[Forecast]:
        """Forecasts of the last tick before a kill, which may not have been sent."""
        ...

    def observe(self, rows: Any, *, source: str, offset: bytes, received: int | None = None) -> Outcome:
        """Takes in a tick; durable when it returns, if there is a store."""
        ...

    def held(self) -> Held:
        """What waits for other rows to agree with it."""
        ...

    def series(self) -> int:
        """How many there are."""
        ...

    def due(self) -> bool:
        """Whether a checkpoint must not wait."""
        ...

    def certain(self) -> bool:
        """Whether a kill takes nothing back."""
        ...

    def checkpoint(self, places: Mapping[str, bytes]) -> None:
        """Writes the states, and how far each source has been read."""
        ...

    def renew(self) -> None:
        """Prolongs the right to the store."""
        ...

    def close(self, places: Mapping[str, bytes] | None) -> None:
        """Lets go; with a last checkpoint, unless no places are given."""
        ...


class Local:
    """An `Engine` in this process.

    Args:
        predictor: a `StatefulPredictor`.
        durable: the `DurablePredictor` around it, None without a store.
        forecasting: what is wanted.
        signals: whether alarms are.
    """

    shards = 1

    def __init__(self, predictor: Any, durable: Any, forecasting: Forecasting, *, signals: bool = False) -> None:
        self.predictor, self.store, self.forecasting = predictor, durable, forecasting
        self.variates, self.clock = predictor.variates, predictor.clock
        self.durable = durable is not None
        self._signals = signals
        self._ticks = self._series = 0
        self._skewed = getattr(predictor._judge, "skew", None) is not None

    def places(self, source: str) -> list[bytes | None]:
        """See `Engine.places`."""
        return [None if self.store is None else self.store.recovery.offsets.get(source)]

    def again(self) -> list[Forecast]:
        """See `Engine.again`."""
        if self.store is None or not self.store.recovery.ticks or self.forecasting.emit == "none":
            return []
        return self.forecasts(self.store.recovery.last)

    def observe(self, rows: Any, *, source: str, offset: bytes, received: int | None = None) -> Outcome:
        """See `Engine.observe`."""
        predictor = self.predictor
        touched = list(dict.fromkeys(rows.item_ids))
        emit = self.forecasting.emit
        if self.store is not None:
            self.store.fetch(touched)
        heads = {} if emit == "none" else self._heads(touched)
        self._ticks += 1
        if self.store is not None:
            report = self.store.observe(rows, offset=offset, source=source, received=received)
        elif received is not None and self._skewed:
            report = predictor.observe(rows, received=_time(received))
        else:
            report = predictor.observe(rows)
        forecasts = [] if emit == "none" else self.forecasts(self._moved(touched, heads))
        return Outcome(report, forecasts, predictor.held(), self.alarms() if self._signals else [])

    def _heads(self, items: Iterable[str]) -> dict[str, int]:
        whose = self.predictor if self.store is None else self.store
        return {item: whose.head(item) for item in items if item in whose}

    def _moved(self, touched: Sequence[str], heads: dict[str, int]) -> list[str]:
        """The series that a forecast is due for."""
        now = self._heads(touched)
        P = self.predictor.model.patch_size if self.forecasting.emit == "patch" else 1
        return [item for item in now if now[item] // P > heads.get(item, 0) // P]

    def forecasts(self, items: Sequence[str]) -> list[Forecast]:
        """Those of these series, ready to go."""
        if not items:
            return []
        import numpy as np
        import orjson

        predictor, levels = self.predictor, self.forecasting.levels
        more = {} if self.forecasting.calibrated is None else {"calibrated": self.forecasting.calibrated}
        whose = predictor if self.store is None else self.store
        forecast = whose.forecast(items, quantile_levels=levels, **more)
        origins = predictor.clock.timestamp(forecast.start, -1)
        names = [str(level) for level in levels]
        made = []
        for b, item in enumerate(items):
            origin, start = iso(origins[b]), iso(forecast.start[b])
            values = forecast.values[b]
            quantiles: Any = {name: np.ascontiguousarray(values[0, :, q]) for q, name in enumerate(names)}
            if len(predictor.variates) > 1:
                quantiles = {
                    variate: {name: np.ascontiguousarray(values[v, :, q]) for q, name in enumerate(names)}
                    for v, variate in enumerate(predictor.targets)
                }
            record = {
                "id": forecast_id(item, origin, 0, predictor.fingerprint),
                "item_id": item,
                "origin": origin,
                "start": start,
                "freq": forecast.freq,
                "quantiles": quantiles,
                "flags": sorted(forecast.flags[b]),
                "seq": self._ticks if self.store is None else self.store.store.seq,
            }
            line = orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
            made.append(Forecast(record["id"], item, origin, line))
        return made

    def alarms(self) -> list[bytes]:
        """The signals of the last tick, a JSON object and a newline each."""
        import numpy as np
        import orjson

        return [
            orjson.dumps(
                {name: iso(x) if isinstance(x, np.datetime64) else x for name, x in one._asdict().items()},
                option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE,
            )
            for one in self.predictor.signals()
        ]

    def held(self) -> Held:
        """See `Engine.held`."""
        return self.predictor.held()

    def series(self) -> int:
        """See `Engine.series`."""
        return len(self.predictor) if self.store is None else self._series or len(self.store)

    def due(self) -> bool:
        """See `Engine.due`."""
        return self.store is not None and self.store.overfull

    def certain(self) -> bool:
        """See `Engine.certain`."""
        return self.store is None or self.store.certain

    def checkpoint(self, places: Mapping[str, bytes]) -> None:
        """See `Engine.checkpoint`."""
        if self.store is not None:
            for source, offset in places.items():
                self.store.mark(offset, source=source)
            self.store.checkpoint()

    def renew(self) -> None:
        """See `Engine.renew`."""
        if self.store is not None:
            self.store.store.renew()

    def close(self, places: Mapping[str, bytes] | None) -> None:
        """See `Engine.close`."""
        if self.store is None:
            return
        self._series = len(self.store)
        if places is None:
            self.store.store.close()
            return
        for source, offset in places.items():
            self.store.mark(offset, source=source)
        self.store.close()


def forecast_id(item_id: str, origin: str, revision: int, model: str) -> str:
    """The same for the same forecast, whoever makes it."""
    key = json.dumps([item_id, origin, revision, model], ensure_ascii=False)
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _time(nanoseconds: int) -> Any:
    import numpy as np

    return np.datetime64(nanoseconds, "ns")


def iso(stamp: Any) -> str:
    """A time as text, without zeros that say nothing."""
    import numpy as np

    text = str(np.datetime64(stamp, "ns"))
    return re.sub(r"\.?0+$", "", text) if "." in text else text
