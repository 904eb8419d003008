"""What became of a write: exact coefficients of a linear memory from its own gates and keys, and memories set by hand.

The memory is (one head; leading axes are a batch)

    Sbar_t = Diag(alpha_t) S_{t-1};   rho_t = z_t - Sbar_t^T e_t;   S_t = Sbar_t + k_t rho_t^T;   o_t = s S_t^T q_t

so it is linear in the writes z: what survives of one of them can be computed instead of estimated.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Attribution(NamedTuple):
    """Why a write was lost, in natural log units (0 = nothing lost, negative = lost).

    Attributes:
        survived: |contribution to the final read| / |the same for a read by this query right after the exposure|.
        without_erase: the same with e = 0 after the exposure.
        without_decay: the same with alpha = 1 after the exposure.
        decay_loss: Shapley share of decay in ln survived.
        erase_overlap: that of erasing; both add up to ln survived.
    """

    survived: Float[np.ndarray, "*lead"]
    without_erase: Float[np.ndarray, "*lead"]
    without_decay: Float[np.ndarray, "*lead"]
    decay_loss: Float[np.ndarray, "*lead"]
    erase_overlap: Float[np.ndarray, "*lead"]


class HandSet(NamedTuple):
    """Recall with hand-set gates: the rare write's coefficient in its read (mean and standard error over trials), and
    the squared error of the revised common values as a share of their power.
    """

    rare: float
    rare_error: float
    revised_nmse: float


def run_memory(
    k: Float[np.ndarray, "*lead T Dk"],
    e: Float[np.ndarray, "*lead T Dk"],
    z: Float[np.ndarray, "*lead T Dv"],
    alpha: Float[np.ndarray, "*lead T Da"],
    q: Float[np.ndarray, "*lead Dk"],
    *,
    scale: int | float = 1.0,
) -> Float[np.ndarray, "*lead Dv"]:
    """The read of the memory after the last step, by recurrence; `alpha` has one entry (scalar decay) or Dk."""
    S = np.zeros((*k.shape[:-2], k.shape[-1], z.shape[-1]))
    for t in range(k.shape[-2]):
        S = S * alpha[..., t, :, None]
        rho = z[..., t, :] - np.einsum("...kv,...k->...v", S, e[..., t, :])
        S = S + k[..., t, :, None] * rho[..., None, :]
    return scale * np.einsum("...kv,...k->...v", S, q)


def write_coefficients(
    k: Float[np.ndarray, "*lead T Dk"],
    e: Float[np.ndarray, "*lead T Dk"],
    alpha: Float[np.ndarray, "*lead T Da"],
    q: Float[np.ndarray, "*lead Dk"],
    *,
    scale: int | float = 1.0,
) -> Float[np.ndarray, "*lead T"]:
    """Coefficient of every write z_t in the read after the last step: s k_t . p_t.

    Backwards from p = q:  p_{t-1} = alpha_t (.) (p_t - e_t (k_t . p_t)). The read is the sum of coefficient times z_t.
    """
    p, out = q.astype(float), np.empty(k.shape[:-1])
    for t in range(k.shape[-2] - 1, -1, -1):
        match = np.einsum("...k,...k->...", k[..., t, :], p)
        out[..., t] = scale * match
        p = alpha[..., t, :] * (p - e[..., t, :] * match[..., None])
    return out


def contribution(
    k: Float[np.ndarray, "*lead T Dk"],
    e: Float[np.ndarray, "*lead T Dk"],
    z: Float[np.ndarray, "*lead T Dv"],
    alpha: Float[np.ndarray, "*lead T Da"],
    q: Float[np.ndarray, "*lead Dk"],
    exposure: Bool[np.ndarray, " T"],
    *,
    scale: int | float = 1.0,
) -> Float[np.ndarray, "*lead Dv"]:
    """What the writes of the exposure add to the final read: exactly what the read loses when they are set to zero."""
    weight = write_coefficients(k, e, alpha, q, scale=scale) * exposure
    return np.einsum("...t,...tv->...v", weight, z)


def attribute(
    k: Float[np.ndarray, "*lead T Dk"],
    e: Float[np.ndarray, "*lead T Dk"],
    z: Float[np.ndarray, "*lead T Dv"],
    alpha: Float[np.ndarray, "*lead T Da"],
    q: Float[np.ndarray, "*lead Dk"],
    exposure: Bool[np.ndarray, " T"],
) -> Attribution:
    """Separates what decay and what erasing took from the writes of the exposure.

    Erasing and decay are switched off after the exposure only: within it a delta rule corrects its own writes, which is
    no loss. The two-player Shapley value of ln survived is the mean over both orders of switching on; for a scalar
    decay the two effects multiply, so all orders agree.

    Raises:
        ValueError: the exposure is empty.
    """
    if not exposure.any():
        raise ValueError("the exposure has no step; mark the steps that wrote the rare value")
    end = int(np.flatnonzero(exposure)[-1]) + 1
    later = np.arange(k.shape[-2]) >= end
    off_e, off_a = np.where(later[:, None], 0.0, e), np.where(later[:, None], 1.0, alpha)

    def norm(erase: np.ndarray, decay: np.ndarray) -> np.ndarray:
        return np.linalg.norm(contribution(k, erase, z, decay, q, exposure), axis=-1)

    written = np.linalg.norm(
        contribution(k[..., :end, :], e[..., :end, :], z[..., :end, :], alpha[..., :end, :], q, exposure[:end]), axis=-1
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        both, decay, erase = norm(e, alpha) / written, norm(off_e, alpha) / written, norm(e, off_a) / written
        log = {name: np.log(x) for name, x in (("both", both), ("decay", decay), ("erase", erase))}
        decay_loss = (log["decay"] + log["both"] - log["erase"]) / 2
        overlap = (log["erase"] + log["both"] - log["decay"]) / 2
    return Attribution(both, decay, erase, decay_loss, overlap)


def combine_heads(
    ratio: Float[np.ndarray, "*lead H"], read_norm: Float[np.ndarray, "*lead H"]
) -> Float[np.ndarray, "*lead"]:
    """Survival of a layer: that of its heads, weighted by the norm of their reads."""
    return np.asarray((ratio * read_norm).sum(-1) / read_norm.sum(-1))


def explained(predicted: Float[np.ndarray, " n"], measured: Float[np.ndarray, " n"]) -> float:
    """R^2 over cells of measured Ret against the survival predicted by the gates, with intercept and slope fitted."""
    design = np.column_stack([np.ones(len(predicted)), predicted])
    left = measured - design @ np.linalg.lstsq(design, measured, rcond=None)[0]
    return float(1 - np.sum(left**2) / np.sum((measured - measured.mean()) ** 2))


def span_residual(common: Float[np.ndarray, "*lead M Dk"], rare: Float[np.ndarray, "*lead Dk"]) -> np.ndarray:
    """1 - |P_span k|^2 / |k|^2: what endless delta writes at the common keys leave of a write at the rare one."""
    q, _ = np.linalg.qr(np.swapaxes(common, -1, -2))
    inside = np.einsum("...km,...k->...m", q, rare)
    return 1 - (inside**2).sum(-1) / (rare**2).sum(-1)


def hand_set_memory(
    *,
    keys: Literal["orthonormal", "random"],
    common: int,
    alpha: int | float = 1.0,
    delta: bool = True,
    writes: int = 512,
    width: int = 16,
    noise: int | float = 0.1,
    trials: int = 300,
    seed: int = 0,
) -> HandSet:
    """The unit tests of the memory without learning: beta 1, Dk = Dv = `width`.

    The rare value is written first, each common one once, then `writes` times one of them, drawn uniformly; all common
    values are redrawn at half time. Without the delta rule the read of a common key is divided by the weight of its own
    writes, the sum of alpha^age; that of the rare key is not, so that the decayed weight shows.

    Raises:
        ValueError: more orthonormal keys than dimensions.
    """
    if keys == "orthonormal" and common + 1 > width:
        raise ValueError(f"{common + 1} orthonormal keys do not fit {width} dimensions")
    rng = np.random.default_rng(seed)
    n, M = trials, common
    drawn = rng.standard_normal((n, width, width if keys == "orthonormal" else M + 1))
    k = np.linalg.qr(drawn)[0][..., : M + 1] if keys == "orthonormal" else drawn
    k = (k / np.linalg.norm(k, axis=1, keepdims=True)).swapaxes(1, 2)
    theta = rng.standard_normal((n, 2, M + 1, width))
    theta[:, 1, 0] = theta[:, 0, 0]
    order = np.concatenate([np.tile(np.arange(M + 1), (n, 1)), rng.integers(1, M + 1, (n, writes))], 1)
    S, weight, row = np.zeros((n, width, width)), np.zeros((n, M + 1)), np.arange(n)
    for t in range(order.shape[1]):
        which = order[:, t]
        key = k[row, which]
        value = theta[row, int(t >= M + 1 + writes // 2), which] + noise * rng.standard_normal((n, width))
        S *= alpha
        weight *= alpha
        weight[row, which] += 1
        error = value - np.einsum("nkv,nk->nv", S, key) if delta else value
        S += key[:, :, None] * error[:, None]
    reads = np.einsum("nkv,nmk->nmv", S, k)
    rare = (reads[:, 0] * theta[:, 1, 0]).sum(-1) / (theta[:, 1, 0] ** 2).sum(-1)
    answer = reads[:, 1:] if delta else reads[:, 1:] / weight[:, 1:, None]
    revised = np.sum((answer - theta[:, 1, 1:]) ** 2) / np.sum(theta[:, 1, 1:] ** 2)
    return HandSet(float(rare.mean()), float(rare.std() / n**0.5), float(revised))
