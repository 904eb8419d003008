"""The gated delta rule for one token: S is read once for the prediction and the output, then written."""

import torch
from jaxtyping import Float
from torch import Tensor


def step(
    q: Float[Tensor, "R 1 H Dk"],
    k: Float[Tensor, "R 1 H Dk"],
    v: Float[Tensor, "R 1 H Dv"],
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    delta: bool,
    state: Float[Tensor, "R H Dk Dv"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, new state and residual of one token; arguments as `gated_delta_rule`.

    The decay is moved from S to the vectors that read it: with a = S^T (exp(g) e) and c = S^T (exp(g) q) the residual
    is rho = beta v - a and the output c + (k·q) rho, so the new state need not be read again.
    """
    rows, _, heads, key_dim = k.shape
    wide, count = state.dtype, rows * heads

    def flat(x: Tensor) -> Tensor:
        return x.to(wide).reshape(count, -1)

    keys, queries, decay = flat(k), flat(q), flat(log_decay).exp()
    values, memory = flat(v), state.reshape(count, key_dim, -1)
    if delta:
        strength = flat(beta)
        tied = erase is None and beta.dim() == 3  # one number for erasing and writing: it can wait until after the read
        address = keys if tied else flat(beta if erase is None else erase) * keys
        read = torch.stack([address, queries], 1) * decay[:, None]
        prediction, seen = torch.bmm(read, memory).unbind(1)
        rho = strength * (values - prediction) if tied else strength * values - prediction
    else:
        seen, rho = torch.bmm((decay * queries)[:, None], memory)[:, 0], flat(beta) * values
    o = torch.addcmul(seen, (keys * queries).sum(-1, keepdim=True), rho)
    # the product is ours alone: adding to it in place spares a copy of S
    end = (decay[:, :, None] * memory).addcmul_(keys[:, :, None], rho[:, None])
    shape = (rows, 1, heads, -1)
    return o.view(shape).to(v.dtype), end.view(state.shape), rho.view(shape).to(v.dtype)
