"""A worker of `tsgdn stream --workers`: owns some shards, and does what the process that started it says.

Orders come on stdin and answers go to stdout, each a frame: its length, a JSON object, bytes. A worker makes no
checkpoint of its own accord: whoever sends its forecasts on knows when they are out. When stdin ends it lets go of its
stores and leaves the journals as they are.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

from tsgdn.cli.engine import Forecasting, Local
from tsgdn.cli.sinks import Forecast
from tsgdn.streaming.ticks import framed, unframed

PATIENCE = 10.0  # seconds for which a store may still be held by the worker that was killed before this one


def send(pipe: BinaryIO, header: dict[str, Any], rest: bytes = b"") -> None:
    """Writes a frame."""
    frame = framed(header, rest)
    pipe.write(len(frame).to_bytes(8, "little") + frame)
    pipe.flush()


def receive(pipe: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Reads a frame; None where the other side is gone."""
    size = _exactly(pipe, 8)
    frame = None if size is None else _exactly(pipe, int.from_bytes(size, "little"))
    return None if frame is None else unframed(frame)


def _exactly(pipe: BinaryIO, size: int) -> bytes | None:
    parts = []
    while size:
        part = pipe.read(size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def cut(rest: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Bytes that lie one behind the other."""
    out, at = [], 0
    for size in sizes:
        out.append(rest[at : at + size])
        at += size
    return out


def with_number(offset: bytes, source: str, run: str, number: int) -> bytes:
    """A place that also tells which tick of which run it lies behind."""
    told = json.loads(offset) if offset else {"source": source}
    return json.dumps({**told, "run": run, "tick": number}).encode()


def number_in(offset: bytes, run: str) -> int:
    """The number of the tick that a place lies behind, 0 if it is of another run."""
    told = json.loads(offset) if offset else {}
    return int(told["tick"]) if told.get("run") == run else 0


class Group:
    """The shards of one worker.

    Args:
        order: what the other side wants: model, options, state, durability, key, shards, mine, levels, emit, run.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        from tsgdn.streaming.durable import DurablePredictor
        from tsgdn.streaming.predictor import StatefulPredictor
        from tsgdn.streaming.stores import StoreBusy, open_store

        self.run = order["run"]
        self.wants_signals = bool(order["options"].get("signals"))
        key = bytes.fromhex(order["key"]) if order["key"] else None
        forecasting = Forecasting(tuple(order["levels"]), order["emit"], order["calibrated"])
        self.parts: dict[int, Local] = {}
        deadline = time.monotonic() + PATIENCE
        shape = StatefulPredictor.from_pretrained(order["model"], **order["options"])
        for shard in order["mine"]:
            predictor = shape._empty_twin()  # one copy of the weights
            while True:
                store = open_store(
                    order["state"], durability=order["durability"], key=key, shard=shard, shards=order["shards"]
                )
                try:
                    durable = DurablePredictor(
                        predictor, store, owner=order["owner"], source=order["source"], key=key,
                        checkpoint_every=float("inf"), takeover=order["takeover"],
                    )  # fmt: skip
                    break
                except StoreBusy:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            self.parts[shard] = Local(predictor, durable, forecasting, signals=self.wants_signals)

    def ready(self) -> tuple[dict[str, Any], bytes]:
        """What was found on opening."""
        again = [one for part in self.parts.values() for one in part.again()]
        found = {shard: part.store.recovery for shard, part in self.parts.items()}
        header = {
            "shards": {
                shard: {
                    "series": part.series(),
                    "ticks": found[shard].ticks,
                    "lost": found[shard].lost,
                    "offsets": {name: offset.hex() for name, offset in found[shard].offsets.items()},
                    "held": _held(part.held()),
                }
                for shard, part in self.parts.items()
            },
            **_told(again),
        }
        return header, _lines(again)

    def tick(self, order: dict[str, Any], rest: bytes) -> tuple[dict[str, Any], bytes]:
        """Takes in the rows of a tick, those of each shard once."""
        from tsgdn.streaming.ticks import unpacked

        reports, forecasts, held, signals = {}, [], {}, []
        for shard, data in zip(order["parts"], cut(rest, order["sizes"]), strict=True):
            part, tick = self.parts[shard], unpacked(data)
            durable = part.store
            known = max((number_in(offset, self.run) for offset in durable._offsets.values()), default=0)
            if known < order["tick"]:
                outcome = part.observe(tick.rows, source=tick.source, offset=tick.offset, received=tick.received)
                report, made = outcome.report, outcome.forecasts
                signals += outcome.signals
            else:  # a worker before this one has taken it in, and died before it could say so
                report, made = durable.recovery.report, part.again()
            reports[shard] = None if report is None else _plain(report)
            forecasts += made
            held |= {shard: _held(part.held())}
        header = {"reports": reports, "held": held, "signals": [len(one) for one in signals], **_told(forecasts)}
        return header, _lines(forecasts) + b"".join(signals)

    def checkpoint(self, places: dict[str, str]) -> None:
        """Of all shards."""
        told = {source: bytes.fromhex(offset) for source, offset in places.items()}
        for part in self.parts.values():
            part.checkpoint(told)

    def renew(self) -> None:
        """The leases of all shards."""
        for part in self.parts.values():
            part.renew()

    def close(self, places: dict[str, str] | None) -> None:
        """Lets go of all shards."""
        told = None if places is None else {source: bytes.fromhex(offset) for source, offset in places.items()}
        for part in self.parts.values():
            part.close(told)

    def status(self) -> dict[str, Any]:
        """For the one who asks whether all is well."""
        return {
            "series": sum(part.series() for part in self.parts.values()),
            "due": any(p.due() for p in self.parts.values()),
        }


def _told(forecasts: Sequence[Forecast]) -> dict[str, Any]:
    return {"forecasts": [[one.id, one.item_id, one.origin, len(one.line)] for one in forecasts]}


def _lines(forecasts: Sequence[Forecast]) -> bytes:
    return b"".join(one.line for one in forecasts)


def _held(held: dict[tuple[str, str], Any]) -> list[list[Any]]:
    return [[item, stamp, values] for (item, stamp), values in held.items()]


def _plain(report: Any) -> dict[str, Any]:
    counts = {name: value for name, value in report._asdict().items() if isinstance(value, int)}
    return {**counts, "set_aside": [list(bad) for bad in report.set_aside]}


def main() -> int:
    """Serves until stdin ends."""
    # a signal to the group of processes is for the one that sends orders: it lets the tick end first
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    begun = receive(orders)
    if begun is None:
        return 0
    from tsgdn.streaming.stores import StoreError

    try:
        group = Group(begun[0])
        send(answers, *group.ready())
    except (StoreError, ValueError, OSError) as error:
        send(answers, {"error": " ".join(str(error).split())})
        return 2
    while (told := receive(orders)) is not None:
        order, rest = told
        try:
            if order["do"] == "tick":
                send(answers, *group.tick(order, rest))
                continue
            if order["do"] == "checkpoint":
                group.checkpoint(order["places"])
            elif order["do"] == "renew":
                group.renew()
            elif order["do"] == "close":
                status = group.status()
                group.close(order["places"])
                send(answers, status)
                return 0
            send(answers, group.status())
        except StoreError as error:
            send(answers, {"error": " ".join(str(error).split())})
            return 1
        except BrokenPipeError:
            break
    group.close(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
