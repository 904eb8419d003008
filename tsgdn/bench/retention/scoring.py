"""Scores of trained replicas: streams read in chunks with the state carried, errors at the probes, group by group."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsgdn.bench.retention.blocks import Feed, Made, Request
from tsgdn.bench.retention.cells import Group
from tsgdn.bench.retention.model import assemble
from tsgdn.bench.retention.training import FIXED_GAPS, data_seeds, on_device
from tsgdn.data.retention.dynamics import IMPULSE
from tsgdn.evaluation.retention import binding, control_regret, cross_talk

BLOCK, BLOCK_STEPS = 64, 1 << 16
"""Sequences drawn together, and at most so many steps of gap in all: what is drawn depends on both."""
CHUNK_TOKENS = 1 << 19
"""Tokens of all replicas that go through the model in one call."""
PARTS = ("rare", "common", "revised")
STREAM = 8192
"""Steps of a test stream of T9."""
CONTROL_GAP = 128
CONTROLS = ("no_exposure", "new_cue", "shown")
CONTROLLED = ("T2", "T2e", "T3", "T5")

Reader = Callable[..., tuple[Tensor, Any]]
"""Replicas, or what answers like them: inputs with leaves (R, B, T, .) and a state give outputs and a state."""
Sums = dict[str, np.ndarray]
"""By part: (2, B), each sequence's sum of squares of the error and of the memoryless reference's error."""


def score(group: Group, replicas: Reader, *, feed: Feed, device: str) -> list[dict[str, Any]]:
    """Per cell: {"gaps": {gap: {part: {"error": [...], "base": [...]}, "plain": {...}}}, "not_finite": n}.

    Sums over groups of sequences; `base` is the memoryless reference's error. Forecasts that are not finite count as
    those of the memoryless reference, 0, and are counted.
    """
    preset, unit = group.first.preset, group.first.unit
    gaps = preset.test_gaps
    if unit.task in FIXED_GAPS:
        gaps = (STREAM if unit.task == "T9" and preset.evidence else FIXED_GAPS[unit.task],)
    found: list[dict[str, Any]] = [{"gaps": {}, "not_finite": 0} for _ in group.cells]
    for gap in gaps:
        validating = group.first.phase == "validation"
        usual, long = preset.choice_sequences if validating else preset.sequences
        count = long if gap >= preset.long_gap else usual
        scored = of_gap(group, replicas, gap, count, feed, device)
        for cell, (parts, odd) in zip(found, scored, strict=True):
            cell["gaps"][str(gap)] = parts
            cell["not_finite"] += odd
    return found


def controls(group: Group, replicas: Reader, *, feed: Feed, device: str) -> list[dict[str, float]]:
    """Rare Ret of each cell where it must be low (never shown, another cue) or high (shown again at the end)."""
    if group.first.unit.task not in CONTROLLED or "common" not in dict(group.first.axes()) | {"common": 0}:
        return [{} for _ in group.cells]
    gap, count = min(CONTROL_GAP, max(group.first.preset.test_gaps)), min(256, group.first.preset.sequences[0])
    found: list[dict[str, float]] = [{} for _ in group.cells]
    for name in CONTROLS:
        scored = of_gap(group, replicas, gap, count, feed, device, control=name)
        for cell, (parts, _) in zip(found, scored, strict=True):
            rare = parts["rare"]
            cell[name] = float(f"{1 - sum(rare['error']) / sum(rare['base']):.6g}")
    return found


def of_gap(
    group: Group, replicas: Reader, gap: int, count: int, feed: Feed, device: str, **more: Any
) -> list[tuple[dict[str, Any], int]]:
    """Of every cell at one gap: sums by part, and how many forecasts were not finite."""
    first = group.first
    batch = min(BLOCK, max(1, BLOCK_STEPS // max(gap, 1)), count)
    seeds, places = data_seeds(group)
    split = "validation" if first.phase == "validation" else "test"
    axes = tuple(sorted((dict(first.axes()) | more).items()))
    wanted = (
        Request(first.unit.task, axes, seeds, index, split, gap, batch, questions=True)
        for index in range(count // batch)
    )
    ask, tell = _FORKED.get(first.unit.task, (_at_probes, _Recall))
    tellers = [tell() for _ in group.cells]
    for made in feed(wanted):
        said = ask(made, replicas, places, device)
        for r, place in enumerate(places):
            own = {name: array[place] for name, array in made.questions.items()}
            own["values"] = made.fields["values"][place]
            tellers[r].add(said[r].astype(np.float64), own)
    return [(teller.told(first.preset.groups), teller.odd) for teller in tellers]


# ---- what is asked of a model


def _at_probes(made: Made, replicas: Reader, places: list[int], device: str) -> np.ndarray:
    """Forecasts for the probes' steps, (R, B, P, C)."""
    time = made.questions["time"]
    since = int(time.min()) - 1
    said, _ = stream(made.fields, replicas, places, device, since=since)
    place = torch.from_numpy(time - 1 - since).to(said.device)[torch.tensor(places, device=said.device)]
    index = place[..., None].expand(*place.shape, said.shape[-1])
    return said.gather(2, index).cpu().numpy()


def _effects(made: Made, replicas: Reader, places: list[int], device: str) -> np.ndarray:
    """T7: what each action would change at its lag, (R, B, A, C): the stream is forked before the branch."""
    codes = made.questions["codes"]
    hidden = made.fields["observed"][0, 0, :, 0] == 0
    at = int(np.argmax(hidden)) - 1
    _, state = stream(made.fields, replicas, places, device, tokens=slice(0, at - 1), keep=False)
    said = []
    for action in range(-1, codes.shape[2]):
        fork = dict(made.fields)
        if action >= 0:
            fork["action"] = made.fields["action"].copy()
            fork["action"][:, :, at] = codes[:, :, action]
        ahead, _ = stream(fork, replicas, places, device, state=state, tokens=slice(at - 1, None))
        said.append(ahead[:, :, -1])
    return (torch.stack(said[1:], 2) - said[0][:, :, None]).cpu().numpy()


def _columns(made: Made, replicas: Reader, places: list[int], device: str) -> np.ndarray:
    """T8: the answers to an impulse in each channel, as columns (R, B, C, C): one fork each."""
    values = made.fields["values"]
    at = values.shape[2] - 2
    _, state = stream(made.fields, replicas, places, device, tokens=slice(0, at), keep=False)
    said = []
    for channel in range(values.shape[-1]):
        fork = {name: array[:, :, at:] for name, array in made.fields.items()}
        struck = fork["values"].copy()
        struck[:, :, 0] = IMPULSE * (np.arange(values.shape[-1]) == channel)
        ahead, _ = stream(fork | {"values": struck}, replicas, places, device, state=state)
        said.append(ahead[:, :, -1] / IMPULSE)
    return torch.stack(said, -1).cpu().numpy()


def _everywhere(made: Made, replicas: Reader, places: list[int], device: str) -> np.ndarray:
    """Forecasts for all steps but the first, (R, B, T-1, C)."""
    return stream(made.fields, replicas, places, device)[0].cpu().numpy()


# ---- what is told of the answers


class _Teller:
    """Collects the answers of one cell, block by block."""

    def __init__(self) -> None:
        self.odd = 0
        self.sums: list[Sums] = []

    def add(self, answer: np.ndarray, own: Mapping[str, np.ndarray]) -> None:
        """Takes in a block."""
        wild = ~np.isfinite(answer)
        self.odd += int(wild.sum())
        self.take(np.where(wild, 0.0, answer), own)

    def take(self, answer: np.ndarray, own: Mapping[str, np.ndarray]) -> None:
        """What a task does with its answers."""
        raise NotImplementedError

    def plain(self) -> dict[str, float]:
        """Numbers beside the sums."""
        return {}

    def told(self, groups: int) -> dict[str, Any]:
        """All that is stored."""
        out: dict[str, Any] = {}
        for name in dict.fromkeys(name for block in self.sums for name in block):
            sums = np.concatenate([block[name] for block in self.sums], 1)
            grouped = sums.reshape(2, min(groups, sums.shape[1]), -1).sum(-1)
            out[name] = {"error": _short(grouped[0]), "base": _short(grouped[1])}
        plain = {name: float(f"{value:.6g}") for name, value in self.plain().items()}
        return out | ({"plain": plain} if plain else {})


class _Recall(_Teller):
    """T1 to T6, T9b: errors at the probes; of T5 also what current and replaced values explain; of T6 cross-talk."""

    def __init__(self) -> None:
        super().__init__()
        self.gram, self.cross = np.zeros((2, 2)), np.zeros(2)
        self.crossing: list[tuple[np.ndarray, ...]] = []

    def take(self, answer: np.ndarray, own: Mapping[str, np.ndarray]) -> None:
        truth, found = own["truth"], {}
        for part in PARTS:
            if part in own and (part == "revised" or own[part].any()):
                where = np.broadcast_to(own[part], truth.shape)
                found[part] = np.stack([np.where(where, x**2, 0.0).sum((1, 2)) for x in (answer - truth, truth)])
        self.sums.append(found)
        if "replaced" in own:
            use = own["revised"][..., 0]
            design = np.stack([own["truth"][use].ravel(), own["replaced"][use].ravel()])
            self.gram += design @ design.T
            self.cross += design @ answer[use].ravel()
        if "parked" in own:
            self.crossing.append((answer[:, 0], own["theta"], own["parked"], own["rare"][:, 0]))

    def plain(self) -> dict[str, float]:
        if self.crossing:
            said, theta, parked, rare = (np.concatenate(x) for x in zip(*self.crossing, strict=True))
            if len(said) <= said.shape[1] + 1:
                return {}
            found = cross_talk(said, theta.astype(np.float64), parked.astype(np.int64), targets=int(rare[0].sum()))
            own, before, others = found.coefficients[:, 0], found.coefficients[:, 1], found.coefficients[:, 2:]
            means = {"cross_talk_own": own.mean(), "cross_talk_parked": before.mean()}
            return {"cross_talk": found.score, **means, "cross_talk_other": float(np.sqrt((others**2).mean()))}
        if not self.gram.any():
            return {}
        current, stale = np.linalg.lstsq(self.gram, self.cross, rcond=None)[0]
        return {"coefficient_current": current, "coefficient_stale": stale}


class _Effect(_Teller):
    """T7: how much of each action's effect is left, and what choosing by it costs."""

    def __init__(self) -> None:
        super().__init__()
        self.regret: list[float] = []

    def take(self, answer: np.ndarray, own: Mapping[str, np.ndarray]) -> None:
        truth = own["effects"].astype(np.float64)
        off, base = ((x**2).sum(-1) for x in (answer - truth, truth))
        self.sums.append(
            {
                "rare": np.stack([off[:, -1], base[:, -1]]),
                "common": np.stack([off[:, :-1].sum(1), base[:, :-1].sum(1)]),
            }
        )
        goal = np.random.default_rng(len(self.regret)).standard_normal((len(truth), truth.shape[-1]))
        self.regret.append(control_regret(answer, truth, goal / np.linalg.norm(goal, axis=1, keepdims=True)))

    def plain(self) -> dict[str, float]:
        return {"control_regret": float(np.mean(self.regret))}


class _Binding(_Teller):
    """T8: the rare topology as the answers show it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[float, float]] = []

    def take(self, answer: np.ndarray, own: Mapping[str, np.ndarray]) -> None:
        topology = own["topology"].astype(np.float64)
        channels = answer.shape[-1]
        law, ignorant = 0.9 * topology[:, -1], 0.9 * (1 - np.eye(channels)) / (channels - 1)
        self.sums.append({"rare": np.stack([((x - law) ** 2).sum((1, 2)) for x in (answer, ignorant)])})
        scores = binding(answer, topology)
        self.found.append((scores.driver_accuracy, scores.swap_rate))

    def plain(self) -> dict[str, float]:
        accuracy, swaps = np.mean(self.found, 0)
        return {"driver_accuracy": float(accuracy), "swap_rate": float(swaps)}


class _Switching(_Teller):
    """T9: one-step errors in the first eight steps after the rare regime comes back, beyond those of the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.by_age: list[np.ndarray] = []

    def take(self, answer: np.ndarray, own: Mapping[str, np.ndarray]) -> None:
        age = own["age"][:, 1:]
        error = ((answer - own["values"][:, 1:]) ** 2).mean(-1)
        inside = age > 0
        more = [np.where(inside, x - own["oracle"][:, 1:], 0.0).sum(1) for x in (error, own["window"][:, 1:])]
        self.sums.append({"rare": np.stack(more)})
        self.by_age.append(np.stack([age[inside], own["since"][:, 1:][inside], error[inside]]))

    def plain(self) -> dict[str, float]:
        age, since, error = np.concatenate(self.by_age, 1)
        out = {f"error_step_{j}": float(error[age == j].mean()) for j in range(1, 9) if (age == j).any()}
        if len(since) >= 80:
            edges = np.quantile(since, np.linspace(0, 1, 11))
            decile = np.clip(np.searchsorted(edges, since, side="right") - 1, 0, 9)
            out |= {f"error_gap_decile_{d + 1}": float(error[decile == d].mean()) for d in np.unique(decile).tolist()}
        return out


_FORKED: dict[str, tuple[Callable[..., np.ndarray], type[_Teller]]] = {
    "T7": (_effects, _Effect),
    "T8": (_columns, _Binding),
    "T9": (_everywhere, _Switching),
}


# ---- streams


def stream(
    fields: Mapping[str, np.ndarray],
    replicas: Reader,
    places: list[int],
    device: str,
    *,
    state: Any = None,
    since: int = 0,
    tokens: slice = slice(None),
    keep: bool = True,
) -> tuple[Tensor, Any]:
    """Reads blocks chunk by chunk with the state carried; the forecasts of tokens from `since` on, (R, B, N, C).

    Args:
        fields: (S, B, T, .) per data seed.
        replicas: R of them.
        places: of each replica among the seeds.
        device: where they are.
        state: before the first token that is read.
        since: first token whose forecast is kept.
        tokens: those that are read; all of them by default.
        keep: False keeps the last forecast only.
    """
    streams, steps = fields["values"].shape[1:3]
    begin, end, _ = tokens.indices(steps - 1)
    since = since if keep else end - 1
    chunk = max(1, CHUNK_TOKENS // (len(places) * streams))
    index = torch.tensor(places, device=device)
    whole = on_device({name: array for name, array in fields.items() if name != "weight"}, device)
    kept = []
    for at, until in _cuts(begin, end, chunk):
        batch = assemble({name: leaf[:, :, at : until + 1] for name, leaf in whole.items()})
        said, state = replicas({"x": batch["x"][index]}, state)
        if until > since:
            kept.append(said[:, :, max(0, since - at) :])
    return torch.cat(kept, 2), state


def _cuts(begin: int, end: int, chunk: int) -> Iterator[tuple[int, int]]:
    pieces = max(1, math.ceil((end - begin) / chunk))
    edges = np.linspace(begin, end, pieces + 1).round().astype(int).tolist()
    yield from itertools.pairwise(edges)


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.7g}") for value in values]
