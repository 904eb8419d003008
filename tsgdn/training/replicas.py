"""Many small models of one shape trained as one: copies that differ in seed, learning rate and data, side by side.

The copies are a leading dimension that `torch.vmap` adds to an unmodified module: a product with a matrix of weights
becomes a batch of products, and every op of this package takes the copies as further rows (`tsgdn.kernels.replicas`).
So R small models cost the launches of one. All weights lie in one matrix (R, P), and the optimiser is a handful of
operations on it. Nothing in a step waits for the device, so on a GPU all of it is one CUDA graph.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

WARM_UP_STEPS = 3
"""Steps before a graph is captured, taken back again: kernels are compiled and buffers allocated in them."""


class Replicas:
    """R copies of a module that train side by side, each with its own seed, learning rate and data.

    AdamW with decoupled weight decay (arXiv 1711.05101; none on gates, norms, biases and embeddings), the gradient of
    each copy clipped by its own norm, a linear warm-up and a cosine to zero. A copy is the model that it would be if it
    were trained alone, up to rounding. Its loss may not choose elements by their values (`x[mask]`): multiply instead.

    Args:
        build: makes the module, on the CPU, from torch's global generator: forward(**inputs, state=None) -> (y, state).
        seeds: one per copy.
        learning_rates: the peak of each copy.
        loss: of one copy's outputs and batch, a scalar.
        steps: of the whole training.
        warm_up: share of the steps over which the learning rate rises.
        betas: decays of the gradient's first and second moment.
        weight_decay: of matrices.
        clip: largest norm of a copy's gradient.
        device: where the copies live.
        graphs: replay steps as CUDA graphs, one per shape of a batch; None = on a GPU.

    Raises:
        ValueError: arguments that do not fit each other.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        *,
        seeds: Sequence[int],
        learning_rates: Sequence[int | float],
        loss: Callable[[Any, Mapping[str, Tensor]], Tensor],
        steps: int,
        warm_up: int | float = 0.1,
        betas: tuple[int | float, int | float] = (0.9, 0.95),
        weight_decay: int | float = 0.01,
        clip: int | float = 1.0,
        device: torch.device | str = "cpu",
        graphs: bool | None = None,
    ) -> None:
        if not seeds or len(seeds) != len(learning_rates):
            raise ValueError(f"{len(seeds)} seeds, {len(learning_rates)} learning rates; expected one of both per copy")
        if steps < 1 or not 0 <= warm_up <= 1 or clip <= 0:
            raise ValueError(f"steps {steps}, warm_up {warm_up}, clip {clip}; expected at least 1, a share, above 0")
        self.device = torch.device(device)
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs=True on {self.device}; CUDA graphs need a GPU, leave graphs out")
        self.seeds, self.learning_rates = [int(s) for s in seeds], [float(r) for r in learning_rates]
        self.steps, self.clip, self.betas = steps, float(clip), betas
        self._build, self._loss = build, loss
        self._graphed = self.device.type == "cuda" if graphs is None else graphs
        self._graphs: dict[Any, tuple[Any, dict[str, Tensor], Tensor]] = {}
        self._pool: Any = None

        modules = [self._seeded(seed) for seed in self.seeds]
        taken = inspect.signature(modules[0].forward).parameters.values()
        self._inputs = {p.name: p.default is p.empty for p in taken if p.kind != p.VAR_KEYWORD and p.name != "state"}
        trained = {name: p for name, p in modules[0].named_parameters() if p.requires_grad}
        self._shapes = {name: p.shape for name, p in trained.items()}
        self._sizes = [p.numel() for p in trained.values()]
        formats = {p.dtype for p in trained.values()}
        if len(formats) != 1:
            raise ValueError(f"the module's parameters are of {len(formats)} number formats; expected one")
        matrices = [torch.cat([m.get_parameter(name).detach().flatten().cpu() for name in trained]) for m in modules]
        self._weights = torch.stack(matrices).to(self.device)
        self._constants = self._stacked_constants(modules)
        shares = [weight_decay * decayed(modules[0], name) for name in trained]
        repeated = torch.tensor(shares, dtype=torch.float64).repeat_interleave(torch.tensor(self._sizes))
        self._decay = repeated.to(self._weights)
        self._module = modules[0].to(self.device)

        self._mean, self._square = torch.zeros_like(self._weights), torch.zeros_like(self._weights)
        self._failed = torch.zeros(len(seeds), dtype=torch.bool, device=self.device)
        self._step = torch.zeros(1, dtype=torch.long, device=self.device)
        self._steps_done = 0
        self._rates = torch.tensor(self.learning_rates, dtype=torch.float64, device=self.device)
        self._by_step = _schedule(steps, float(warm_up), betas).to(self.device)

    @property
    def steps_done(self) -> int:
        """Steps taken so far."""
        return self._steps_done

    @property
    def failed(self) -> Bool[Tensor, " R"]:
        """Copies whose loss or gradient was not finite once: they stay as they were before it."""
        return self._failed.clone()

    def step(self, batch: Mapping[str, Tensor]) -> Float[Tensor, " R"]:
        """One step of all copies.

        Args:
            batch: leaves (R, B, ...); those that `forward` names are its inputs, `loss` sees all.

        Returns:
            The loss of each copy before the step, not a number where it failed. On a GPU nothing has waited for it.

        Raises:
            ValueError: leaves that do not fit, or no steps left.
        """
        if self._steps_done >= self.steps:
            raise ValueError(f"all {self.steps} steps are done, where the learning rate ends; build with more steps")
        self._check(batch, [name for name, needed in self._inputs.items() if needed])
        if not self._module.training:
            self._module.train()
        given = {name: leaf.to(self.device, non_blocking=True) for name, leaf in batch.items()}
        losses = self._replay(given) if self._graphed else self._train(given)
        self._steps_done += 1
        return losses

    def __call__(self, inputs: Mapping[str, Tensor], state: Any = None) -> tuple[Any, Any]:
        """Outputs and end states of all copies without a gradient, the module in evaluation mode.

        Args:
            inputs: of `forward`, leaves (R, B, T, ...).
            state: leaves (R, B, ...); None = nothing seen yet.

        Raises:
            ValueError: leaves that do not fit.
        """
        unknown = [name for name in inputs if name not in self._inputs]
        if unknown:
            raise ValueError(f"inputs has {unknown[0]!r}; the module's forward takes {', '.join(self._inputs)}")
        self._check(inputs, [])
        if self._module.training:
            self._module.eval()
        given = {name: leaf.to(self.device, non_blocking=True) for name, leaf in inputs.items()}
        with torch.no_grad():
            weights = self._by_name(self._weights)
            return vmap(self._forward, in_dims=(0, 0, 0, None if state is None else 0), randomness="different")(
                weights, self._constants, given, state
            )

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that a training goes on from: tensors, numbers, and dictionaries and lists of them."""
        matrices = {"weights": self._weights, "mean": self._mean, "square": self._square}
        return {
            **{key: {n: x.clone() for n, x in self._by_name(matrix).items()} for key, matrix in matrices.items()},
            "failed": self._failed.clone(),
            "steps_done": self._steps_done,
            "steps": self.steps,
            "seeds": list(self.seeds),
            "learning_rates": list(self.learning_rates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called, bitwise on a CPU.

        Raises:
            ValueError: the state of other copies.
        """
        for key in ("seeds", "learning_rates", "steps"):
            if state[key] != getattr(self, key):
                raise ValueError(f"the state has {key} {state[key]}, these replicas {getattr(self, key)}; build alike")
        shapes = {name: tuple(x.shape[1:]) for name, x in state["weights"].items()}
        if shapes != {name: tuple(shape) for name, shape in self._shapes.items()}:
            raise ValueError("the state's weights have other names or shapes than the module's; build the same module")
        for key, matrix in (("weights", self._weights), ("mean", self._mean), ("square", self._square)):
            for name, part in self._by_name(matrix).items():
                part.copy_(state[key][name])
        self._failed.copy_(state["failed"])
        self._steps_done = int(state["steps_done"])
        self._step.fill_(self._steps_done)

    def replica(self, index: int) -> nn.Module:
        """A module of its own with the weights of one copy, in evaluation mode.

        Raises:
            IndexError: there is no such copy.
        """
        index = range(len(self.seeds))[index]
        module = self._seeded(self.seeds[index]).to(self.device).eval()
        with torch.no_grad():
            named = dict(module.named_parameters())
            for name, weights in self._by_name(self._weights).items():
                named[name].copy_(weights[index])
        return module

    def _seeded(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._build()

    def _stacked_constants(self, modules: Sequence[nn.Module]) -> dict[str, Tensor]:
        """Buffers and frozen parameters that differ from copy to copy; the others stay in the module."""
        found = {}
        for name, first in [*modules[0].named_parameters(), *modules[0].named_buffers()]:
            if name not in self._shapes:
                get = nn.Module.get_parameter if isinstance(first, nn.Parameter) else nn.Module.get_buffer
                stacked = torch.stack([get(m, name).detach().to(self.device) for m in modules])
                if not torch.equal(stacked, stacked[:1].expand_as(stacked)):
                    found[name] = stacked
        return found

    def _by_name(self, matrix: Tensor) -> dict[str, Tensor]:
        """Views of a matrix (R, P) as the parameters (R, ...)."""
        parts = zip(self._shapes.items(), matrix.split(self._sizes, 1), strict=True)
        return {name: part.view(-1, *shape) for (name, shape), part in parts}

    def _check(self, leaves: Mapping[str, Tensor], needed: Sequence[str]) -> None:
        for name in needed:
            if name not in leaves:
                raise ValueError(f"the batch has {', '.join(leaves)}; the module's forward also needs {name!r}")
        copies = len(self.seeds)
        for name, leaf in leaves.items():
            if leaf.dim() < 2 or leaf.shape[0] != copies:
                raise ValueError(f"{name} is {tuple(leaf.shape)}; of {copies} copies it must be ({copies}, B, ...)")

    def _forward(self, weights: dict[str, Tensor], constants: dict[str, Tensor], inputs: Any, state: Any) -> Any:
        return functional_call(self._module, {**weights, **constants}, (), {**inputs, "state": state})

    def _one_loss(self, weights: dict[str, Tensor], constants: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: leaf for name, leaf in batch.items() if name in self._inputs}
        return self._loss(self._forward(weights, constants, inputs, None)[0], batch)

    @torch.enable_grad()
    def _train(self, batch: dict[str, Tensor]) -> Tensor:
        leaf = self._weights.detach().requires_grad_()
        losses = vmap(self._one_loss, randomness="different")(self._by_name(leaf), self._constants, batch)
        if losses.dim() != 1:
            raise ValueError(f"loss gave {tuple(losses.shape[1:])} for a copy; expected a scalar, as of .mean()")
        # The gradient of the sum: no copy's loss depends on another copy's weights.
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return self._update(losses.detach(), gradient)

    @torch.no_grad()
    def _update(self, losses: Tensor, gradient: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(gradient, dim=1)
        self._failed.logical_or_(~(losses.isfinite() & norms.isfinite()))
        scale = (self.clip / (norms + 1e-6)).clamp(max=1.0)
        gradient = (gradient * scale[:, None]).masked_fill_(self._failed[:, None], 0.0)
        # Looked up, so that a graph finds the numbers of its step; beyond the end only while a graph is prepared.
        factor, first, second = self._by_step.index_select(0, self._step.clamp(max=self.steps - 1))[0].unbind()
        rates = (self._rates * factor).masked_fill_(self._failed, 0.0)
        rate, corrected = (x.to(gradient.dtype)[:, None] for x in (rates, rates / first))
        self._mean.lerp_(gradient, 1 - self.betas[0])
        self._square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        root = (self._square / second.to(gradient.dtype)).sqrt_().add_(1e-8)
        self._weights.mul_(1 - rate * self._decay).sub_(corrected * self._mean / root)
        self._step.add_(1)
        return losses.masked_fill(self._failed, torch.nan)

    def _replay(self, batch: dict[str, Tensor]) -> Tensor:
        key = tuple((name, leaf.shape, leaf.dtype) for name, leaf in sorted(batch.items()))
        if key not in self._graphs:
            self._graphs[key] = self._captured({name: leaf.clone() for name, leaf in batch.items()})
        graph, buffers, losses = self._graphs[key]
        for name, leaf in batch.items():
            buffers[name].copy_(leaf)
        graph.replay()
        return losses.clone()  # the next replay, of whatever graph, writes over it

    def _captured(self, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], Tensor]:
        """A graph of one step on these buffers; all graphs share their memory, as one runs at a time."""
        held = (self._weights, self._mean, self._square, self._failed, self._step)
        before = [x.clone() for x in held]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._train(batch)
        torch.cuda.current_stream(self.device).wait_stream(side)
        for x, old in zip(held, before, strict=True):
            x.copy_(old)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating, as those that load data do.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses = self._train(batch)
        return graph, batch, losses


def decayed(module: nn.Module, name: str) -> bool:
    """Whether weight decay acts on that parameter: not on vectors, marked parameters and embeddings."""
    parameter = module.get_parameter(name)
    embedding = isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    return parameter.dim() >= 2 and not getattr(parameter, "no_weight_decay", False) and not embedding


def _schedule(steps: int, warm_up: float, betas: tuple[int | float, int | float]) -> Float[Tensor, "steps 3"]:
    """For each step its share of the peak learning rate, and what the two moments are divided by."""
    rising = max(1, round(warm_up * steps))
    rows = []
    for step in range(steps):
        done = min(1.0, max(0, step - rising) / max(1, steps - rising))
        factor = (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * done))
        rows.append([factor, *(1 - beta ** (step + 1) for beta in betas)])
    return torch.tensor(rows, dtype=torch.float64)
