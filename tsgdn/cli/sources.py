"""Where observations come from, and where in it a stream stands.

A source is asked for more when the rows before have been taken in and their forecasts are out: what is not asked for
stays in the pipe, the file or the broker. That is the back-pressure; there is no queue in between that could fill.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable
from urllib.parse import parse_qsl, unquote, urlsplit

from tsgdn.cli.lines import Line, Row, read_lines
from tsgdn.cli.main import Misuse

PAUSE = 0.05  # seconds without input after which a source says so
REDIS_OPTIONS = ("db", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")
"""What may stand in the address of a server, stream or no stream."""


class Control:
    """What a run and its sources and sinks tell each other.

    Args:
        log: takes a text, and "info", "warning" or "error" as `level`.

    Attributes:
        stopping: whether somebody asked to stop.
        chores: what must go on while somebody waits.
    """

    def __init__(self, log: Callable[..., None]) -> None:
        self.log = log
        self.stopping = False
        self.chores: Callable[[], None] = lambda: None
        self._told: dict[str, float] = {}

    def trouble(self, text: str) -> None:
        """Tells of something that may last, at most every ten seconds."""
        now = time.monotonic()
        if now - self._told.get(text, -10.0) >= 10:
            if len(self._told) > 100:
                self._told.clear()
            self._told[text] = now
            self.log(text, level="warning")

    def wait(self, seconds: int | float) -> bool:
        """Waits, and tells whether to go on waiting."""
        self.chores()
        if not self.stopping:
            time.sleep(seconds)
        return not self.stopping


@runtime_checkable
class Source(Protocol):
    """Lines in their order, each with a place behind it that can be gone back to.

    Attributes:
        name: for messages and for the store; without a password, and the same for the same source.
        format: of the lines where there is no choice, or None.
        broker: whether it keeps what was delivered until that is acknowledged.
        replayable: whether it can go back to a place.
    """

    name: str
    format: str | None
    broker: bool
    replayable: bool

    def resume(self, offset: bytes | None, *, anew: bool = False) -> None:
        """Goes to a place that `after` gave; None: where the source itself left off; `anew`: to its start.

        Raises:
            Misuse: the source is not the one that the place is in, or no longer holds what comes after it.
        """
        ...

    def lines(self) -> Iterator[list[Line] | None]:
        """What comes, as it comes; None when it pauses."""
        ...

    def after(self, line: Line) -> bytes:
        """The place behind a line that `lines` gave, empty if there is none. Lines are asked for in their order."""
        ...

    def acknowledge(self, offset: bytes) -> None:
        """What lies before the place need not be delivered again."""
        ...

    def first(self, offsets: Sequence[bytes | None]) -> bytes | None:
        """The place from which on something is new for one of several shards; None: where the source left off."""
        ...

    def behind(self, line: Line, offset: bytes | None) -> bool:
        """Whether a line lies before a place."""
        ...

    def close(self) -> None:
        """Lets go."""
        ...


class Pipe:
    """Standard input: what was read from it is gone from there."""

    name = "-"
    format: str | None = None
    broker, replayable = False, False

    def __init__(self) -> None:
        if sys.stdin is None:
            raise Misuse("--source -: standard input is closed")
        self._stream = getattr(sys.stdin, "buffer", sys.stdin)

    def resume(self, offset: bytes | None, *, anew: bool = False) -> None:
        """There is nowhere to go back to."""

    def lines(self) -> Iterator[list[Line] | None]:
        """See `Source.lines`."""
        return read_lines(self._stream, pause=PAUSE)

    def after(self, line: Line) -> bytes:
        """Nowhere."""
        return b""

    def acknowledge(self, offset: bytes) -> None:
        """Nobody waits for it."""

    def first(self, offsets: Sequence[bytes | None]) -> bytes | None:
        """Nowhere."""
        return None

    def behind(self, line: Line, offset: bytes | None) -> bool:
        """It never is: what was read is gone."""
        return False

    def close(self) -> None:
        """It belongs to the process."""


class _Numbered:
    """Lines that always come in the same order: the place is their number and a digest to know the last one again."""

    format: str | None = None
    broker, replayable = False, True

    def __init__(self, name: str, shown: str) -> None:
        self.name, self._shown = name, shown
        self._number, self._digest = 0, ""
        self._latest = b""

    def _parts(self) -> Iterator[list[Line] | None]:
        raise NotImplementedError

    def resume(self, offset: bytes | None, *, anew: bool = False) -> None:
        """See `Source.resume`; a file is compared while it is read."""
        told = None if anew else told_by(offset, self.name)
        if told is not None:
            self._number, self._digest, self._latest = int(told["line"]), str(told["digest"]), offset or b""

    def lines(self) -> Iterator[list[Line] | None]:
        """See `Source.lines`.

        Raises:
            Misuse: the line that should be the last one of the states is another, or the source ends before it.
        """
        met = self._number == 0
        for part in self._parts():
            if met or part is None:
                yield part
                continue
            lines: list[Line] = []
            for line in part:
                if line.number == self._number:
                    if _digest(line) != self._digest:
                        raise Misuse(
                            f"--source {self._shown}: line {line.number} is not the one that the states ended with: "
                            "give the file that was streamed, or --from-start"
                        )
                    met = True
                lines.append(line._replace(seen=True) if line.number <= self._number else line)
            yield lines
        if not met:
            raise Misuse(
                f"--source {self._shown}: the states hold its first {self._number} lines and it has fewer: "
                "give the file that was streamed, or --from-start"
            )

    def after(self, line: Line) -> bytes:
        """See `Source.after`; a last line without its end may still grow and is read again."""
        if line.whole:
            place = {"source": self.name, "line": line.number, "digest": _digest(line)}
            self._latest = json.dumps(place).encode()
        return self._latest

    def acknowledge(self, offset: bytes) -> None:
        """Nobody waits for it."""

    def first(self, offsets: Sequence[bytes | None]) -> bytes | None:
        """See `Source.first`."""
        places = [told_by(offset, self.name) for offset in offsets]
        if any(place is None for place in places):
            return None
        return min(zip(places, offsets, strict=True), key=lambda pair: int((pair[0] or {})["line"]))[1]

    def behind(self, line: Line, offset: bytes | None) -> bool:
        """See `Source.behind`."""
        told = told_by(offset, self.name)
        return told is not None and line.number <= int(told["line"])

    def close(self) -> None:
        """There is nothing open."""


def _digest(line: Line) -> str:
    return hashlib.blake2b(line.raw, digest_size=8).hexdigest()


class File(_Numbered):
    """The lines of a file.

    Args:
        text: its path.
        follow: wait for more at its end.

    Raises:
        Misuse: it cannot be read.
    """

    def __init__(self, text: str, *, follow: bool = False) -> None:
        path = Path(text).expanduser()
        if not path.exists() or path.is_dir():
            raise Misuse(f"--source {text}: {'is a folder' if path.is_dir() else 'no such file'}, expected a file")
        if not os.access(path, os.R_OK):
            raise Misuse(f"--source {text}: may not be read")
        super().__init__(str(path.resolve()), text)
        self.path = path
        self._follow = follow
        self._stream: BinaryIO = path.open("rb", buffering=0)

    def _parts(self) -> Iterator[list[Line] | None]:
        return read_lines(self._stream, pause=PAUSE, follow=self._follow)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class Replay(_Numbered):
    """The rows of a catalogued data set, a step of all its series at a time.

    Args:
        name: in the catalogue.
        predictor: whose frequency and variates they must have.

    Raises:
        Misuse: there is no such set, or it does not fit the model.
    """

    def __init__(self, name: str, predictor: Any) -> None:
        from tsgdn.data import catalog

        super().__init__(f"replay:{name}", f"replay:{name}")
        try:
            self._set = catalog.load(name) if len(predictor.variates) == 1 else catalog.load(name, multivariate=True)
        except (LookupError, ValueError, OSError) as error:
            text = error.args[0] if isinstance(error, KeyError) else error
            raise Misuse(f"--source replay:{name}: {text}") from None
        wrong = [
            one
            for one in self._set.series
            if one.clock != predictor.clock or len(one.variates) != len(predictor.variates)
        ]
        if wrong:
            raise Misuse(
                f"--source replay:{name}: series {wrong[0].item_id!r} has freq {wrong[0].freq!r} and "
                f"{len(wrong[0].variates)} variates, the model takes {predictor.freq!r} and {len(predictor.variates)}"
            )

    def _parts(self) -> Iterator[list[Any]]:
        number = 0
        for step in range(max(map(len, self._set.series), default=0)):
            batch = []
            for one in self._set.series:
                if step < len(one):
                    number += 1
                    values = one.values[:, step].tolist()
                    stamp = one.clock.timestamp(one.start, step)[()]
                    raw = json.dumps([one.item_id, str(stamp), values]).encode()
                    row = Row(Line(number, raw), one.item_id, stamp, values[0] if len(values) == 1 else values)
                    batch.append(Line(number, raw, row=row))
            yield batch


# ---- places and addresses -------------------------------------------------------------------------------------------


def told_by(offset: bytes | None, name: str) -> dict[str, Any] | None:
    """What a place says; None if it is in another source, as after a kill when the source has been changed since."""
    if not offset:
        return None
    told = json.loads(offset)
    return told if told.get("source") == name else None


class Address(NamedTuple):
    """Where a server is.

    Attributes:
        shown: for messages: no name, no password.
        scheme: before the colon.
        user: or None.
        password: or None.
        hosts: with their ports.
        path: without the slash before it.
        options: after the question mark.
    """

    shown: str
    scheme: str
    user: str | None
    password: str | None
    hosts: str
    path: str
    options: dict[str, str]


def read_address(option: str, text: str, known: tuple[str, ...]) -> Address:
    """An address that was given for an option.

    Args:
        option: its name, for messages.
        text: the address.
        known: names of options that may stand after the question mark.

    Raises:
        Misuse: it cannot be read. The text names no part that could belong to a password.
    """
    scheme = text.split("://")[0]
    unclear = Misuse(
        f"{option} {scheme}://...: the address cannot be read: expected {scheme}://[NAME:PASSWORD@]HOST:PORT/...; "
        "write what is special in a password as %xx"
    )
    try:
        parts = urlsplit(text)
        pairs = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        raise unclear from None
    hosts = parts.netloc.rpartition("@")[2]
    ports = [host.rpartition(":")[2] for host in hosts.split(",") if ":" in host.rpartition("]")[2]]
    if parts.fragment or "@" in parts.path + parts.query or not all(port.isdecimal() for port in ports):
        raise unclear
    name, colon, password = parts.netloc.rpartition("@")[0].partition(":")
    shown = f"{scheme}://{hosts}{parts.path}"
    for key, value in pairs:
        if key not in known:
            raise Misuse(f"{option} {shown}: unknown option {key!r:.60}, expected {', '.join(known)}")
        if not value or [other for other, _ in pairs].count(key) > 1:
            raise Misuse(f"{option} {shown}: {key} is empty or comes twice, expected one value")
    return Address(
        shown,
        scheme,
        unquote(name) or None,
        unquote(password) if colon else None,
        hosts,
        unquote(parts.path).removeprefix("/"),
        dict(pairs),
    )


def without_password(text: str) -> str:
    """An address for messages, whatever is wrong with it; a path as it is."""
    if "://" not in text:
        return text
    scheme, rest = text.split("://", 1)
    plain = rest.rpartition("@")[2].split("?")[0].split("#")[0]
    ports = [host.rpartition(":")[2] for host in plain.split("/")[0].split(",") if ":" in host.rpartition("]")[2]]
    safe = rest.count("@") <= 1 and all(port.isdecimal() for port in ports)
    return f"{scheme}://{plain}" if safe else f"{scheme}://..."


def open_source(text: str, predictor: Any, control: Control, *, follow: bool = False, takeover: bool = False) -> Source:
    """The source that --source names; `resume` it before the first line.

    Raises:
        Misuse: it cannot be used; nothing has been read.
    """
    if follow and (text == "-" or text.startswith("replay:") or "://" in text):
        what = "a broker is always followed" if "://" in text else "a pipe is read to its end"
        raise Misuse(f"--follow with --source {without_password(text)}: only a file can be followed; {what}")
    if text == "-":
        return Pipe()
    if text.startswith("replay:"):
        return Replay(text.removeprefix("replay:"), predictor)
    if text.startswith(("redis://", "rediss://", "unix://")):
        try:
            from tsgdn.cli.redis_streams import RedisSource
        except ModuleNotFoundError as error:
            raise _lacking(error, "redis", text) from None
        return RedisSource(text, control, takeover=takeover)
    if text.startswith("kafka://"):
        try:
            from tsgdn.cli.kafka import KafkaSource
        except ModuleNotFoundError as error:
            raise _lacking(error, "kafka", text) from None
        return KafkaSource(text, control)
    if "://" in text:
        raise Misuse(
            f"--source {without_password(text)!r} is an address of no kind that is known: expected a local path, "
            "redis:// or kafka://"
        )
    return File(text, follow=follow)


def _lacking(error: ModuleNotFoundError, extra: str, text: str) -> Exception:
    if (error.name or "").split(".")[0] not in ("redis", "confluent_kafka"):
        return error
    scheme = text.split("://")[0]
    return Misuse(f"--source {scheme}://: {error.name} is not installed; pip install 'tsgdn[{extra}]'")
