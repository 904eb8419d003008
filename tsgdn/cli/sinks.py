"""Where forecasts go. `send` returns when they are out of this process: until then nothing more is read."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tsgdn.cli.main import Misuse
from tsgdn.cli.sources import Control, without_password

RECORD = b'{"id":"'  # what every line begins with


class Forecast(NamedTuple):
    """One forecast, ready to go.

    Attributes:
        id: the same for the same forecast, whoever makes it.
        item_id: of the series.
        origin: its last step that was seen.
        line: the record as JSON, with a newline.
    """

    id: str
    item_id: str
    origin: str
    line: bytes


@runtime_checkable
class Sink(Protocol):
    """Takes the forecasts of a tick."""

    def send(self, forecasts: Sequence[Forecast]) -> None:
        """Returns when they have been handed on; after a kill those of the last tick come again, with the same ids.

        Raises:
            OSError: they could not be; BrokenPipeError: nobody wants any more.
        """
        ...

    def close(self) -> None:
        """Lets go."""
        ...


class Stdout:
    """Standard output."""

    def __init__(self) -> None:
        self._out: Any = getattr(sys.stdout, "buffer", sys.stdout)

    def send(self, forecasts: Sequence[Forecast]) -> None:
        """See `Sink.send`."""
        if self._out is None:
            raise OSError("--sink -: standard output is closed")
        self._out.write(b"".join(one.line for one in forecasts))
        self._out.flush()

    def close(self) -> None:
        """It belongs to the process."""


class Append:
    """The end of a file.

    Args:
        text: its path; it is made if there is none. What a kill has cut off in its last line is removed: that forecast
            comes again.

    Raises:
        Misuse: it cannot be written, or its last line is not one of ours.
    """

    def __init__(self, text: str) -> None:
        self.path = Path(text).expanduser()
        if self.path.is_dir():
            raise Misuse(f"--sink {text}: is a folder, expected a file")
        try:
            self._out = self.path.open("ab", buffering=0)
            if self.path.is_file():
                self._mend(text)
        except OSError as error:
            raise Misuse(f"--sink {text}: {error.strerror}") from None

    def _mend(self, text: str) -> None:
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            tail, at = b"", end
            while at > 0 and b"\n" not in tail:
                at = max(0, at - (1 << 16))
                file.seek(at)
                tail = file.read(end - at)
        torn = tail.rpartition(b"\n")[2]
        if not torn:
            return
        if not torn.startswith(RECORD) and not RECORD.startswith(torn):
            self._out.close()
            raise Misuse(f"--sink {text}: its last line is no forecast and has no end: give another file, or end it")
        self._out.truncate(end - len(torn))

    def send(self, forecasts: Sequence[Forecast]) -> None:
        """See `Sink.send`."""
        rest = memoryview(b"".join(one.line for one in forecasts))
        while rest:
            rest = rest[self._out.write(rest) :]

    def close(self) -> None:
        """Closes the file."""
        self._out.close()


class Null:
    """Nowhere."""

    def send(self, forecasts: Sequence[Forecast]) -> None:
        """See `Sink.send`."""

    def close(self) -> None:
        """There is nothing open."""


def open_sink(text: str, control: Control) -> Sink:
    """The sink that --sink names.

    Raises:
        Misuse: it cannot be used.
    """
    if text == "-":
        return Stdout()
    if text == "null":
        return Null()
    if text.startswith(("redis://", "rediss://", "unix://")):
        try:
            from tsgdn.cli.redis_streams import RedisSink
        except ModuleNotFoundError as error:
            if error.name != "redis":
                raise
            raise Misuse("--sink redis://: redis is not installed; pip install 'tsgdn[redis]'") from None
        return RedisSink(text, control)
    if "://" in text:
        raise Misuse(f"--sink {without_password(text)}: expected -, a file, redis:// or null")
    return Append(text)
