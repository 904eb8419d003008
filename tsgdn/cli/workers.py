"""Several processes behind one `tsgdn stream`: this one reads, routes and writes, each worker owns some shards.

A tick is cut by shard and goes to its workers at once; when all have answered, its forecasts go out and the next one is
read. That is the back-pressure. A worker that dies is started anew; its stores tell how far it was, and the tick on its
way comes again, each shard taking in what it lacks.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tsgdn.cli.engine import Forecasting, Held, Outcome
from tsgdn.cli.main import Misuse
from tsgdn.cli.options import state_place
from tsgdn.cli.sinks import Forecast
from tsgdn.cli.sources import without_password
from tsgdn.cli.worker import cut, receive, send, with_number

ATTEMPTS = 3  # starts of a worker for one order


class _Gone(Exception):
    """A worker does not answer any more."""


class Worker:
    """One process.

    Args:
        number: of it.
        order: the first thing it is told.
        threads: of torch in it, if the environment does not say.
    """

    def __init__(self, number: int, order: dict[str, Any], threads: int) -> None:
        self.number, self.shards, self._order = number, order["mine"], order
        self._threads = str(threads)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> tuple[dict[str, Any], bytes]:
        """Starts it and returns what it found in its stores.

        Raises:
            Misuse: it refuses.
            _Gone: it died.
        """
        self.stop()
        environment = {"OMP_NUM_THREADS": self._threads} | os.environ
        # a session of its own: what is typed at the terminal is not for it
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tsgdn.cli.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
        )  # fmt: skip
        self.tell(self._order)
        found = self.hear()
        if "error" in found[0]:
            raise Misuse(f"--state {without_password(str(self._order['state']))}: {found[0]['error']}")
        return found

    def tell(self, order: dict[str, Any], rest: bytes = b"") -> None:
        """Sends an order; a worker that is gone shows when it is heard."""
        assert self.process is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            send(self.process.stdin, order, rest)  # pyright: ignore[reportArgumentType]

    def hear(self) -> tuple[dict[str, Any], bytes]:
        """The answer to the last order.

        Raises:
            _Gone: there will be none.
        """
        assert self.process is not None
        answer = receive(self.process.stdout)  # pyright: ignore[reportArgumentType]
        if answer is None:
            raise _Gone
        return answer

    def stop(self) -> None:
        """Ends it without a word; its stores are as after a kill."""
        if self.process is None:
            return
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


class Workers:
    """An `Engine` of several processes.

    Args:
        args: of the command.
        options: of the predictors.
        forecasting: what is wanted.
        shape: a predictor without series: it says what rows look like, and is not used.
        shards: how many there are.
        log: for people.

    Raises:
        Misuse: a store cannot be used.
    """

    durable = True

    def __init__(
        self,
        args: argparse.Namespace,
        options: dict[str, Any],
        forecasting: Forecasting,
        shape: Any,
        shards: int,
        log: Callable[..., None],
    ) -> None:
        from tsgdn.cli.stores import read_key

        self.variates, self.clock, self.shards, self._log = shape.variates, shape.clock, shards, log
        self._run, self._tick = uuid.uuid4().hex, 0
        self._state = without_password(args.state)
        count = args.workers
        order = {
            "model": os.path.abspath(os.path.expanduser(args.model)), "options": options,
            "state": str(state_place(args.state)), "durability": args.durability,
            "key": None if args.state_key is None else read_key(args.state_key).hex(), "shards": shards,
            "levels": list(forecasting.levels), "emit": forecasting.emit, "calibrated": forecasting.calibrated,
            "run": self._run, "takeover": args.takeover, "owner": "tsgdn stream", "source": (args.source or ["-"])[0],
        }  # fmt: skip
        threads = max(1, (os.cpu_count() or 1) // count)
        groups = [list(range(number, shards, count)) for number in range(count)]
        self._workers = [Worker(i, {**order, "mine": mine}, threads) for i, mine in enumerate(groups)]
        self._of = {shard: worker for worker in self._workers for shard in worker.shards}
        self._offsets: dict[int, dict[str, bytes]] = {}
        self._held: dict[int, list[list[Any]]] = {}
        self._again: list[Forecast] = []
        self._series = [0] * count
        self._due = False
        self._places: dict[str, bytes] = {}  # of the sources that rows have come from
        try:
            for worker in self._workers:
                self._note(worker, *self._started(worker))
        except BaseException:
            self.abandon()
            raise
        ticks = sum(self._ticks)
        if sum(self._series) or ticks:
            log(f"{sum(self._series)} series were restored, {ticks} ticks of the journals among them")

    # ---- starting ---------------------------------------------------------------------------------------------------

    _ticks: tuple[int, ...] = ()

    def _started(self, worker: Worker) -> tuple[dict[str, Any], bytes]:
        for _ in range(ATTEMPTS):
            try:
                return worker.start()
            except _Gone:
                self._log(f"worker {worker.number} died while it was opening its stores", level="warning")
        raise OSError(f"--state {self._state}: worker {worker.number} cannot be started: see the lines above")

    def _note(self, worker: Worker, header: dict[str, Any], rest: bytes) -> None:
        for name, told in header["shards"].items():
            shard = int(name)
            self._offsets[shard] = {source: bytes.fromhex(offset) for source, offset in told["offsets"].items()}
            self._held[shard] = told["held"]
            self._ticks += (told["ticks"],)
            for item, code in told["lost"].items():
                text = f"{code}: the state of item {item} is damaged; its rows are set aside"
                self._log(text, level="warning", code=code, item_id=item)
        self._series[worker.number] = sum(told["series"] for told in header["shards"].values())
        self._again += _forecasts(header, rest)[0]

    def _asked(self, orders: Mapping[int, tuple[dict[str, Any], bytes]]) -> dict[int, tuple[dict[str, Any], bytes]]:
        """Sends orders to workers, all at once, and returns their answers; one that dies is started anew.

        Raises:
            StoreError: a store failed.
            OSError: a worker died again and again.
        """
        from tsgdn.streaming.stores import StoreFailed

        for number, order in orders.items():
            self._workers[number].tell(*order)
        answers = {}
        for number, order in orders.items():
            worker = self._workers[number]
            for attempt in range(ATTEMPTS + 1):
                try:
                    answers[number] = worker.hear()
                    break
                except _Gone:
                    if attempt == ATTEMPTS:
                        raise OSError(
                            f"worker {number} died {ATTEMPTS + 1} times at tick {self._tick}: see the lines above"
                        ) from None
                    self._log(f"worker {number} died: it is started anew", level="warning")
                    self._started(worker)
                    worker.tell(*order)
            if "error" in answers[number][0]:
                raise StoreFailed(answers[number][0]["error"])
        return answers

    # ---- the engine -------------------------------------------------------------------------------------------------

    def places(self, source: str) -> list[bytes | None]:
        """See `Engine.places`."""
        return [self._offsets[shard].get(source) for shard in range(self.shards)]

    def again(self) -> list[Forecast]:
        """See `Engine.again`."""
        again, self._again = self._again, []
        return again

    def observe(self, rows: Any, *, source: str, offset: bytes, received: int | None = None) -> Outcome:
        """See `Engine.observe`."""
        from tsgdn.streaming.rows import Rejection
        from tsgdn.streaming.stores.shards import shard_of
        from tsgdn.streaming.ticks import Tick, chosen, packed
        from tsgdn.streaming.verdicts import ObserveReport

        self._tick += 1
        self._places[source] = offset
        place = with_number(offset, source, self._run, self._tick)
        owner: dict[str, int] = {item: shard_of(item, self.shards) for item in dict.fromkeys(rows.item_ids)}
        where = np.array([owner[item] for item in rows.item_ids], np.int64)
        parts = {shard: chosen(rows, where == shard)._replace(bad=[]) for shard in sorted(set(where.tolist()))}
        orders = {}
        for worker in self._workers:
            mine = [shard for shard in worker.shards if shard in parts]
            if mine:
                data = [packed(Tick(parts[shard], {}, place, source, received)) for shard in mine]
                order = {"do": "tick", "tick": self._tick, "parts": mine, "sizes": [len(one) for one in data]}
                orders[worker.number] = (order, b"".join(data))
        aside, counts, forecasts, signals = list(rows.bad), dict.fromkeys(_COUNTS, 0), [], []
        counts["rejected"] = len(aside)
        for header, rest in self._asked(orders).values():
            for name, report in header["reports"].items():
                places = parts[int(name)].places
                if report is None:
                    continue
                for count in _COUNTS:
                    counts[count] += report[count]
                for bad in map(Rejection._make, report["set_aside"]):
                    aside.append(bad if bad.row is None else bad._replace(row=int(places[bad.row])))
            self._held |= {int(shard): told for shard, told in header["held"].items()}
            made, left = _forecasts(header, rest)
            forecasts += made
            signals += cut(left, header["signals"])
        aside.sort(key=lambda bad: -1 if bad.row is None else bad.row)
        report = ObserveReport(**counts, set_aside=tuple(aside))
        return Outcome(report, forecasts, self.held(), signals)

    def held(self) -> Held:
        """See `Engine.held`."""
        return {(item, stamp): values for told in self._held.values() for item, stamp, values in told}

    def series(self) -> int:
        """See `Engine.series`."""
        return sum(self._series)

    def due(self) -> bool:
        """See `Engine.due`."""
        return self._due

    def certain(self) -> bool:
        """See `Engine.certain`."""
        return True

    def checkpoint(self, places: Mapping[str, bytes]) -> None:
        """See `Engine.checkpoint`."""
        self._all({"do": "checkpoint", "places": self._numbered(places)})

    def renew(self) -> None:
        """See `Engine.renew`."""
        self._all({"do": "renew"})

    def close(self, places: Mapping[str, bytes] | None) -> None:
        """See `Engine.close`."""
        if places is not None:
            self._all({"do": "close", "places": self._numbered(places)})
        self.abandon()

    def abandon(self) -> None:
        """Ends all workers; their stores are as after a kill."""
        for worker in self._workers:
            worker.stop()

    def _numbered(self, places: Mapping[str, bytes]) -> dict[str, str]:
        # the same bytes for all shards: they agree on where the sources stand
        told = {**{source: b"" for source, offset in self._places.items() if not offset}, **places}
        return {source: with_number(offset, source, self._run, self._tick).hex() for source, offset in told.items()}

    def _all(self, order: dict[str, Any]) -> None:
        answers = self._asked({worker.number: (order, b"") for worker in self._workers})
        for number, (header, _) in answers.items():
            self._series[number] = header["series"]
        self._due = any(header["due"] for header, _ in answers.values())


_COUNTS = ("accepted", "duplicate", "late", "gap", "missing", "rejected", "held", "revised")


def _forecasts(header: dict[str, Any], rest: bytes) -> tuple[list[Forecast], bytes]:
    """The forecasts of an answer, and what lies behind them."""
    sizes = [size for *_, size in header["forecasts"]]
    lines = cut(rest, sizes)
    pairs = zip(header["forecasts"], lines, strict=True)
    made = [Forecast(told[0], told[1], told[2], line) for told, line in pairs]
    return made, rest[sum(sizes) :]
