"""Redis Streams as a source and as a sink (https://redis.io/docs/latest/develop/data-types/streams/).

One consumer per stream, so that its order is the order of the rows. Where the states stand is in their own store; the
group of the server says what was delivered. Between the two lies what a killed run had read and not taken in: it is
read again by its numbers, and so is what was delivered into a connection that broke.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tsgdn.cli.lines import LINE_LIMIT, BadLine, Line
from tsgdn.cli.main import Misuse
from tsgdn.cli.sinks import Forecast
from tsgdn.cli.sources import PAUSE, REDIS_OPTIONS, Control, read_address, told_by

COUNT = 1024  # entries that are asked for at once
CHUNK = 1 << 20  # bytes of forecasts per transaction: EXEC blocks the server
PATIENCE = 0.5  # seconds between attempts to reach a server that does not answer
Id = tuple[int, int]


class _Stream:
    """A stream of a server."""

    def __init__(self, option: str, text: str, control: Control, known: tuple[str, ...]) -> None:
        address = read_address(option, text, ("stream", *known, *REDIS_OPTIONS))
        self.options = address.options
        if "stream" not in self.options:
            raise Misuse(f"{option} {address.shown}: which stream? expected {address.shown}?stream=NAME")
        self.key = self.options["stream"]
        database = self.options.get("db", "0" if address.scheme == "unix" else address.path or "0")
        if not database.isdecimal():
            raise Misuse(f"{option} {address.shown}: the database is {database!r:.60}, expected a number")
        self.place = (address.hosts, int(database), self.key)
        self.shown = f"{option} {address.shown}?stream={self.key}"
        self.name = f"{address.shown}?stream={self.key}"
        self.control = control
        plain = text.partition("?")[0]
        query = urlencode({key: self.options[key] for key in REDIS_OPTIONS if key in self.options})
        more: dict[str, Any] = (
            {} if address.scheme == "unix" else {"socket_keepalive": True, "socket_connect_timeout": 5}
        )
        try:
            # no retry below us: an answer that was lost may have held entries
            self.client: Any = redis.Redis.from_url(
                f"{plain}?{query}", protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=30, **more
            )
            kind = self.client.type(self.key)
        except (ValueError, TypeError):
            raise Misuse(f"{option} {address.shown}: the options of the address cannot be used") from None
        except (redis.RedisError, OSError) as error:
            raise Misuse(f"{self.shown}: {_reason(error)}") from None
        if kind not in (b"none", b"stream"):
            raise Misuse(f"{self.shown}: the key holds a {kind.decode()}, expected a stream")

    def reached(self, call: Callable[[], Any]) -> tuple[bool, Any]:
        """Whether the server answered, and what.

        Raises:
            OSError: the answer is a refusal.
        """
        try:
            return True, call()
        except redis.AuthenticationError as error:
            raise OSError(f"{self.shown}: {_reason(error)}") from None
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self.control.trouble(f"{self.shown}: {_reason(error)}; trying again")
            return False, None
        except redis.RedisError as error:
            raise OSError(f"{self.shown}: {_reason(error)}") from None

    def close(self) -> None:
        """Ends the connection."""
        self.client.close()


class RedisSource(_Stream):
    """The entries of a stream, read as a member of a group.

    An entry has fields of the names that columns have, or a field `json` with a record.

    Args:
        text: redis://[NAME:PASSWORD@]HOST:PORT/DB?stream=NAME&group=GROUP&consumer=NAME; rediss:// and unix:// too.
        control: of the run.
        takeover: take what other consumers of the group have not acknowledged.

    Raises:
        Misuse: the server cannot be reached or the key is no stream.
    """

    format: str | None = "jsonl"
    broker, replayable = True, True

    def __init__(self, text: str, control: Control, *, takeover: bool = False) -> None:
        super().__init__("--source", text, control, ("group", "consumer"))
        self.group = self.options.get("group", "tsgdn")
        self.consumer = self.options.get("consumer", "tsgdn")
        self.name = f"{self.name}&group={self.group}"
        self._takeover = takeover
        self._at: Id = (0, 0)  # the last entry that `lines` gave, or what comes before the first
        self._number = 0
        self._given: deque[tuple[int, Id]] = deque()  # line and entry whose place was not asked for
        self._latest: Id | None = None
        self._pending: deque[Id] = deque()  # given, not acknowledged

    # ---- where to begin ---------------------------------------------------------------------------------------------

    def resume(self, offset: bytes | None, *, anew: bool = False) -> None:
        """See `Source.resume`."""
        told = None if anew else told_by(offset, self.name)
        try:
            self._resume(None if told is None else _id(told["entry"]), anew=anew)
        except (redis.RedisError, OSError) as error:
            raise Misuse(f"{self.shown}: {_reason(error)}") from None

    def _resume(self, stored: Id | None, *, anew: bool) -> None:
        client = self.client
        info = client.xinfo_stream(self.key) if client.exists(self.key) else None
        if stored is not None and (info is None or _id(info["last-generated-id"]) < stored):
            raise Misuse(
                f"{self.shown}: the states hold its entries up to {_text(stored)} and it "
                f"{'does not exist' if info is None else 'ends before'}: give the stream that was read, or --from-start"
            )
        group = self._group()
        if group is None:
            client.xgroup_create(self.key, self.group, id=_text(stored or (0, 0)), mkstream=True)
            group = self._group() or {}
        others = sorted(
            (one["name"].decode(errors="replace"), int(one["pending"]))
            for one in client.xinfo_consumers(self.key, self.group)
            if one["name"] != self.consumer.encode() and int(one["pending"])
        )
        if others and not self._takeover:
            raise Misuse(
                f"{self.shown}: group {self.group} has delivered {others[0][1]} entries to consumer {others[0][0]} "
                f"that it did not acknowledge: give consumer={others[0][0]}, or --takeover if that one is gone"
            )
        cursor = "0-0"
        while others:
            cursor, *_ = client.xautoclaim(self.key, self.group, self.consumer, 0, cursor, count=COUNT)
            if cursor in (b"0-0", "0-0"):
                break
        pending = self._delivered()
        if stored is not None:
            self._check_retention(stored, info or {}, group, pending)
            self._at = stored
        elif anew:
            self._at = (0, 0)
        else:
            self._at = _before(pending[0]) if pending else _id(group.get("last-delivered-id", b"0-0"))
        self._latest = stored
        self._acknowledge([one for one in pending if one <= self._at])  # the states hold them
        self._pending = deque(one for one in pending if one > self._at)

    def _group(self) -> dict[str, Any] | None:
        if not self.client.exists(self.key):
            return None
        return next((one for one in self.client.xinfo_groups(self.key) if one["name"] == self.group.encode()), None)

    def _delivered(self) -> list[Id]:
        """What was delivered to this consumer and not acknowledged."""
        found: list[Id] = []
        while True:
            low = "-" if not found else _text((found[-1][0], found[-1][1] + 1))
            part = self.client.xpending_range(self.key, self.group, low, "+", COUNT, consumername=self.consumer)
            found += [_id(one["message_id"]) for one in part]
            if len(part) < COUNT:
                return found

    def _check_retention(self, stored: Id, info: dict[str, Any], group: dict[str, Any], pending: list[Id]) -> None:
        """Refuses where entries behind the place are no longer there, as far as the server can tell."""
        first = _id(info["first-entry"][0]) if info.get("first-entry") else None
        if first is not None and first <= stored:
            return  # a stream is trimmed from its start
        gone = [one for one in pending if one > stored and (first is None or one < first)]
        lost = len(gone)
        delivered = _id(group.get("last-delivered-id", b"0-0"))
        added, read = info.get("entries-added"), group.get("entries-read")
        if not lost and (first is None or first > delivered) and isinstance(added, int) and isinstance(read, int):
            lost = added - read - int(info["length"])
        if lost > 0:
            raise Misuse(
                f"{self.shown}: {lost} entries after {_text(stored)}, where the states stand, were deleted before they "
                "were read: --from-start goes on with what there is"
            )

    # ---- reading ----------------------------------------------------------------------------------------------------

    def lines(self) -> Iterator[list[Line] | None]:
        """See `Source.lines`."""
        upto: Id | None = None  # what was delivered before, and must be read by its numbers; None: to be asked for
        while True:
            if upto is None:
                reached, group = self.reached(self._group)
                if reached and group is None:
                    raise OSError(f"{self.shown}: group {self.group} is gone: was the server emptied?")
                upto = _id(group["last-delivered-id"]) if reached else None
                entries: list[Any] | None = [] if reached else None
            elif self._at < upto:
                low, high = f"({_text(self._at)}", _text(upto)
                reached, entries = self.reached(lambda low=low, high=high: self._range(low, high))
                if reached and not entries:
                    self._at = upto  # the rest of it was deleted
            else:
                began = time.monotonic()
                reached, entries = self.reached(self._new)
                if reached and not entries and (left := PAUSE - (time.monotonic() - began)) > 0:
                    time.sleep(left)  # a server that does not wait when asked to
            if not reached:
                # what was on its way when the connection broke counts as delivered
                upto = None
                yield None
                self.control.wait(PATIENCE)
            elif entries:
                yield self._lines(entries)
            elif upto is not None and self._at >= upto:
                yield None

    def _range(self, low: str, high: str) -> list[Any]:
        return self.client.xrange(self.key, low, high, count=COUNT)

    def _new(self) -> list[Any]:
        wait = int(PAUSE * 1000)
        answer = self.client.xreadgroup(self.group, self.consumer, {self.key: ">"}, count=COUNT, block=wait)
        return answer[0][1] if answer else []

    def _lines(self, entries: list[Any]) -> list[Line]:
        lines = []
        again: list[Id] = []
        for name, fields in entries:
            entry = _id(name)
            if entry <= self._at:  # the group was set back: the states hold it
                again.append(entry)
                continue
            self._at = entry
            self._number += 1
            self._given.append((self._number, entry))
            if not self._pending or self._pending[-1] < entry:
                self._pending.append(entry)
            lines.append(_line(self._number, _text(entry), fields)._replace(received=entry[0] * 1_000_000))
        if again:
            self.reached(lambda: self._acknowledge(again))
        return lines

    # ---- places -----------------------------------------------------------------------------------------------------

    def after(self, line: Line) -> bytes:
        """See `Source.after`."""
        while self._given and self._given[0][0] <= line.number:
            self._latest = self._given.popleft()[1]
        if self._latest is None:
            return b""
        return json.dumps({"source": self.name, "entry": _text(self._latest)}).encode()

    def acknowledge(self, offset: bytes) -> None:
        """See `Source.acknowledge`; a server that does not answer is told with the next one."""
        told = told_by(offset, self.name)
        if told is None:
            return
        upto = _id(told["entry"])
        done: list[Id] = []
        while self._pending and self._pending[0] <= upto:
            done.append(self._pending.popleft())
        if done and not self.reached(lambda: self._acknowledge(done))[0]:
            self._pending.extendleft(reversed(done))

    def first(self, offsets: Sequence[bytes | None]) -> bytes | None:
        """See `Source.first`; where a shard has no place yet, what was not acknowledged is."""
        places = [told_by(offset, self.name) for offset in offsets]
        if any(place is None for place in places):
            return None
        return min(zip(places, offsets, strict=True), key=lambda pair: _id((pair[0] or {})["entry"]))[1]

    def behind(self, line: Line, offset: bytes | None) -> bool:
        """See `Source.behind`."""
        told = told_by(offset, self.name)
        return told is not None and _id(line.at) <= _id(told["entry"])

    def _acknowledge(self, entries: Sequence[Id]) -> None:
        for i in range(0, len(entries), COUNT):
            self.client.xack(self.key, self.group, *map(_text, entries[i : i + COUNT]))


class RedisSink(_Stream):
    """Forecasts as entries of a stream, with the fields id, item_id, origin and json.

    Args:
        text: redis://[NAME:PASSWORD@]HOST:PORT/DB?stream=NAME; rediss:// and unix:// too.
        control: of the run.

    Raises:
        Misuse: the server cannot be reached or the key is no stream.
    """

    def __init__(self, text: str, control: Control) -> None:
        super().__init__("--sink", text, control, ())

    def send(self, forecasts: Sequence[Forecast]) -> None:
        """Returns when the server has all of them; waits for one that does not answer.

        Raises:
            OSError: the server refuses them, or somebody asked to stop while it did not answer.
        """
        part: list[Forecast] = []
        size = 0
        for forecast in forecasts:
            part.append(forecast)
            size += len(forecast.line)
            if size >= CHUNK:
                self._send(part)
                part, size = [], 0
        if part:
            self._send(part)

    def _send(self, part: Sequence[Forecast]) -> None:
        # an answer that was lost is asked for again: the same ids twice, as after a kill
        while not self.reached(lambda: self._add(part))[0]:
            if not self.control.wait(PATIENCE):
                raise OSError(f"{self.shown}: did not answer until the stream was stopped")

    def _add(self, part: Sequence[Forecast]) -> None:
        with self.client.pipeline(transaction=True) as pipe:
            for one in part:
                fields = {"id": one.id, "item_id": one.item_id, "origin": one.origin, "json": one.line.rstrip(b"\n")}
                pipe.xadd(self.key, fields)
            pipe.execute()


def _line(number: int, at: str, fields: dict[bytes, bytes] | None) -> Line:
    if not fields:
        return Line(number, b"", at=at)
    too_long = BadLine("line.too_long", f"the entry has more than {LINE_LIMIT} bytes")
    if b"json" in fields:
        raw = fields[b"json"]
        if len(fields) > 1:
            other = next(name for name in fields if name != b"json").decode(errors="backslashreplace")
            return Line(number, raw[:LINE_LIMIT], BadLine("row.column", f"field {other!r:.60} beside json"), at=at)
        return Line(number, raw, at=at) if len(raw) <= LINE_LIMIT else Line(number, raw[:80], too_long, at=at)
    if sum(map(len, fields)) + sum(map(len, fields.values())) > LINE_LIMIT:
        return Line(number, next(iter(fields.values()))[:80], too_long, at=at)
    try:
        cells = {name.decode(): value.decode() for name, value in fields.items()}
    except UnicodeDecodeError:
        shown = {a.decode(errors="backslashreplace"): b.decode(errors="backslashreplace") for a, b in fields.items()}
        bad = BadLine("line.utf8", "the entry is not valid UTF-8")
        return Line(number, json.dumps(shown, ensure_ascii=False).encode(), bad, at=at)
    return Line(number, json.dumps(cells, ensure_ascii=False).encode(), fields=cells, at=at)


def _id(name: bytes | str) -> Id:
    text = name.decode() if isinstance(name, bytes) else name
    first, _, second = text.partition("-")
    return int(first), int(second or 0)


def _text(entry: Id) -> str:
    return f"{entry[0]}-{entry[1]}"


def _before(entry: Id) -> Id:
    return (entry[0], entry[1] - 1) if entry[1] else (entry[0] - 1, (1 << 64) - 1)


def _reason(error: Exception) -> str:
    if isinstance(error, redis.AuthenticationError):
        return "the server lets nobody in with this name and password"
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return f"the server does not answer ({' '.join(str(error).split())})"
    return f"the server refuses: {' '.join(str(error).split())}"
