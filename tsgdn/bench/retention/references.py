"""The closed-form references beside the numbers that they are known to give: is the suite what it claims to be?"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tsgdn.data.retention import COMMON_PROBE, RARE_PROBE, SUITE_VERSION, block
from tsgdn.evaluation.retention import (
    binding,
    effect_retention,
    effects,
    hand_set_memory,
    probes,
    recall,
    squared_errors,
    switching_errors,
    topology,
)


class Check(NamedTuple):
    """One number: of whom, on what, and between which bounds it is expected."""

    task: str
    name: str
    gap: int
    metric: str
    value: float
    low: float
    high: float


KNOWN = {
    ("T2", 256): "filter .99/.997 knn .99/.99 attention .99/.99 ridge .70/.92 rls .65/.93",
    ("T3", 256): "filter .99/.997 knn .99/.99 attention .99/.99 ridge .70/.92 rls .65/.93",
    ("T5", 512): "filter .99/.997 knn .99/.28 attention .99/.905 ridge .68/.38 rls -.16/.91",
    ("T1", 256): "filter .995/ knn .99/ ridge .98/",
    ("T4", 0): "filter .962/ knn .96/ ridge .65/",
    ("T6", 256): "filter .99/ knn_channel .99/ ridge .34/ ridge_channel .84/",
}
"""Ret on rare and on common probes, 400 sequences; at fewer the scatter grows with its root."""
TOLERANCE = 0.03


def measure(sequences: int = 200) -> list[Check]:
    """All references at the settings for which numbers are known; about 20 s."""
    found = []
    slack = TOLERANCE * (400 / sequences) ** 0.5
    for (task, gap), text in KNOWN.items():
        words = text.split()
        for name, expected in zip(words[::2], words[1::2], strict=True):
            for metric, value, want in zip(
                ("ret_rare", "ret_common"), _recall(task, gap, name, sequences), expected.split("/"), strict=True
            ):
                if want:
                    room = slack * max(1.0, 1 - float(want))
                    found.append(Check(task, name, gap, metric, value, float(want) - room, float(want) + room))
    found += list(_dynamics(max(40, sequences // 4), slack))
    memory = hand_set_memory(keys="random", common=8, trials=sequences)
    found.append(Check("4.2", "delta, random keys", 512, "rare_coefficient", memory.rare, 0.42, 0.58))
    return found


def stamped(checks: list[Check], origin: dict[str, Any], preset: str) -> list[dict[str, Any]]:
    """Checks as cells' rows are made of: plain values."""
    return [check._asdict() | {"origin": origin, "suite": SUITE_VERSION, "preset": preset} for check in checks]


def _recall(task: str, gap: int, name: str, sequences: int) -> tuple[float, float]:
    error, base = np.zeros(2), np.zeros(2)
    for index in range(sequences // 50):
        batch = block(task, index=index, seed=2, split="test", batch=50, gap=gap)
        asked = probes(batch)
        said = recall(batch, name)
        for k, kind in enumerate((RARE_PROBE, COMMON_PROBE)):
            error[k] += squared_errors(said, asked.truth, asked.kind == kind).sum()
            base[k] += squared_errors(np.zeros_like(asked.truth), asked.truth, asked.kind == kind).sum()
    ret = 1 - error / np.maximum(base, 1e-300)
    return float(ret[0]), float(ret[1])


def _dynamics(sequences: int, slack: float) -> Iterator[Check]:
    batch = block("T7", index=0, seed=2, split="test", batch=sequences, gap=256, do="none")
    rare = effects(batch, "filter")[:, -1], batch.truth["effects"][:, -1].astype(np.float64)
    yield Check("T7", "filter", 256, "ret_rare", effect_retention(*rare), 0.977 - slack, 0.977 + slack)
    batch = block("T8", index=0, seed=2, split="test", batch=sequences, gap=256)
    found = binding(topology(batch, "filter"), batch.truth["topology"].astype(np.float64))
    yield Check("T8", "filter", 256, "ret_rare", found.ret, 0.958 - slack, 0.958 + slack)
    yield Check("T8", "filter", 256, "driver_accuracy", found.driver_accuracy, 0.99, 1.0)
    batch = block("T9", index=0, seed=2, split="test", batch=8, gap=2048)
    for name, want, room in (("oracle", 1.0, 0.25), ("filter", 1.1, 0.3), ("zero", 5.2, 1.6)):
        errors, _ = switching_errors(batch, name)
        yield Check("T9", name, 2048, "error", float(errors.mean()), want - room, want + room)
