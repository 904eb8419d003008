"""A certificate of parity: streams, cuts, copies and devices, tried on a model and compared with one pass.

`parity.json` beside the weights holds, for each part that was tried, the largest error that was found and its bound.
Errors are relative: of a forecast to the scale that the model works in, of a leaf of the state to its largest entry (at
least 1). The values carry missing cells, silent patches and a variate that begins late.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsgdn.checks import split
from tsgdn.data.clock import Clock
from tsgdn.data.series import Series
from tsgdn.model.artefact import fingerprint, write_whole
from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import map_state, same_sizes, state_bytes, state_leaves
from tsgdn.streaming.exact import rows_are_independent
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.types import Batch

FILE = "parity.json"
FORMAT = 1
LIMIT = 1 << 20  # bytes
BOUNDS = {"float64": 1e-12, "float32": 1e-5}
DEVICES_APART = 1e-4  # float32 on two devices: sums in another order
CUTS = {"1": (1,), "3": (3,), "7": (7,), "random": None}
LONG = (1000, 4096)
SILENCE = 1_000_000  # patches
BUCKETS = {"cpu": 16, "cuda": 64}


class Check(NamedTuple):
    """One part on one device in one number format.

    Attributes:
        part: what was compared.
        dtype: of the model.
        device: where it ran.
        kernel: "torch" or "triton"; empty where it makes no difference.
        error: the largest that was found.
        bound: that it had to keep; 0 = the same bits.
        worst: where the largest error was found.
    """

    part: str
    dtype: str
    device: str
    kernel: str
    error: float
    bound: float
    worst: str

    @property
    def ok(self) -> bool:
        """Whether the bound is kept; no number at all does not keep it."""
        return self.error <= self.bound


class Certificate(NamedTuple):
    """All that was tried on one model, and where.

    Attributes:
        checks: in the order in which they ran.
        fingerprint: of configuration and weights.
        bucket: per device, rows of a call with which neighbours change no bit (`exact=True`); 0 = not proven.
        state_bytes: of one series before its first value.
        environment: versions, devices, threads.
    """

    checks: tuple[Check, ...]
    fingerprint: str
    bucket: dict[str, int]
    state_bytes: int
    environment: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every bound is kept."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_json(self) -> str:
        """As `parity.json` holds it."""
        checks = [{**check._asdict(), "ok": check.ok} for check in self.checks]
        found = {"format": FORMAT, "ok": self.ok, **self._asdict(), "checks": checks}
        return json.dumps(found, indent=1, allow_nan=True) + "\n"


def certify(
    model: Forecaster,
    *,
    freq: str,
    calendar: bool,
    variates: Sequence[str] = ("target",),
    targets: int | None = None,
    devices: Sequence[str] = ("cpu",),
    long: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda part: None,
) -> Certificate:
    """Tries the law on a model: cuts, silence, the live predictor and its copies, kernels and devices.

    Args:
        model: is copied, not changed.
        freq: step of the series.
        calendar: whether the first known features are the calendar's.
        variates: names of the V variates.
        targets: leading variates that are forecast; None = all.
        devices: to try, such as "cpu" and "cuda".
        long: lengths of 1,000 and 4,096 steps too; takes minutes.
        seed: of values and random cuts.
        progress: is told each part before it runs.
    """
    trial = _Trial(freq, calendar, tuple(variates), targets, seed)
    found: list[Check] = []
    twins: dict[tuple[str, str], Forecaster] = {}
    for device in devices:
        for dtype in ("float64", "float32"):
            twins[device, dtype] = copy.deepcopy(model).to(device, getattr(torch, dtype)).eval()
    for (device, dtype), twin in twins.items():
        for kernel in ("torch", "triton") if device != "cpu" and dtype == "float32" else ("torch",):
            with _kernel(kernel):
                for part, run in (
                    ("cuts", lambda twin=twin, dtype=dtype: trial.cuts(twin, long=long and dtype == "float32")),
                    ("silence", lambda twin=twin: trial.silence(twin)),
                    ("predictor", lambda twin=twin: trial.predictor(twin)),
                    ("warm-up", lambda twin=twin: trial.warm_up(twin)),
                ):
                    progress(f"{part}, {dtype} on {device}, {kernel}")
                    error, worst = run()
                    found.append(Check(part, dtype, device, kernel, error, BOUNDS[dtype], worst))
                if dtype == "float32":
                    progress(f"copies, {dtype} on {device}, {kernel}")
                    error, worst = trial.copies(twin)
                    found.append(Check("copies", dtype, device, kernel, error, 0.0, worst))
    if "cpu" in devices:
        for device in devices:
            if device != "cpu":
                progress(f"{device} beside cpu")
                error, worst = trial.apart(twins[device, "float32"], twins["cpu", "float32"])
                found.append(Check(f"{device} beside cpu", "float32", device, "", error, DEVICES_APART, worst))
    bucket = {}
    for device in devices:
        progress(f"neighbours on {device}")
        rows = BUCKETS.get(torch.device(device).type, BUCKETS["cuda"])
        bucket[device] = rows if rows_are_independent(twins[device, "float32"], rows, len(variates)) else 0
    return Certificate(
        tuple(found),
        fingerprint(model),
        bucket,
        state_bytes(model.initial_state(1, len(variates))),
        _environment(devices),
    )


def write(certificate: Certificate, folder: str | Path) -> Path:
    """Puts `parity.json` beside the weights."""
    path = Path(folder) / FILE
    write_whole(path, certificate.to_json().encode())
    return path


def check(folder: str | Path, model: Forecaster, device: torch.device | str) -> None:
    """Reads the certificate beside a model, where there is one, and warns of what it does not vouch for.

    Args:
        folder: of the model.
        model: that was read from it.
        device: where it is going to run.

    Raises:
        ValueError: the file is no certificate, or that of another model.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return
    again = f"run `tsgdn verify --model {folder} --write`"
    try:
        told = json.loads(path.read_bytes()) if path.stat().st_size <= LIMIT else {}
        whose, checks = told["fingerprint"], [(one["device"], one["ok"]) for one in told["checks"]]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no certificate of parity; {again}") from error
    if whose != fingerprint(model):
        raise ValueError(f"{path} was made for another model; {again}")
    kind = torch.device(device).type
    here = [ok for name, ok in checks if torch.device(name).type == kind]
    if not here:
        warnings.warn(f"{path} says nothing of {kind}; {again} here", stacklevel=3)
    elif not all(here):
        warnings.warn(f"{path} says that streams of this model differ from one pass on {kind}", stacklevel=3)


class _Trial:
    """Inputs of one model's kind, and what is compared on them."""

    def __init__(self, freq: str, calendar: bool, variates: tuple[str, ...], targets: int | None, seed: int) -> None:
        self.clock, self.calendar, self.variates, self.targets = Clock(freq), calendar, variates, targets
        self.seed = seed

    # ---- the model itself

    def batch(self, model: Forecaster, steps: int, series: int = 2) -> Batch:
        """Walks with a season; a tenth of the cells missing, a silence beyond what makes tokens, a late variate."""
        rng = np.random.default_rng([self.seed, steps])
        V, P = len(self.variates), model.patch_size
        season = np.sin(2 * np.pi * np.arange(steps) / max(model.seasons[-1], 2))
        values = 100 + 5 * season + rng.normal(size=(series, V, steps)).cumsum(-1)
        observed = rng.random(values.shape) > 0.1
        observed[-1, -1, : min(steps, P + 1)] = False
        if steps > 100:
            begin = steps // 3
            observed[0, :, begin : begin + (model.gap_tokens + 3) * P] = False
        known = rng.normal(size=(series, model.known_features, steps + model.span))
        sizes = model.config["static_cardinalities"]
        static = np.stack([rng.integers(0, size + 1, series) for size in sizes], 1) if len(sizes) else None
        weight = model.head.hidden.weight
        return Batch(
            torch.from_numpy(np.where(observed, values, 0.0)),
            torch.from_numpy(observed),
            torch.from_numpy(known).to(weight.dtype) if model.known_features else None,
            static=None if static is None else torch.from_numpy(static),
        ).to(weight.device)

    @torch.no_grad()
    def cuts(self, model: Forecaster, *, long: bool) -> tuple[float, str]:
        """One call against many: forecasts of every token, and the end state."""
        P = model.patch_size
        worst = _Worst()
        rng = np.random.default_rng(self.seed)
        for steps in (0, 1, P - 1, P, P + 1, 3 * P + 5, *(LONG if long else ())):
            batch = self.batch(model, steps)
            whole, end = model(batch)
            for name, pattern in CUTS.items():
                if steps in LONG and pattern is not None and pattern[0] < 7:
                    continue  # a call per step costs minutes
                pieces, state, at = [], None, 0
                most = 512 if steps in LONG else 2 * P
                pattern = pattern or (*(int(x) for x in rng.integers(0, most, 1 + steps // 4)), 1)
                for piece in split(batch.values, pattern, -1):
                    quantiles, state = model(_part(batch, at, piece.shape[-1], model.span), state)
                    pieces.append(quantiles)
                    at += piece.shape[-1]
                where = f"{steps} steps cut by {name}"
                if not pieces:  # no steps: one call of length 0
                    quantiles, state = model(batch)
                    pieces.append(quantiles)
                valid = torch.cat([one.valid for one in pieces], 1)
                if not torch.equal(valid, whole.valid):
                    return float("inf"), f"{where}: other tokens are valid"
                for token in range(valid.shape[1]):
                    got = torch.cat([one.values for one in pieces], 2)[:, :, token]
                    error = _error(got, whole.values[:, :, token], valid[:, token, None, None, None])
                    worst.see(error, f"{where}, step {(token + 1) * P}")
                for name_, error in _state_errors(state, end):
                    worst.see(error, f"{where}, state {name_}")
        return worst.found

    @torch.no_grad()
    def silence(self, model: Forecaster) -> tuple[float, str]:
        """Missing rows streamed, or told at once; and a silence of any length told in two parts."""
        P, G = model.patch_size, model.gap_tokens
        worst = _Worst()
        _, before = model(self.batch(model, 5 * P + 3))
        V, device = len(self.variates), before.steps.device
        for patches in (0, G, G + 1, G + 5):
            steps = patches * P + 2
            nothing = torch.zeros(2, V, steps, dtype=torch.float64, device=device)
            known = self.batch(model, steps).known
            _, streamed = model(Batch(nothing, nothing.bool(), known), before)
            told = model.elapse(before, steps, known=None if known is None else _columns(known))
            for name, error in _state_errors(told, streamed):
                worst.see(error, f"{patches} empty patches, state {name}")
        steps, first = SILENCE * P, 12_345 * P + 1
        at_once = model.elapse(before, steps)
        for name, error in _state_errors(model.elapse(model.elapse(before, first), steps - first), at_once):
            worst.see(error, f"{SILENCE:,} empty patches in two parts, state {name}")
        return worst.found

    @torch.no_grad()
    def apart(self, model: Forecaster, other: Forecaster) -> tuple[float, str]:
        """The same pass on two devices."""
        worst = _Worst()
        steps = 40 * model.patch_size + 1
        (got, _), (want, _) = model(self.batch(model, steps)), other(self.batch(other, steps))
        for token in range(want.valid.shape[1]):
            error = _error(
                got.values[:, :, token].cpu(), want.values[:, :, token], want.valid[:, token, None, None, None]
            )
            worst.see(error, f"step {(token + 1) * model.patch_size}")
        return worst.found

    # ---- the live predictor

    def predictor_of(self, model: Forecaster, **options: Any) -> StatefulPredictor:
        """A predictor without series."""
        known = {"calendar": self.calendar, "variates": self.variates, "targets": self.targets}
        return StatefulPredictor(model, freq=self.clock.freq, **known, **options)

    def series(self, model: Forecaster, count: int, steps: int) -> list[Series]:
        """As `batch`, on the clock."""
        batch = self.batch(model, steps, count)
        values = torch.where(batch.observed, batch.values, torch.nan).cpu().numpy()
        user = model.known_features - (self.clock.calendar_size if self.calendar else 0)
        rng = np.random.default_rng([self.seed, 1])
        known = rng.normal(size=(count, user, steps + model.span)) if user > 0 else [None] * count
        sizes = model.config["static_cardinalities"]
        static = tuple(int(rng.integers(0, size + 1)) for size in sizes)
        days = (np.datetime64(day, "ns") for day in ("2023-01-02", "2023-01-01", "2022-12-31"))
        start = next(day for day in days if self.clock.on_grid(day))
        more = {"static": static} if static else {}
        return [
            Series(f"s{i}", start, self.clock.freq, values[i], known=known[i], variates=self.variates, **more)
            for i in range(count)
        ]

    def predictor(self, model: Forecaster) -> tuple[float, str]:
        """Rows one by one, forecasts at patch ends and inside patches, against one pass."""
        report = self.predictor_of(model).verify(self.series(model, 2, 5 * model.patch_size + 3), origins=6)
        item, origin = report.worst
        return (report.error, f"{item} after {origin} steps") if report.forecasts else (float("inf"), "no forecast")

    def warm_up(self, model: Forecaster) -> tuple[float, str]:
        """A history taken in at once and then rows, against rows alone."""
        worst = _Worst()
        P = model.patch_size
        whole, parts = self.predictor_of(model), self.predictor_of(model)
        histories = self.series(model, 2, 4 * P + 3)
        whole.warm_up(histories)
        parts.warm_up([one.slice(0, 2 * P + 1) for one in histories])
        for step in range(2 * P + 1, 4 * P + 3):
            parts.warm_up([one.slice(step, step + 1) for one in histories])
        a, b = whole.forecast(), parts.forecast()
        size = np.nanmax(np.abs(a.values), initial=1.0)
        worst.see(_largest(np.abs(a.values - b.values) / size, np.isfinite(a.values)), "the forecast afterwards")
        tensors = parts.state_tensors()
        for name, leaf in whole.state_tensors().items():
            worst.see(_error(tensors[name], leaf), f"state {name}")
        return worst.found

    def copies(self, model: Forecaster) -> tuple[float, str]:
        """Asking, forking, and a state that went through bytes: the same bits."""
        worst = _Worst()
        predictor = self.predictor_of(model)
        histories = self.series(model, 2, 4 * model.patch_size + 3)
        predictor.warm_up(histories)
        first = predictor.forecast().values
        worst.see(_unequal(predictor.forecast().values, first), "asking twice")
        worst.see(_unequal(predictor.fork().forecast().values, first), "a fork")
        again = predictor.fork([])
        tensors, header = predictor._contents(predictor.item_ids)
        again._restore({name: leaf.clone() for name, leaf in tensors.items()}, json.loads(json.dumps(header)))
        worst.see(_unequal(again.forecast().values, first), "a saved state")
        return worst.found


class _Worst:
    """The largest error so far and where it was; NaN counts as infinite."""

    def __init__(self) -> None:
        self.found: tuple[float, str] = (0.0, "")

    def see(self, error: float, where: str) -> None:
        error = float("inf") if error != error else error
        if error > self.found[0] or not self.found[1]:
            self.found = (error, where)


class _kernel:
    """Demands an implementation of the ops for a while; "torch" on a CPU is what runs anyway."""

    def __init__(self, name: str) -> None:
        self._name, self._before = name, os.environ.get("TSGDN_KERNEL")

    def __enter__(self) -> None:
        os.environ["TSGDN_KERNEL"] = self._name

    def __exit__(self, *exception: object) -> None:
        if self._before is None:
            del os.environ["TSGDN_KERNEL"]
        else:
            os.environ["TSGDN_KERNEL"] = self._before


def _part(batch: Batch, begin: int, steps: int, span: int) -> Batch:
    known = None if batch.known is None else batch.known[..., begin : begin + steps + span]
    end = begin + steps
    return batch._replace(values=batch.values[..., begin:end], observed=batch.observed[..., begin:end], known=known)


def _columns(known: Tensor) -> Callable[[int, int], Tensor]:
    return lambda begin, end: known[..., begin:end]


def _state_errors(got: Any, want: Any) -> Iterator[tuple[str, float]]:
    got, want = same_sizes(*(map_state(_plain, state) for state in (got, want)))
    for (name, a), (_, b) in zip(state_leaves(got), state_leaves(want), strict=True):
        yield name, _error(a, b)


def _plain(leaf: Tensor) -> Tensor:
    return leaf.nan_to_num(0.0) if leaf.is_floating_point() else leaf


def _error(got: Tensor, want: Tensor, where: Tensor | None = None) -> float:
    """The largest difference over the largest entry, at least 1."""
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    got, want = got.double(), want.double()
    apart = (got - want).abs()
    if where is not None:
        apart, want = (torch.where(where, x, 0.0) for x in (apart, want))
    both = got.isnan() & want.isnan()
    size = want.abs().nan_to_num(0.0).max().clamp(min=1.0)
    return float((torch.where(both, 0.0, apart) / size).max())


def _largest(apart: np.ndarray, where: np.ndarray) -> float:
    return float(np.where(where, np.nan_to_num(apart, nan=np.inf), 0.0).max(initial=0.0))


def _unequal(got: np.ndarray, want: np.ndarray) -> float:
    """0 for the same bits, else the largest difference."""
    if np.array_equal(got, want, equal_nan=True):
        return 0.0
    return float(np.nanmax(np.abs(got - want))) if got.shape == want.shape else float("inf")


def _environment(devices: Sequence[str]) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    def found(package: str) -> str | None:  # a checkout may be on the path without being installed
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    names = {
        device: torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
        for device in devices
    }
    return {
        "tsgdn": found("tsgdn"),
        "torch": torch.__version__,
        "triton": found("triton"),
        "devices": names,
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
