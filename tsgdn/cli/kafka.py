"""A Kafka topic as a source (https://docs.confluent.io/platform/current/clients/librdkafka/html/).

All partitions are assigned at the places that lie with the states, so reading begins exactly there. The consumer joins
no group: nobody moves partitions away from the states of their series, and there is no deadline for the next poll that
a slow sink could miss. What librdkafka fetches ahead is bounded; when that is full it stops fetching. Places are
committed to the group so that the usual tools show the lag.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import confluent_kafka  # pyright: ignore[reportMissingImports]
from confluent_kafka import (  # pyright: ignore[reportMissingImports]
    OFFSET_BEGINNING,
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    TopicPartition,
)

from tsgdn.cli.lines import LINE_LIMIT, BadLine, Line
from tsgdn.cli.main import Misuse
from tsgdn.cli.sources import PAUSE, Control, read_address, told_by

COUNT = 1024  # messages that are taken over at once
AHEAD_KIB = 16 * 1024  # that librdkafka may fetch before they are asked for
COMMIT_EVERY = 1.0  # seconds
NEW_PARTITIONS_EVERY = 60.0  # seconds
OPTIONS = ("group", "security.protocol", "sasl.mechanism", "ssl.ca.location")
_OUT_OF_RANGE = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)


class KafkaSource:
    """The messages of a topic, each a JSON record.

    Args:
        text: kafka://[NAME:PASSWORD@]HOST:PORT,../TOPIC?group=GROUP. A password is sent by SASL, under TLS unless
            security.protocol says otherwise.
        control: of the run.

    Raises:
        Misuse: no broker can be reached, or there is no such topic.
    """

    format: str | None = "jsonl"
    broker, replayable = True, True

    def __init__(self, text: str, control: Control) -> None:
        address = read_address("--source", text, OPTIONS)
        self.topic, self.control = address.path, control
        self.shown = f"--source {address.shown}"
        if not address.hosts or not self.topic or "/" in self.topic:
            raise Misuse(f"{self.shown}: which topic? expected kafka://HOST:PORT/TOPIC")
        group = address.options.get("group", "tsgdn")
        self.name = f"{address.shown}?group={group}"
        silent = logging.getLogger("tsgdn.kafka")  # librdkafka would write to stderr itself
        silent.addHandler(logging.NullHandler())
        silent.propagate = False
        settings: dict[str, Any] = {
            "bootstrap.servers": address.hosts,
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",  # never anywhere else than where the states stand
            "queued.max.messages.kbytes": AHEAD_KIB,
            "queued.min.messages": 10_000,
            "error_cb": self._trouble,
            "logger": silent,
        }
        if address.user is not None:
            settings |= {
                "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": address.user,
                "sasl.password": address.password or "",
            }  # fmt: skip
        settings |= {name: value for name, value in address.options.items() if name != "group"}
        self._next: dict[int, int] = {}  # by partition, behind the last place that was asked for
        self._given: deque[tuple[int, int, int]] = deque()  # line, partition, offset
        self._number = 0
        self._uncommitted: dict[int, int] = {}
        self._committed = self._looked = time.monotonic()
        try:
            self._consumer = Consumer(settings)
        except (KafkaException, ValueError) as error:
            raise Misuse(f"{self.shown}: {_reason(error)}") from None
        try:
            self._partitions = self._there()
        except KafkaException as error:
            self.close()
            raise Misuse(f"{self.shown}: {_reason(error)}") from None

    def _trouble(self, error: KafkaError) -> None:
        self.control.trouble(f"{self.shown}: {error.str()}")

    def _there(self) -> list[int]:
        topic = self._consumer.list_topics(self.topic, timeout=10).topics[self.topic]
        if topic.error is not None:
            raise KafkaException(topic.error)
        return sorted(topic.partitions)

    def resume(self, offset: bytes | None, *, anew: bool = False) -> None:
        """See `Source.resume`."""
        told = None if anew else told_by(offset, self.name)
        try:
            if told is not None:
                self._next = {int(partition): int(place) for partition, place in told["next"].items()}
                for partition, place in self._next.items():
                    self._check_retention(partition, place)
            elif not anew:
                asked = [TopicPartition(self.topic, partition) for partition in self._partitions]
                committed = self._consumer.committed(asked, timeout=10)
                self._next = {one.partition: one.offset for one in committed if one.offset >= 0}
            self._consumer.assign([self._place(partition) for partition in self._partitions])
        except KafkaException as error:
            raise Misuse(f"{self.shown}: {_reason(error)}") from None

    def _place(self, partition: int) -> TopicPartition:
        return TopicPartition(self.topic, partition, self._next.get(partition, OFFSET_BEGINNING))

    def _check_retention(self, partition: int, place: int) -> None:
        if partition not in self._partitions:
            raise Misuse(
                f"{self.shown}: the states hold partition {partition} and there is none: give the topic that was read, "
                "or --from-start"
            )
        low, high = self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=10)
        if not low <= place <= high:
            remedy = "--from-start goes on with what there is" if place < low else "give the topic that was read"
            raise Misuse(
                f"{self.shown}: the states end before offset {place} of partition {partition}, which holds {low} to "
                f"{high}: {remedy}"
            )

    def lines(self) -> Iterator[list[Line] | None]:
        """See `Source.lines`.

        Raises:
            OSError: a broker refuses, or what comes next was deleted.
        """
        while True:
            try:
                first = self._consumer.poll(PAUSE)
                more = self._consumer.consume(COUNT - 1, 0) if first is not None else []
                if time.monotonic() - self._looked > NEW_PARTITIONS_EVERY:
                    self._look()
            except KafkaException as error:
                raise OSError(f"{self.shown}: {_reason(error)}") from None
            lines = [line for message in (first, *more) if message is not None and (line := self._line(message))]
            self._commit()
            yield lines or None

    def _look(self) -> None:
        """Partitions may be added while this runs: their rows must not go unread."""
        self._looked = time.monotonic()
        try:
            there = self._there()
        except KafkaException as error:
            self.control.trouble(f"{self.shown}: {_reason(error)}")
            return
        added = [partition for partition in there if partition not in self._partitions]
        if added:
            self._partitions += added
            self._consumer.incremental_assign([self._place(partition) for partition in added])
            self.control.log(f"{self.shown}: {len(added)} more partitions, {len(self._partitions)} in all")

    def _line(self, message: confluent_kafka.Message) -> Line | None:
        error = message.error()
        partition, offset = message.partition(), message.offset()
        if error is not None:
            if error.code() in _OUT_OF_RANGE:
                raise OSError(
                    f"{self.shown}: offset {offset} of partition {partition}, where the states stand, is not there any "
                    "more: --from-start goes on with what there is"
                )
            if not error.retriable() and error.code() != KafkaError._PARTITION_EOF:
                raise OSError(f"{self.shown}: {error.str()}")
            self._trouble(error)
            return None
        if partition is None or offset is None:
            return None
        self._number += 1
        self._given.append((self._number, partition, offset))
        raw, at = message.value() or b"", f"{partition}:{offset}"  # without a value: a record that was deleted
        if len(raw) > LINE_LIMIT:
            too_long = BadLine("line.too_long", f"the message has more than {LINE_LIMIT} bytes")
            return Line(self._number, raw[:80], too_long, at=at)
        kind, milliseconds = message.timestamp()
        received = None if kind == TIMESTAMP_NOT_AVAILABLE else milliseconds * 1_000_000
        return Line(self._number, raw, at=at, received=received)

    def after(self, line: Line) -> bytes:
        """See `Source.after`."""
        while self._given and self._given[0][0] <= line.number:
            _, partition, offset = self._given.popleft()
            self._next[partition] = offset + 1
        places = {str(partition): place for partition, place in sorted(self._next.items())}
        return json.dumps({"source": self.name, "next": places}).encode() if places else b""

    def acknowledge(self, offset: bytes) -> None:
        """See `Source.acknowledge`; is told to the group now and then."""
        told = told_by(offset, self.name)
        if told is not None:
            self._uncommitted = {int(partition): int(place) for partition, place in told["next"].items()}
        self._commit()

    def first(self, offsets: Sequence[bytes | None]) -> bytes | None:
        """See `Source.first`; where a shard has no place yet, what the group has not committed is."""
        places = [told_by(offset, self.name) for offset in offsets]
        if not places or any(place is None for place in places):
            return None
        known = [(place or {})["next"] for place in places]
        least = {
            partition: min(int(place[partition]) for place in known)
            for partition in known[0]
            if all(partition in place for place in known)
        }
        return json.dumps({"source": self.name, "next": least}).encode()

    def behind(self, line: Line, offset: bytes | None) -> bool:
        """See `Source.behind`."""
        told = told_by(offset, self.name)
        partition, _, place = line.at.partition(":")
        return told is not None and int(place) < int(told["next"].get(partition, 0))

    def _commit(self, *, last: bool = False) -> None:
        if not self._uncommitted or not (last or time.monotonic() - self._committed >= COMMIT_EVERY):
            return
        places = [TopicPartition(self.topic, partition, place) for partition, place in self._uncommitted.items()]
        self._uncommitted, self._committed = {}, time.monotonic()
        try:
            if last:
                self._consumer.commit(offsets=places, asynchronous=False)
            else:
                self._consumer.commit(offsets=places, asynchronous=True)
        except KafkaException as error:
            self.control.trouble(f"{self.shown}: {_reason(error)}")

    def close(self) -> None:
        """Tells the group the last place, and lets go."""
        self._commit(last=True)
        self._consumer.close()


def _reason(error: Exception) -> str:
    inner: Any = error.args[0] if error.args else error
    text = inner.str() if isinstance(inner, KafkaError) else str(inner)
    return " ".join(text.split())
