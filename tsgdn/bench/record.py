"""The row of a results.csv: what was measured, of what, where and on which code. Rows are only ever added."""

import csv
import io
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

COLUMNS: tuple[str, ...] = (
    "commit", "dirty", "date", "hardware", "torch", "triton", "dtype", "seed", "config",
    "metric", "unit", "value", "p20", "p80", "n",
)  # fmt: skip


def _git(*arguments: str) -> str | None:
    """What git says about this package's code; None outside a repository."""
    where = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def hardware(device: str = "cpu") -> str:
    """The GPU's name if `device` is one, else the processor and the number of cores that may be used."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(torch.device(device))
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Where a number comes from: commit, whether code differs from it, date, hardware, versions.

    Results themselves do not make the code dirty, or every second row would be. On a machine that has the code without
    its repository the variable TSGDN_COMMIT names the commit; a plus sign at its end says that the code differs.
    """
    if told := os.environ.get("TSGDN_COMMIT", "").strip():  # before git: the code may lie inside another repository
        head, changed = told.rstrip("+"), told[len(told.rstrip("+")) :]
    elif head := _git("rev-parse", "HEAD"):
        changed = _git("status", "--porcelain", "--", ":/", ":(top,exclude,glob)**/results.csv")
    else:
        changed = None
    return {
        "commit": (head or "unknown")[:12],
        "dirty": "unknown" if changed is None else int(bool(changed)),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "hardware": hardware(device),
        "torch": _version("torch"),
        "triton": _version("triton"),
    }


def row(
    *,
    metric: str,
    value: float | int | str,
    unit: str = "",
    n: int | str = "",
    p20: float | int | str = "",
    p80: float | int | str = "",
    seed: int | str = "",
    config: str = "",
    dtype: str = "float32",
    device: str = "cpu",
    origin: Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """One measurement.

    Args:
        metric: what was measured, in `unit`; `value` may be a word such as "OOM".
        value: the number, or the median of `n`.
        unit: empty for a pure number.
        n: how many measurements or windows stand behind the value.
        p20: 20th percentile of the measurements, where there are several.
        p80: their 80th percentile.
        seed: of the run.
        config: preset or file that was run.
        dtype: of the model's products.
        device: where it ran.
        origin: `provenance()`, taken once for many rows; None = taken now.
        **keys: the question's own columns, e.g. task and model.
    """
    clash = set(keys) & set(COLUMNS)
    if clash:
        raise ValueError(f"{sorted(clash)} are columns of every row already; name the question's own otherwise")
    found = dict(provenance(device) if origin is None else origin)
    measured = {
        "dtype": dtype, "seed": seed, "config": config, "metric": metric, "unit": unit, "value": value, "p20": p20,
        "p80": p80, "n": n,
    }  # fmt: skip
    return {**{column: {**found, **measured}[column] for column in COLUMNS}, **keys}


def append(path: str | Path, *rows: Mapping[str, Any]) -> None:
    """Adds rows to a results.csv, all or none, whoever else is writing to it.

    Raises:
        ValueError: the rows' columns are not those of the file; start another file, or fill the missing ones.
    """
    if not rows:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as file:
        _lock(file)
        file.seek(0)
        text = file.read()
        header = next(csv.reader(io.StringIO(text)), None) or list(rows[0])
        for given in rows:
            if set(given) != set(header):
                odd = sorted(set(given) ^ set(header))
                raise ValueError(f"{path}: columns {odd} are in the row or the file but not in both; use another file")
        out = io.StringIO()
        writer = csv.DictWriter(out, header, lineterminator="\n")
        if not text:
            writer.writeheader()
        elif not text.endswith("\n"):
            out.write("\n")  # a writer was killed in the middle of a line
        writer.writerows(rows)
        file.write(out.getvalue())
        file.flush()
        os.fsync(file.fileno())


def _lock(file: Any) -> None:
    """Waits for the file; the lock ends with it. Where the system has no such locks, one writer at a time is on you."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX)
