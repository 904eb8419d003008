"""The gated delta rule by definition: one token after the other, gradients by autograd. Slow, and what is meant."""

import torch
from jaxtyping import Float
from torch import Tensor


def reference(
    q: Float[Tensor, "R N H Dk"],
    k: Float[Tensor, "R N H Dk"],
    v: Float[Tensor, "R N H Dv"],
    *,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None = None,
    delta: bool = True,
    state: Float[Tensor, "R H Dk Dv"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, end state and residuals; arguments as `gated_delta_rule`, whose specification this is.

    For n = 0 .. N-1:  Sbar = Diag(exp(log_decay)) S;  rho = beta v - Sbar^T (erase k);  S = Sbar + k rho^T;  o = S^T q.
    Everything is computed in the state's number format: float32 or wider.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = v.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=wide)
    else:
        wide = torch.promote_types(wide, state.dtype)
    memory = state.to(wide)

    def columns(x: Tensor) -> Tensor:
        return (x if x.dim() == 4 else x[..., None]).to(wide)

    decay, write = columns(log_decay).exp(), columns(beta) * v.to(wide)
    address = columns(beta if erase is None else erase) * k.to(wide) if delta else torch.zeros_like(k, dtype=wide)
    outputs, residuals = [], []
    for n in range(k.shape[1]):
        memory = decay[:, n, ..., None] * memory
        rho = write[:, n] - torch.einsum("rhkv,rhk->rhv", memory, address[:, n])
        memory = memory + k[:, n, :, :, None].to(wide) * rho[:, :, None, :]
        outputs.append(torch.einsum("rhkv,rhk->rhv", memory, q[:, n].to(wide)))
        residuals.append(rho)
    if not outputs:
        return torch.zeros_like(v), memory.clone(), torch.zeros_like(v)
    return torch.stack(outputs, 1).to(v.dtype), memory, torch.stack(residuals, 1).to(v.dtype)
