"""Speed and memory of the kernels, by shape, beside whatever other implementations are installed.

A cell is (shape, contestant, direction, norm). Every contestant gets the same random inputs; its outputs (and
gradients) are compared with float64 on the first and the last row before it is timed, and a wrong one gets the value
"wrong" and no time. Contestants of a cell take turns. Rows are appended to a results.csv as they are measured.

Floors: the larger of minimal bytes over bandwidth and minimal operations over the rate of dense bfloat16 products.
"""

import contextlib
import csv
import functools
import importlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsgdn.bench.record import append, provenance, row
from tsgdn.kernels import Readout, gated_delta_rule
from tsgdn.kernels.gated_delta_rule.chunkwise import chunkwise
from tsgdn.kernels.gated_delta_rule.reference import reference

DIRECTIONS = ("fwd", "fwd+bwd", "step", "layer", "layer+bwd")
"""What is timed: the op, its forward and backward, one token, a layer without its matrix products, and its training."""

NORMS = ("none", "qk")
"""Whether queries and keys are divided by their length inside what is timed."""

PEAKS = {"H200": (4.3e12, 780e12)}
"""By a word of the device's name: bytes/s of a large copy and FLOP/s of a large bfloat16 product, both measured."""

BOUNDS = {"y": 0.02, "log_decay": 0.06, "beta": 0.06, "dt": 0.06, "raw": 0.06, "a": 0.06, "b": 0.06}
"""Relative L2 error against float64 above which a result is wrong; gradients not named: 0.03."""

SHORTEST, LONGEST = 24, 336
"""Tokens of a packed row."""

CONV = 4
"""Width of the short convolution of a layer."""


class Shape(NamedTuple):
    """Sizes of one call; `packed`: rows of random lengths laid end to end, `tokens` being the longest."""

    name: str
    rows: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    packed: bool = False

    @property
    def text(self) -> str:
        """The sizes in words, as the column `config` has them."""
        tokens = f"{SHORTEST}..{self.tokens}" if self.packed else self.tokens
        return f"B{self.rows} T{tokens} H{self.heads} {self.key_dim}/{self.value_dim}"

    def small(self) -> "Shape":
        """Sizes a CPU does in no time, in the same proportions."""
        tokens = self.tokens if self.packed else min(self.tokens, 20)
        return self._replace(rows=2, tokens=tokens, heads=2, key_dim=8, value_dim=8 * self.value_dim // self.key_dim)


def _shapes() -> Iterator[Shape]:
    yield Shape("S0", 4096, 64, 2, 32, 32)
    yield Shape("S1", 4096, 64, 4, 32, 64)
    yield Shape("S2", 1024, 96, 8, 64, 64)
    yield Shape("S3", 512, 128, 8, 64, 64)
    yield Shape("S4", 256, 512, 8, 64, 128)
    yield Shape("S5", 64, 2048, 8, 64, 64)
    yield Shape("S6", 32, 4096, 16, 128, 128)
    yield Shape("S7", 8, 4096, 8, 128, 128)
    yield Shape("S7_256", 8, 4096, 8, 128, 256)
    for tokens in (16384, 131072, 262144):
        for size in (128, 64):
            yield Shape(f"S8_{tokens // 1000}k_{size}", 1, tokens, 8, size, size)
    yield Shape("S9", 4096, LONGEST, 8, 64, 64, packed=True)
    yield Shape("S10", 16384, 64, 8, 64, 64)
    for keys, values in ((64, 64), (64, 128), (128, 128)):
        for rows in (1, 64, 1024, 4096, 16384):
            yield Shape(f"D_{keys}x{values}_B{rows}", rows, 1, 8, keys, values)


SHAPES = {shape.name: shape for shape in _shapes()}


def named(text: str) -> list[Shape]:
    """Shapes of a name, or of the group it begins: S8 is S8_16k_128 and so on."""
    return [shape for name, shape in SHAPES.items() if name == text or name.startswith(f"{text}_")]


def applies(shape: Shape, direction: str, norm: str) -> bool:
    """Whether the cell is a question: steps have one token; layers are asked at S0 to S7, their norm inside."""
    if (shape.tokens == 1) != (direction == "step"):
        return False
    return not direction.startswith("layer") or (norm == "qk" and shape.name.split("_")[0] not in ("S8", "S9", "S10"))


def token_heads(shape: Shape) -> int:
    """Tokens times heads of a call."""
    tokens = int(_lengths(shape).sum()) if shape.packed else shape.rows * shape.tokens
    return tokens * shape.heads


def floor_us(shape: Shape, direction: str, bandwidth: int | float = 4.3e12, rate: int | float = 780e12) -> float:
    """The least time in microseconds: each input read once, each output written once, dense tiles of C tokens.

    Per token and head, with C = 32 where both sizes are at most 64 and 64 elsewhere:

        forward   4 C Dk + 4 C Dv + 6 Dk Dv + (2/3) C^2 FLOP,                                4 Dk + 4 Dv + 8 bytes
        backward  12 C Dk + 12 C Dv + 18 Dk Dv + (4 + 2/3) C^2 FLOP (states are recomputed),  8 Dk + 6 Dv + 16 bytes

    bfloat16 q, k, v and y, float32 log_decay and beta. A layer also reads the output gate, and its gradient. A step
    reads and writes the float32 state.

    Args:
        shape: sizes.
        direction: one of `DIRECTIONS`.
        bandwidth: bytes per second.
        rate: FLOP per second.
    """
    keys, values = shape.key_dim, shape.value_dim
    chunk = 32 if max(keys, values) <= 64 else 64
    ahead = 4 * chunk * (keys + values) + 6 * keys * values + 2 / 3 * chunk**2
    back = 12 * chunk * (keys + values) + 18 * keys * values + (4 + 2 / 3) * chunk**2
    read, written = 4 * keys + 4 * values + 8, 8 * keys + 6 * values + 16
    if direction == "step":
        return token_heads(shape) * (8 * keys * values + read) / bandwidth * 1e6
    if direction.startswith("layer"):
        read, written = read + 2 * values, written + 4 * values
    count = token_heads(shape)
    seconds = max(count * read / bandwidth, count * ahead / rate)
    if direction.endswith("+bwd"):
        seconds += max(count * written / bandwidth, count * back / rate)
    return seconds * 1e6


@dataclass(frozen=True)
class Case:
    """The inputs of a cell, the same for every contestant.

    Attributes:
        shape: sizes.
        norm: whether q and k still have to be divided by their lengths.
        scale: multiplies q.
        x: tensors by name; q, k, v (R, N, H, D) and log_decay, beta, dt (R, N, H), packed (1, total, H, ..); of a
            layer inputs (R, N, C), raw (R, N, 2H), gate (R, N, H, Dv), conv_weight (C, W), A_log (H), dt_bias (H),
            weight (Dv).
        dy: gradient of the output (R, N, H, Dv).
        states: of a step, several states (R, H, Dk, Dv), so that the cache does not hold the next one.
        ends: of packed rows, where each begins, and the end of the last (R + 1).
    """

    shape: Shape
    norm: bool
    scale: float
    x: dict[str, Tensor]
    dy: Tensor
    states: list[Tensor] = field(default_factory=list)
    ends: Tensor | None = None


def _lengths(shape: Shape) -> Tensor:
    return torch.randint(SHORTEST, shape.tokens + 1, (shape.rows,), generator=torch.Generator().manual_seed(shape.rows))


def draw(shape: Shape, direction: str, norm: str, device: str, dtype: torch.dtype, seed: int) -> Case:
    """Random inputs; without a norm inside, keys and queries are drawn with length one."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    R, N, H, Dk, Dv = shape[1:6]
    ends, states = None, []
    if shape.packed:
        lengths = _lengths(shape)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
        R, N = 1, int(lengths.sum())
    x: dict[str, Tensor] = {}
    if direction.startswith("layer"):
        channels = H * (2 * Dk + Dv)
        x = {
            "inputs": normal(R, N, channels).to(dtype),
            "raw": normal(R, N, 2 * H),
            "gate": normal(R, N, H, Dv).to(dtype),
        }
        x |= {"conv_weight": normal(channels, CONV) / 2, "A_log": normal(H) / 4, "dt_bias": normal(H) - 3}
        x["weight"] = 1 + normal(Dv) / 4
    else:
        for name in ("q", "k"):
            drawn = normal(R, N, H, Dk)
            x[name] = (drawn if norm == "qk" else F.normalize(drawn, dim=-1)).to(dtype)
        x["v"] = normal(R, N, H, Dv).to(dtype)
        x["log_decay"] = F.logsigmoid(normal(R, N, H) + 3)
        x["beta"] = torch.rand(R, N, H, generator=generator, device=device)
        x["dt"] = -x["log_decay"]
    if direction == "step":
        pools = 1 if device == "cpu" else min(20, math.ceil(2**29 / (4 * R * H * Dk * Dv)))
        states = [normal(R, H, Dk, Dv) for _ in range(pools)]
    return Case(shape, norm == "qk", Dk**-0.5, x, normal(R, N, H, Dv).to(dtype), states, ends)


@dataclass(frozen=True)
class Task:
    """What a contestant does with a case.

    Attributes:
        inputs: tensors that a row's output depends on, rows (packed: tokens) first or second; gradients are checked.
        parameters: shared by all rows; training asks for their gradients as well.
        call: the output (R, N, H, Dv), given which of the case's states to use.
        truth: the same from `inputs` of one row in float64.
        per_head: heads are the third axis of all inputs and do not know each other, so that two of them are enough.
    """

    inputs: dict[str, Tensor]
    call: Callable[[int], Tensor]
    truth: Callable[[dict[str, Tensor]], Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    per_head: bool = True


class Contestant:
    """An implementation: whether it is there, what it can do, how it is called.

    Attributes:
        name: as rows have it.
        module: that must be importable.
        packages: distributions whose versions stand in the rows.
        directions: of `DIRECTIONS`.
        norms: of `NORMS`.
        packed: whether it takes packed rows.
        cpu: whether it runs without a GPU.
    """

    name: ClassVar[str]
    module: ClassVar[str] = "tsgdn"
    packages: ClassVar[tuple[str, ...]] = ()
    directions: ClassVar[tuple[str, ...]] = ("fwd", "fwd+bwd")
    norms: ClassVar[tuple[str, ...]] = NORMS
    packed: ClassVar[bool] = True
    cpu: ClassVar[bool] = False

    def installed(self) -> bool:
        """Whether it can be imported, without importing it."""
        return find_spec(self.module) is not None

    def supports(self, shape: Shape, direction: str, norm: str, device: str) -> bool:
        """Whether it has this cell."""
        there = direction in self.directions and norm in self.norms and (self.packed or not shape.packed)
        return applies(shape, direction, norm) and there and (self.cpu or device != "cpu") and self.fits(shape)

    def fits(self, shape: Shape) -> bool:
        """Whether it takes these sizes."""
        return True

    def prepare(self, case: Case, direction: str) -> Task:
        """Imports what is needed and wraps the call."""
        raise NotImplementedError

    def versions(self) -> str:
        """Of its packages, for the column `config`."""
        found = []
        for package in self.packages:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.append(f"{package} {metadata.version(package)}")
        return ", ".join(found)


def _leaves(x: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: x[name].detach().requires_grad_() for name in names}


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _rule(case: Case, x: Mapping[str, Tensor], *, delta: bool = True, state: Tensor | None = None) -> Tensor:
    """Float64 outputs of one row: by definition, or, where that takes too long, by chunks of 64 tokens."""
    q, k = (_unit(x["q"]), _unit(x["k"])) if case.norm else (x["q"], x["k"])
    q, v = q * case.scale, x["v"]
    if k.shape[1] <= 256:
        return reference(q, k, v, log_decay=x["log_decay"], beta=x["beta"], delta=delta, state=state)[0]
    zeros = v.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])
    return chunkwise(q, k, v, x["log_decay"], x["beta"], None, delta, zeros if state is None else state, 64)[0]


def _layer(case: Case, x: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Float64 outputs of one row of a layer, its matrix products left out; the row's memory may be in `x["state"]`."""
    H, Dk, Dv = case.shape.heads, case.shape.key_dim, case.shape.value_dim
    weight = parameters["conv_weight"].double()
    past = F.pad(x["inputs"].transpose(1, 2), (CONV - 1, 0))
    mixed = F.silu(F.conv1d(past, weight[:, None], groups=len(weight))).transpose(1, 2)
    q, k, v = mixed.split([H * Dk, H * Dk, H * Dv], dim=-1)
    beta, dt = x["raw"].split([H, H], dim=-1)
    log_decay = -parameters["A_log"].double().exp() * F.softplus(dt + parameters["dt_bias"].double())
    qkv = {"q": q.unflatten(-1, (H, Dk)), "k": k.unflatten(-1, (H, Dk)), "v": v.unflatten(-1, (H, Dv))}
    o = _rule(case, {**qkv, "beta": beta.sigmoid(), "log_decay": log_decay}, state=x.get("state"))
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * parameters["weight"].double()
    return o * F.silu(x["gate"])


class Ours(Contestant):
    """The op as a caller gets it: kernel by device."""

    name = "tsgdn"
    directions = DIRECTIONS
    cpu = True
    delta: ClassVar[bool] = True
    kernel: ClassVar[str | None] = None

    def supports(self, shape: Shape, direction: str, norm: str, device: str) -> bool:
        """Without a GPU there is neither the one-token kernel nor packing."""
        if device == "cpu" and (direction == "step" or shape.packed):
            return False
        return super().supports(shape, direction, norm, device)

    def prepare(self, case: Case, direction: str) -> Task:
        """The op, the one-token kernel or the pieces of the layer."""
        if direction == "step":
            return self._step(case)
        if direction.startswith("layer"):
            return self._layer(case)
        x = _leaves(case.x, "q", "k", "v", "log_decay", "beta")
        options: dict[str, Any] = {
            "norm": case.norm,
            "scale": case.scale,
            "delta": self.delta,
            "end_state": False,  # nor do the others make one
            **self.options(case.shape),
        }
        if case.ends is not None:
            options["cu_seqlens"] = case.ends

        def call(_: int) -> Tensor:
            with _demanded(self.kernel):
                return gated_delta_rule(**x, **options)[0]

        return Task(x, call, lambda row: _rule(case, row, delta=self.delta))

    def options(self, shape: Shape) -> dict[str, Any]:
        """More arguments of the op."""
        return {}

    def _step(self, case: Case) -> Task:
        decode = importlib.import_module("tsgdn.kernels.gated_delta_rule.decode").decode
        x, states = {name: case.x[name] for name in ("q", "k", "v", "log_decay", "beta")}, case.states

        def call(i: int) -> Tensor:
            return decode(*x.values(), None, True, states[i], norm=case.norm, scale=case.scale)[0]

        return Task({**x, "state": states[0]}, call, lambda row: _rule(case, row, state=row["state"]), per_head=False)

    def _layer(self, case: Case) -> Task:
        prologue = importlib.import_module("tsgdn.kernels.prologue").prologue
        H, Dk, Dv = case.shape.heads, case.shape.key_dim, case.shape.value_dim
        x, p = _leaves(case.x, "inputs", "raw", "gate"), _leaves(case.x, "conv_weight", "A_log", "dt_bias", "weight")

        def call(_: int) -> Tensor:
            gates = {"A_log": p["A_log"], "dt_bias": p["dt_bias"]}
            mixed, beta, log_decay, _tail = prologue(x["inputs"], x["raw"], conv_weight=p["conv_weight"], **gates)
            q, k, v = mixed.split([H * Dk, H * Dk, H * Dv], dim=-1)
            return gated_delta_rule(
                q.unflatten(-1, (H, Dk)), k.unflatten(-1, (H, Dk)), v.unflatten(-1, (H, Dv)),
                log_decay=log_decay, beta=beta, norm=True, scale=case.scale,
                readout=Readout(x["gate"], p["weight"]), end_state=False,
            )[0]  # fmt: skip

        return Task(x, call, lambda row: _layer(case, row, p), p, per_head=False)


class OursSegmented(Ours):
    """Long inputs of few rows cut along time, which a caller asks for."""

    name = "tsgdn_segments"
    directions = ("fwd", "fwd+bwd")
    packed = False
    cpu = False

    def fits(self, shape: Shape) -> bool:
        """Where rows and heads leave processors idle."""
        return shape.rows * shape.heads < 132

    def options(self, shape: Shape) -> dict[str, Any]:
        """About two programs for each of 132 processors."""
        return {"segments": 2 ** round(math.log2(264 / (shape.rows * shape.heads)))}


class OursLinear(Ours):
    """The same kernels without the delta rule: gated linear attention, Mamba-2's scan."""

    name = "tsgdn_ssd"
    directions = ("fwd", "fwd+bwd")
    norms = ("none",)
    delta = False


class OursTorch(Ours):
    """The torch path, for scale: small inputs only."""

    name = "torch"
    directions = ("fwd", "fwd+bwd")
    packed = False
    kernel = "torch"

    def fits(self, shape: Shape) -> bool:
        """Up to 2^20 token-heads."""
        return token_heads(shape) <= 2**20


class OursPool(Contestant):
    """One token of a whole layer but its matrix products, states changed in place in a pool of slots."""

    name = "tsgdn_pool"
    directions = ("step",)
    norms = ("qk",)

    def prepare(self, case: Case, direction: str) -> Task:
        """Slots in random order."""
        decode_pool = importlib.import_module("tsgdn.kernels.gated_delta_rule.decode_layer").decode_pool
        shape, device = case.shape, case.dy.device
        layer = draw(shape, "layer", "qk", device.type, case.dy.dtype, 1).x
        R, H, Dk, Dv = shape.rows, shape.heads, shape.key_dim, shape.value_dim
        index = torch.randperm(R, generator=torch.Generator().manual_seed(0)).to(device)
        tails = [torch.zeros(R, CONV - 1, H * (2 * Dk + Dv), device=device) for _ in case.states]
        parameters = {name: layer[name] for name in ("conv_weight", "A_log", "dt_bias", "weight")}
        inputs = {name: layer[name] for name in ("inputs", "raw", "gate")}
        inputs["state"] = case.states[0][index]  # a copy in the order of the rows; the pool itself is changed

        def call(i: int) -> Tensor:
            y = decode_pool(
                inputs["inputs"],
                inputs["gate"].flatten(2),
                inputs["raw"],
                case.states[i],
                tails[i],
                index,
                conv_weight=parameters["conv_weight"],
                norm_weight=parameters["weight"],
                A_log=parameters["A_log"],
                dt_bias=parameters["dt_bias"],
            )
            return y.unflatten(-1, (H, Dv))

        return Task(inputs, call, lambda row: _layer(case, row, parameters), parameters, per_head=False)


class Fla(Contestant):
    """flash-linear-attention. On Hopper its gated backward needs TileLang with the usual releases of Triton."""

    name = "fla"
    module = "fla"
    packages = ("fla-core", "tilelang")
    directions = DIRECTIONS

    def prepare(self, case: Case, direction: str) -> Task:
        """Chunked op, recurrent op for a step, or the layer itself."""
        os.environ["FLA_FLASH_QLA"] = "0"  # else 128/128 would be handed to flash_qla, a contestant of its own
        ops = importlib.import_module("fla.ops.gated_delta_rule")
        if direction == "step":
            return self._step(case, ops)
        if direction.startswith("layer"):
            return self._layer(case)
        x = _leaves(case.x, "q", "k", "v", "log_decay", "beta")
        ends = _ends(case)

        def call(_: int) -> Tensor:
            q, k, v, g, beta = (_flat(t, ends) for t in x.values())
            y = ops.chunk_gated_delta_rule(
                q, k, v, g, beta, scale=case.scale, use_qk_l2norm_in_kernel=case.norm, cu_seqlens=ends
            )[0]
            return y.view(case.dy.shape)

        return Task(x, call, lambda row: _rule(case, row))

    def _step(self, case: Case, ops: ModuleType) -> Task:
        x = {name: case.x[name] for name in ("q", "k", "v", "log_decay", "beta")}
        states = [state.transpose(2, 3).contiguous() for state in case.states]  # the layout its layer uses

        def call(i: int) -> Tensor:
            return ops.fused_recurrent_gated_delta_rule(
                x["q"], x["k"], x["v"], g=x["log_decay"], beta=x["beta"], scale=case.scale, initial_state=states[i],
                output_final_state=True, use_qk_l2norm_in_kernel=case.norm, state_v_first=True,
            )[0]  # fmt: skip

        def truth(row: dict[str, Tensor]) -> Tensor:
            return _rule(case, row, state=row["state"].transpose(2, 3))

        return Task({**x, "state": states[0]}, call, truth, per_head=False)

    def _layer(self, case: Case) -> Task:
        shape, given = case.shape, case.x
        H, Dk, Dv = shape.heads, shape.key_dim, shape.value_dim
        layer = (
            importlib.import_module("fla.layers")
            .GatedDeltaNet(hidden_size=H * Dk, head_dim=Dk, num_heads=H, expand_v=Dv / Dk, conv_size=CONV, layer_idx=0)
            .to(case.dy.device)
        )
        sizes, dtype = [H * Dk, H * Dk, H * Dv], case.dy.dtype
        names = ("q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj")
        parts = [*given["inputs"].split(sizes, dim=-1), *given["raw"].to(dtype).split([H, H], dim=-1)]
        x = {name: t.contiguous() for name, t in zip(names, [*parts, given["gate"].flatten(2)], strict=True)}
        x = _leaves(x, *names)
        for name in names:  # the layer as it is, its matrix products replaced by what they would have given
            setattr(layer, name, _Given(x[name]))
        layer.o_proj = nn.Identity()
        with torch.no_grad():
            for conv, weight in zip(("q", "k", "v"), given["conv_weight"].split(sizes), strict=True):
                getattr(layer, f"{conv}_conv1d").weight.copy_(weight[:, None])
            layer.A_log.copy_(given["A_log"])
            layer.dt_bias.copy_(given["dt_bias"])
            layer.o_norm.weight.copy_(given["weight"])
        layer.train()
        token = case.dy.new_zeros(shape.rows, shape.tokens, 1)

        def truth(row: dict[str, Tensor]) -> Tensor:
            inputs = torch.cat([row["q_proj"], row["k_proj"], row["v_proj"]], -1)
            raw = torch.cat([row["b_proj"], row["a_proj"]], -1)
            return _layer(case, {"inputs": inputs, "raw": raw, "gate": row["g_proj"].unflatten(-1, (H, Dv))}, given)

        parameters = dict(layer.named_parameters())
        return Task(x, lambda _: layer(token)[0].unflatten(-1, (H, Dv)), truth, parameters, per_head=False)


class _Given(nn.Module):
    """In place of a linear map: its product, made before."""

    def __init__(self, product: Tensor):
        super().__init__()
        self.product = (product,)  # in a tuple: it is no parameter

    def forward(self, _: Tensor) -> Tensor:
        return self.product[0]


def _ends(case: Case) -> Tensor | None:
    """Ends of packed rows; also of too many dense ones, since the launch grids of FLA end at 65 535 rows and heads."""
    shape = case.shape
    if case.ends is not None or shape.rows * shape.heads <= 65535:
        return case.ends
    return torch.arange(0, (shape.rows + 1) * shape.tokens, shape.tokens, device=case.dy.device)


def _flat(x: Tensor, ends: Tensor | None) -> Tensor:
    return x if ends is None else x.reshape(1, -1, *x.shape[2:])


class FlaLinear(Contestant):
    """flash-linear-attention without the delta rule and beta, in one kernel each way."""

    name = "fla_simple_gla"
    module = "fla"
    packages = ("fla-core",)
    norms = ("none",)

    def prepare(self, case: Case, direction: str) -> Task:
        """Simple gated linear attention."""
        fused = importlib.import_module("fla.ops.simple_gla").fused_chunk_simple_gla
        x, ends = _leaves(case.x, "q", "k", "v", "log_decay"), _ends(case)

        def call(_: int) -> Tensor:
            q, k, v, g = (_flat(t, ends) for t in x.values())
            return fused(q, k, v, g, scale=case.scale, cu_seqlens=ends)[0].view(case.dy.shape)

        def truth(row: dict[str, Tensor]) -> Tensor:
            return _rule(case, {**row, "beta": torch.ones_like(row["log_decay"])}, delta=False)

        return Task(x, call, truth)


class FlashQla(Contestant):
    """Qwen's TileLang kernels: key and value size 128 only."""

    name = "flash_qla"
    module = "flash_qla"
    packages = ("flash-qla", "tilelang")
    packed = False

    def fits(self, shape: Shape) -> bool:
        """128/128."""
        return shape.key_dim == shape.value_dim == 128

    def prepare(self, case: Case, direction: str) -> Task:
        """The op, called directly."""
        rule = importlib.import_module("flash_qla").chunk_gated_delta_rule
        x = _leaves(case.x, "q", "k", "v", "log_decay", "beta")

        def call(_: int) -> Tensor:
            return rule(*x.values(), scale=case.scale, use_qk_l2norm_in_kernel=case.norm)[0]

        return Task(x, call, lambda row: _rule(case, row))


class Mamba2(Contestant):
    """mamba_ssm's Triton kernels for Mamba-2: q = C, k = B, v = x, and dt both decays and writes.

    Its default chunk of 256 tokens would waste most of a tile on short rows: min(256, next power of two) is used. Every
    head has its own B and C, as ours have.
    """

    name = "mamba2"
    module = "mamba_ssm"
    packages = ("mamba-ssm",)
    norms = ("none",)

    def prepare(self, case: Case, direction: str) -> Task:
        """The scan of all chunks."""
        _bare("mamba_ssm")
        scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        x = _leaves(case.x, "q", "k", "v", "dt")
        rates = -torch.ones(case.shape.heads, device=case.dy.device)
        chunk = min(256, 2 ** (case.shape.tokens - 1).bit_length())
        rows = None
        if case.ends is not None:
            numbers = torch.arange(case.shape.rows, dtype=torch.int32, device=case.dy.device)
            rows = numbers.repeat_interleave(case.ends.diff())[None]

        def call(_: int) -> Tensor:
            return scan(x["v"], x["dt"], rates, x["k"], x["q"], chunk_size=chunk, seq_idx=rows)

        def truth(row: dict[str, Tensor]) -> Tensor:
            # it has no scale
            q = row["q"] / case.scale
            return _rule(case, {**row, "q": q, "log_decay": -row["dt"], "beta": row["dt"]}, delta=False)

        return Task(x, call, truth)


def _bare(package: str) -> None:
    """Makes submodules importable without running the package's `__init__`, which wants a compiled extension."""
    spec = find_spec(package)
    if package not in sys.modules and spec is not None:
        module = ModuleType(package)
        module.__path__ = list(spec.submodule_search_locations or ())
        module.__spec__ = spec
        sys.modules[package] = module


class Attention(Contestant):
    """Causal softmax attention of torch: another function, for scale."""

    name = "sdpa"
    module = "torch"
    norms = ("none",)
    packed = False

    def prepare(self, case: Case, direction: str) -> Task:
        """With the heads in front, as views."""
        x = _leaves(case.x, "q", "k", "v")

        def attend(row: Mapping[str, Tensor]) -> Tensor:
            q, k, v = (row[name].transpose(1, 2) for name in ("q", "k", "v"))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale).transpose(1, 2)

        return Task(x, lambda _: attend(x), attend)

    def fits(self, shape: Shape) -> bool:
        """Its square is not computed in float64 beyond some thousand tokens."""
        return shape.tokens <= 16384


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Ours(), OursSegmented(), OursLinear(), OursPool(), OursTorch(), Fla(), FlaLinear(), FlashQla(), Mamba2(),
        Attention(),
    )
}  # fmt: skip

OURS = ("tsgdn", "tsgdn_segments", "tsgdn_ssd", "tsgdn_pool")
"""What `ratios` sets in relation to the others."""


@contextlib.contextmanager
def _demanded(kernel: str | None) -> Iterator[None]:
    """The op on one path, whatever the environment says otherwise."""
    before = os.environ.get("TSGDN_KERNEL")
    if kernel is None:
        yield
        return
    os.environ["TSGDN_KERNEL"] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ["TSGDN_KERNEL"]
        else:
            os.environ["TSGDN_KERNEL"] = before


class Cell(NamedTuple):
    """One measurement's keys."""

    shape: str
    contestant: str
    direction: str
    norm: str


def done(results: Path, origin: Mapping[str, Any]) -> set[Cell]:
    """Cells that have a time, or a word instead, of this commit on this hardware."""
    return {
        Cell(line["shape"], line["contestant"], line["direction"], line["norm"])
        for line in _read(results)
        if line["metric"] == "us" and all(line[name] == str(origin[name]) for name in ("commit", "hardware"))
    }


def _read(results: Path) -> list[dict[str, str]]:
    if not results.is_file():
        return []
    with results.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(
    shapes: Sequence[Shape],
    contestants: Sequence[str],
    directions: Sequence[str] = DIRECTIONS,
    norms: Sequence[str] = NORMS,
    *,
    results: Path,
    device: str = "cuda",
    seed: int = 0,
    resume: bool = False,
) -> int:
    """Measures every cell that its contestant has; returns how many failed or were wrong.

    Args:
        shapes: of `SHAPES`; without a GPU they are made small.
        contestants: keys of `CONTESTANTS`; those that are not installed are left out.
        directions: of `DIRECTIONS`.
        norms: of `NORMS`.
        results: CSV to append to, row by row.
        device: "cuda", or "cpu" to see that it runs.
        seed: of the inputs.
        resume: leave out what has rows of this commit on this hardware.
    """
    origin = provenance(device)
    known = done(results, origin) if resume else set()
    absent = [name for name in contestants if not CONTESTANTS[name].installed()]
    if absent:
        _say(f"not installed: {', '.join(absent)}")
    failed = 0
    for shape in shapes:
        for direction in directions:
            for norm in norms:
                entries = [
                    CONTESTANTS[name]
                    for name in contestants
                    if name not in absent
                    and CONTESTANTS[name].supports(shape, direction, norm, device)
                    and Cell(shape.name, name, direction, norm) not in known
                ]
                if entries:
                    sized = shape.small() if device == "cpu" else shape
                    failed += _Bench(sized, direction, norm, results, device, seed, origin).measure(entries)
    return failed


class _Bench:
    """The contestants of one shape, direction and norm, one after the other."""

    def __init__(
        self, shape: Shape, direction: str, norm: str, results: Path, device: str, seed: int, origin: dict[str, Any]
    ):
        self.shape, self.direction, self.norm, self.results, self.device = shape, direction, norm, results, device
        self.seed, self.origin = seed, origin
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.backward = direction.endswith("+bwd")
        self.failed = 0

    def measure(self, entries: Sequence[Contestant]) -> int:
        """Checks all, then times in turns those that are right."""
        self.case = draw(self.shape, self.direction, self.norm, self.device, self.dtype, self.seed)
        for word, (bandwidth, rate) in PEAKS.items():
            if word in str(self.origin["hardware"]):
                least = floor_us(self.shape, self.direction, bandwidth, rate)
                self._row("floor", "", "floor_us", f"{least:.5g}", "us")
        ready: dict[str, tuple[Callable[[], object], list[float]]] = {}
        launches = self._launches()
        for entry in entries:
            timed = self._first(entry, launches)
            if timed is not None:
                ready[entry.name] = (timed, [])
        for _ in range(3):
            for timed, taken in ready.values():
                taken += [us / launches for us in times(timed, self.device)]
        for name, (_, taken) in ready.items():
            p20, p50, p80 = _quantiles(taken)
            self._row(name, CONTESTANTS[name].versions(), "us", f"{p50:.5g}", "us", p20, p80, len(taken))
            _say(f"{self._cell(name)}: {p50:.4g} us")
        if self.direction != "step" and self.device != "cpu":
            for name, (timed, _) in ready.items():
                p20, p50, p80 = _quantiles(eager(timed))
                self._row(name, CONTESTANTS[name].versions(), "eager_us", f"{p50:.5g}", "us", p20, p80, EAGER)
        if self.device != "cpu":
            torch.cuda.empty_cache()  # the next shape needs other blocks, and some shapes need most of the memory
        return self.failed

    def _launches(self) -> int:
        """Of one replay: a step is too short to be timed alone."""
        if self.direction != "step" or self.device == "cpu":
            return 1
        return 20 if len(self.case.states) > 1 else 4

    def _cell(self, name: str) -> str:
        return f"{self.shape.name} {name} {self.direction} {self.norm}"

    def _row(
        self,
        name: str,
        versions: str,
        metric: str,
        value: str,
        unit: str,
        p20: float | str = "",
        p80: float | str = "",
        n: int | str = 1,
    ) -> None:
        config = ", ".join(text for text in (self.shape.text, versions, ptxas()) if text)
        quantiles = {"p20": p20 if p20 == "" else f"{p20:.5g}", "p80": p80 if p80 == "" else f"{p80:.5g}"}
        keys = {"shape": self.shape.name, "contestant": name, "direction": self.direction, "norm": self.norm}
        line = row(
            metric=metric, value=value, unit=unit, n=n, seed=self.seed, config=config, origin=self.origin,
            dtype=str(self.dtype).removeprefix("torch."), **quantiles, **keys,
        )  # fmt: skip
        append(self.results, line)

    def _first(self, entry: Contestant, launches: int) -> Callable[[], object] | None:
        """First call, check and memory; what is to be timed, or None after writing why not."""
        try:
            task = entry.prepare(self.case, self.direction)
            pieces = list(self._pieces(task))
            poison(self.case)
            begin = time.perf_counter()
            y, gradients = self._call(task, 0)
            _wait(self.device)
            first = time.perf_counter() - begin
            errors = self._errors(task, pieces, y, gradients)
            del y, gradients, pieces
            peak = self._peak(task)
            work = functools.partial(self._call, task)
            timed = _replay(work, launches, len(self.case.states)) if launches > 1 else functools.partial(work, 0)
        except Exception as error:  # whatever a foreign kernel raises ends its cell, not the run
            word = "OOM" if isinstance(error, torch.OutOfMemoryError) else "failed"
            self._lost(entry, word, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            _wait(self.device)  # a broken device raises here: nothing after it could be trusted
            return None
        worst = ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
        self._row(entry.name, entry.versions(), "error", f"{max(errors.values()):.3g}", "")
        if any(not value <= BOUNDS.get(name, 0.03) for name, value in errors.items()):
            self._lost(entry, "wrong", f"relative errors {worst}")
            return None
        self._row(entry.name, entry.versions(), "first_call_s", f"{first:.4g}", "s")
        if peak is not None:
            self._row(entry.name, entry.versions(), "peak_mib", f"{peak:.5g}", "MiB")
        _say(f"{self._cell(entry.name)}: right (errors {worst}), first call {first:.3g} s")
        return timed

    def _lost(self, entry: Contestant, word: str, why: str) -> None:
        self.failed += 1
        self._row(entry.name, entry.versions(), "us", word, "us")
        _say(f"{self._cell(entry.name)}: {word}: {why}")

    def _call(self, task: Task, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.backward:
            with torch.no_grad():
                return task.call(i), {}
        leaves = {**task.inputs, **task.parameters}
        y = task.call(i)
        return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), self.case.dy), strict=True))

    def _pieces(self, task: Task) -> Iterator[tuple["_Piece", dict[str, Tensor]]]:
        """First and last row in float64, copied before anything runs: a step may change its state."""
        for piece in self._rows(task.per_head):
            yield piece, {name: piece.of(x).double().requires_grad_(self.backward) for name, x in task.inputs.items()}

    def _rows(self, per_head: bool) -> Iterator["_Piece"]:
        shape = self.shape
        heads = torch.tensor([0, shape.heads - 1], device=self.case.dy.device) if per_head else None
        for number in sorted({0, shape.rows - 1}):
            if self.case.ends is None:
                yield _Piece((slice(number, number + 1),), heads)
            else:
                begin, end = self.case.ends[number : number + 2].tolist()
                yield _Piece((slice(None), slice(begin, end)), heads)

    def _errors(
        self,
        task: Task,
        pieces: Sequence[tuple["_Piece", dict[str, Tensor]]],
        y: Tensor,
        gradients: Mapping[str, Tensor],
    ) -> dict[str, float]:
        """Relative L2 errors of the output and of each gradient."""
        wrong: dict[str, float] = {}
        right: dict[str, float] = {}
        for piece, inputs in pieces:
            truth = task.truth(inputs)
            found = {"y": (piece.of(y), truth.detach())}
            if self.backward:
                wanted = torch.autograd.grad(truth, list(inputs.values()), piece.of(self.case.dy).double())
                found |= {name: (piece.of(gradients[name]), exact) for name, exact in zip(inputs, wanted, strict=True)}
            for name, (got, exact) in found.items():
                wrong[name] = wrong.get(name, 0.0) + float((got.double() - exact).square().sum())
                right[name] = right.get(name, 0.0) + float(exact.square().sum())
        return {name: math.sqrt(wrong[name] / right[name]) for name in wrong}

    def _peak(self, task: Task) -> float | None:
        """Most memory of one training call above what is there before it, in MiB."""
        if not self.backward or self.device == "cpu":
            return None
        _wait(self.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._call(task, 0)
        _wait(self.device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class _Piece(NamedTuple):
    """One row of a tensor, and two of its heads."""

    where: tuple[slice, ...]
    heads: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        cut = x.detach()[self.where]
        return cut.clone() if self.heads is None else cut.index_select(2, self.heads)


def poison(case: Case) -> None:
    """Fills memory that the next allocations get with NaN, so that an element nobody wrote shows."""
    blocks = [torch.full_like(x, math.nan) for x in (*case.x.values(), case.dy) for _ in range(2)]
    del blocks


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _replay(work: Callable[[int], object], launches: int, pools: int) -> Callable[[], object]:
    """A CUDA graph of several calls, each on the next of the states."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            work(i % pools)

    def again() -> None:
        assert work is not None  # what the graph reads must stay alive
        graph.replay()

    return again


EAGER = 7
"""How often ten calls in a row are timed."""


def times(work: Callable[[], object], device: str, budget: int | float = 0.2) -> list[float]:
    """Microseconds of single calls, for about `budget` seconds, at least 17 and at most 70 of them (on a CPU 3).

    As `triton.testing.do_bench`: events around the call, the L2 cache overwritten before it. In addition the device
    waits before each call until the host has launched it, so that implementations of many small launches are not
    charged with the host's time.
    """
    if device == "cpu":
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            work()
            taken.append((time.perf_counter() - begin) * 1e6)
        return taken
    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    start, host = torch.cuda.Event(enable_timing=True), 0.0
    end = torch.cuda.Event(enable_timing=True)
    for _ in range(2):
        torch.cuda.synchronize()
        start.record()
        begin = time.perf_counter()
        work()
        host = time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize()
    count = min(70, max(17, int(budget / (start.elapsed_time(end) * 1e-3))))
    cycles = int(min(1.5 * host, 0.02) * 2e9)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for first, last in events:
        flush.zero_()
        torch.cuda._sleep(cycles)
        first.record()
        work()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) * 1e3 for first, last in events]


def eager(work: Callable[[], object]) -> list[float]:
    """Microseconds of a call where the host launches call after call: what a training loop of this op alone sees."""
    taken = []
    for _ in range(EAGER):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            work()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) * 1e5)
    return taken


def _quantiles(taken: Sequence[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(taken, n=5, method="inclusive")
    return fifths[0], statistics.median(taken), fifths[3]


@functools.cache
def ptxas() -> str:
    """The assembler's version: it decides as much as the compiler's; empty without Triton or a GPU."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return ""
    folder = Path(str(importlib.import_module("triton").__file__)).parent
    path = os.environ.get("TRITON_PTXAS_PATH", str(folder / "backends" / "nvidia" / "bin" / "ptxas"))
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"ptxas {told.rsplit('V', 1)[-1].split()[0]}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ratios(lines: Iterable[Mapping[str, str]], ours: str = "tsgdn") -> list[dict[str, Any]]:
    """How many times as long as ours each contestant takes, from the last time of each cell.

    Args:
        lines: rows of a results.csv.
        ours: the contestant that the others are divided by.

    Returns:
        Rows of shape, direction, norm, hardware, contestant, us, ours_us and ratio; the floor is a contestant too, its
        ratio being the part of the floor's speed that is reached. Cells of ours without a time are left out, and words
        such as "wrong" are kept in `us` with no ratio.
    """
    last: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        if line["metric"] in ("us", "floor_us"):
            cell = (line["shape"], line["direction"], line["norm"], line["hardware"])
            last.setdefault(cell, {})[line["contestant"]] = line["value"]
    found = []
    for (shape, direction, norm, where), values in last.items():
        base = _number(values.get(ours, ""))
        if base is None:
            continue
        for contestant, value in values.items():
            if contestant != ours:
                us = _number(value)
                found.append(
                    {
                        "shape": shape, "direction": direction, "norm": norm, "hardware": where,
                        "contestant": contestant, "us": value if us is None else us, "ours_us": base,
                        "ratio": None if us is None else us / base,
                    }
                )  # fmt: skip
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def report(results: Path) -> str:
    """The ratios as a table of plain text; empty without rows."""
    lines, out = _read(results), []
    for ours in OURS:
        for found in ratios(lines, ours):
            ratio = "" if found["ratio"] is None else f"{found['ratio']:.2f}"
            us = found["us"] if isinstance(found["us"], str) else f"{found['us']:.4g}"
            out.append(
                (found["shape"], found["direction"], found["norm"], ours, f"{found['ours_us']:.4g}",
                 found["contestant"], us, ratio)
            )  # fmt: skip
    if not out:
        return ""
    out.insert(0, ("shape", "direction", "norm", "ours", "us", "contestant", "us", "ratio"))
    widths = [max(len(line[i]) for line in out) for i in range(8)]
    rule = "".join
    return "\n".join(
        rule(f"{text:>{width}}  " if i in (4, 6, 7) else f"{text:<{width}}  " for i, (text, width) in columns).rstrip()
        for columns in (list(enumerate(zip(line, widths, strict=True))) for line in out)
    )


def plot(results: Path) -> list[Path]:
    """Draws, per direction and norm, the speed of ours relative to the others by shape, beside the results.

    Returns:
        The pictures that were written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    apart = (*OURS, "floor")
    found = [line for line in ratios(_read(results)) if line["ratio"] is not None and line["contestant"] not in apart]
    order = [shape.name for shape in _shapes()]
    written = []
    for direction in DIRECTIONS:
        for norm in NORMS:
            lines = [line for line in found if line["direction"] == direction and line["norm"] == norm]
            if not lines:
                continue
            shapes = sorted({line["shape"] for line in lines}, key=order.index)
            names = list(dict.fromkeys(line["contestant"] for line in lines))
            figure, axes = pyplot.subplots(figsize=(max(5.0, 1.1 * len(shapes)), 3.6), layout="constrained")
            for number, name in enumerate(names):
                bars = {line["shape"]: line["ratio"] for line in lines if line["contestant"] == name}
                places = [i + 0.8 * (number - (len(names) - 1) / 2) / len(names) for i in range(len(shapes))]
                heights = [bars.get(shape, math.nan) for shape in shapes]
                axes.bar(places, heights, 0.8 / len(names), label=name)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_xticks(range(len(shapes)), shapes, rotation=45 if len(shapes) > 6 else 0)
            axes.set_ylabel("their time / time of tsgdn")
            axes.set_title(f"{direction}, norm {norm}; {lines[-1]['hardware']}", fontsize=10)
            figure.legend(fontsize=8, ncols=3, loc="outside lower center")
            path = results.parent / f"speedup_{direction.replace('+', '_')}_{norm}.png"
            figure.savefig(path, dpi=120)
            pyplot.close(figure)
            written.append(path)
    return written
