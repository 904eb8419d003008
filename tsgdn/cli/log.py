"""What a long-running command tells on stderr."""

import datetime
import json
import sys
import time
from collections.abc import Callable


class Log:
    """Lines on stderr, for people or for machines.

    Args:
        form: "text", or "json": an object per line with time, level and message, and what else is known.
        name: of the command.
    """

    def __init__(self, form: str, name: str = "stream") -> None:
        self.form, self.name = form, name

    def __call__(self, text: str, *, level: str = "info", **more: object) -> None:
        """Tells one thing; `more` is for machines alone."""
        if self.form == "json":
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            record = {"time": now, "level": level, "message": text, **more}
            print(json.dumps(record), file=sys.stderr, flush=True)
            return
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
        print(f"tsgdn {self.name}: {shown}", file=sys.stderr, flush=True)


class Progress:
    """Tells of a long recovery, now and then."""

    def __init__(self, what: str, log: Callable[..., None]) -> None:
        self.what, self.log, self.told = what, log, time.monotonic()

    def __call__(self, number: int) -> None:
        """So far."""
        now = time.monotonic()
        if now - self.told > 2:
            self.told = now
            self.log(f"{number} {self.what}")
