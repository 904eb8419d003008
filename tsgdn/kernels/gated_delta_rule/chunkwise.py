"""The gated delta rule in chunks: all products inside a chunk at once for all chunks, only the state runs in a loop.

Equations and names follow docs/gated_delta_rule.md. Nothing divides by a decay, every exponent is <= 0. Forward and
backward are written by hand, for decays per head and per key channel; the backward recomputes what lies inside the
chunks, so a call keeps its inputs and one state per chunk.

Layout: tiles (chunks · R · H, C, D), the chunk index outermost, so the rows of one chunk are one contiguous slice.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

DIRECT_ROWS = 4
"""Rows of the diagonal blocks whose channel-wise decays are formed pair by pair; longer tiles are a multiple of it."""


def chunkwise(
    q: Float[Tensor, "R N H Dk"],
    k: Float[Tensor, "R N H Dk"],
    v: Float[Tensor, "R N H Dv"],
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    delta: bool,
    state: Float[Tensor, "R H Dk Dv"],
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, end state and residuals of N >= 1 tokens; arguments as `gated_delta_rule`."""
    if chunk is None:
        chunk = 32 if k.shape[-1] <= 64 else 64
    return _Chunkwise.apply(q, k, v, log_decay, beta, erase, state, delta, chunk)  # pyright: ignore


class _Tiling(NamedTuple):
    """How (R, N, H) is laid out as tiles; N is split evenly, so little is padding."""

    rows: int
    tokens: int
    heads: int
    chunks: int
    length: int

    @classmethod
    def of(cls, shape: torch.Size, chunk: int) -> "_Tiling":
        rows, tokens, heads = shape[:3]
        chunks = -(-tokens // chunk)
        length = -(-tokens // chunks)
        if length > DIRECT_ROWS:
            length = -(-length // DIRECT_ROWS) * DIRECT_ROWS
        return cls(rows, tokens, heads, -(-tokens // length), length)

    def tile(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(R, N, H[, D]) to (chunks · R · H, C, D), D = 1 if there was none; zeros as padding have no effect."""
        x = x if x.dim() == 4 else x[..., None]
        missing = self.chunks * self.length - self.tokens
        if missing:
            x = pad(x, (0, 0, 0, 0, 0, missing))
        x = x.unflatten(1, (self.chunks, self.length)).permute(1, 0, 3, 2, 4)
        tiles = torch.empty(x.shape, dtype=dtype, device=x.device)
        return tiles.copy_(x).view(-1, self.length, x.shape[-1])

    def untile(self, tiles: Tensor, like: Tensor) -> Tensor:
        """The inverse of `tile`, in the shape and number format of `like`."""
        x = tiles.view(self.chunks, self.rows, self.heads, self.length, -1).permute(1, 0, 3, 2, 4)
        x = x.reshape(self.rows, self.chunks * self.length, self.heads, -1)[:, : self.tokens]
        return x.to(like.dtype).reshape(like.shape)


class _Decay:
    """The decays inside the tiles: from the chunk's start, to its end, and between any two of its tokens."""

    def __init__(self, log_decay: Float[Tensor, "B C G"], dtype: torch.dtype) -> None:
        # Summed in float64: the difference of two large sums (a jump of -50, then mild decays) must stay exact.
        self.sums = log_decay.double().cumsum(1)
        self.dtype = dtype
        self.since_start = self.sums.to(dtype).exp()
        self.to_end = (self.sums[:, -1:] - self.sums).to(dtype).exp_()
        self.whole = self.since_start[:, -1:].mT  # (B, G, 1): factor of the state's rows
        self.per_channel = log_decay.shape[-1] > 1
        if self.per_channel:
            self.n = min(DIRECT_ROWS, log_decay.shape[1])
            self.near, self.blocks = self._near(log_decay), self._blocks()
        else:
            # Clamped before exp: above the diagonal the exponent is positive and could overflow.
            self.between = (self.sums - self.sums.mT).to(dtype).clamp_(max=0).exp_().tril_()

    def _near(self, log_decay: Tensor) -> list[Tensor]:
        """In the diagonal blocks: decays over 1, 2, ... tokens, as products of each one's, (B, blocks, rows, D)."""
        one = log_decay.exp().view(log_decay.shape[0], -1, self.n, log_decay.shape[-1])
        near = [one[:, :, 1:]]
        for distance in range(2, self.n):
            near.append(near[-1][:, :, 1:] * one[:, :, 1 : self.n - distance + 1])
        return near[: self.n - 1]

    def _blocks(self) -> list[tuple[int, int, int, Tensor, Tensor]]:
        """Off-diagonal blocks (rows mid:stop, columns start:mid), with the rows' and the columns' factors.

        A tile is halved until blocks of `DIRECT_ROWS` are left. The decay from column s to row r is split at the last
        column of its block, which lies between them: both exponents are <= 0, so no factor can overflow, and where
        one underflows so does the product.
        """
        blocks = []

        def halve(start: int, stop: int) -> None:
            if stop - start <= DIRECT_ROWS:
                return
            mid = start + -(-(stop - start) // (2 * DIRECT_ROWS)) * DIRECT_ROWS
            split = self.sums[:, mid - 1 : mid]
            row = (self.sums[:, mid:stop] - split).to(self.dtype).exp_()
            column = (split - self.sums[:, start:mid]).to(self.dtype).exp_()
            blocks.append((start, mid, stop, row, column))
            halve(start, mid)
            halve(mid, stop)

        halve(0, self.sums.shape[1])
        return blocks

    def scores(self, x: Tensor, k: Tensor) -> Tensor:
        """sum_d x_rd k_sd exp(G_rd - G_sd) for r >= s, else 0."""
        if not self.per_channel:
            return torch.bmm(x, k.mT).mul_(self.between)
        count, length, _ = x.shape
        out = x.new_zeros(count, length, length)
        near, xs, ks = (
            _diagonal(out, self.n),
            x.view(count, -1, self.n, x.shape[-1]),
            k.view(count, -1, self.n, k.shape[-1]),
        )
        for distance in range(self.n):
            product = xs[:, :, distance:] * ks[:, :, : self.n - distance]
            if distance:
                product *= self.near[distance - 1]
            near.diagonal(-distance, 1, 2).copy_(product.sum(-1))
        for start, mid, stop, row, column in self.blocks:
            out[:, mid:stop, start:mid] = torch.bmm(x[:, mid:stop] * row, (k[:, start:mid] * column).mT)
        return out

    def scores_backward(self, grad: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `scores` for x and k; what `grad` holds above the diagonal does not count. `grad` is used up."""
        if not self.per_channel:
            grad = grad.mul_(self.between)
            return torch.bmm(grad, k), torch.bmm(grad.mT, x)
        shape = (x.shape[0], -1, self.n, x.shape[-1])
        near, xs, ks = _diagonal(grad, self.n), x.view(shape), k.view(shape)
        dx, dk = torch.empty_like(x), torch.empty_like(k)
        dxs, dks = dx.view(shape), dk.view(shape)
        for distance in range(self.n):
            weight = near.diagonal(-distance, 1, 2)[..., None]
            if not distance:
                torch.mul(weight, ks, out=dxs)
                torch.mul(weight, xs, out=dks)
                continue
            weight = weight * self.near[distance - 1]
            dxs[:, :, distance:].addcmul_(weight, ks[:, :, : self.n - distance])
            dks[:, :, : self.n - distance].addcmul_(weight, xs[:, :, distance:])
        for start, mid, stop, row, column in self.blocks:
            block = grad[:, mid:stop, start:mid]
            dx[:, mid:stop].addcmul_(torch.bmm(block, k[:, start:mid] * column), row)
            dk[:, start:mid].addcmul_(torch.bmm(block.mT, x[:, mid:stop] * row), column)
        return dx, dk


def _diagonal(matrix: Tensor, n: int) -> Tensor:
    """A view of the n x n diagonal blocks of (B, C, C): (B, n, n, C / n)."""
    count, length, _ = matrix.shape
    return matrix.view(count, length // n, n, length // n, n).diagonal(dim1=1, dim2=3)


def unit_lower_inverse(lower: Float[Tensor, "B C C"]) -> Float[Tensor, "B C C"]:
    """(I + the strictly lower part of `lower`)^-1; the rest of `lower` does not count.

    By substitution: no powers are formed, so equal keys cost no digits. An inverse by blocks was measured beside it: as
    fast for hundreds of tiles, ten times slower for a few.
    """
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False, unitriangular=True)


class _Tiles(NamedTuple):
    """What a chunk needs to know of its tokens; the delta rule's part is None without it."""

    q: Tensor
    k: Tensor
    z: Tensor  # beta v
    e: Tensor | None  # erase k
    decay: _Decay
    q_start: Tensor  # exp(G) q: reads the state at the chunk's start
    k_end: Tensor  # exp(G_C - G) k: writes into the state at its end
    e_start: Tensor | None
    scores: Tensor  # P
    solve: Tensor | None  # A


def _tiles(q: Tensor, k: Tensor, log_decay: Tensor, z: Tensor, e: Tensor | None) -> _Tiles:
    decay = _Decay(log_decay, q.dtype)
    solve = None if e is None else unit_lower_inverse(decay.scores(e, k))
    e_start = None if e is None else e * decay.since_start
    return _Tiles(q, k, z, e, decay, q * decay.since_start, k * decay.to_end, e_start, decay.scores(q, k), solve)


def _residuals(tiles: _Tiles, index: slice, start: Tensor, out: Tensor | None) -> Tensor:
    """Rho of one chunk (or of several at once), from the states at its start."""
    if tiles.e_start is None or tiles.solve is None:
        return tiles.z[index]
    difference = torch.baddbmm(tiles.z[index], tiles.e_start[index], start, alpha=-1)
    return torch.bmm(tiles.solve[index], difference, out=out)


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        erase: Tensor | None,
        state: Tensor,
        delta: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiling = _Tiling.of(k.shape, chunk)
        tiles = _load(tiling, q, k, v, log_decay, beta, erase, delta, state.dtype)
        count = tiling.rows * tiling.heads
        starts = torch.empty((tiling.chunks, count, *state.shape[2:]), dtype=state.dtype, device=state.device)
        starts[0] = state.reshape(starts.shape[1:])
        end = torch.empty_like(starts[0])
        rho = tiles.z if not delta else torch.empty_like(tiles.z)
        for t in range(tiling.chunks):
            here = slice(t * count, (t + 1) * count)
            if delta:
                _residuals(tiles, here, starts[t], rho[here])
            after = starts[t + 1] if t + 1 < tiling.chunks else end
            torch.mul(starts[t], tiles.decay.whole[here], out=after)
            after.baddbmm_(tiles.k_end[here].mT, rho[here])
        o = torch.bmm(tiles.scores, rho).baddbmm_(tiles.q_start, starts.view(-1, *state.shape[2:]))
        ctx.save_for_backward(q, k, v, log_decay, beta, erase, starts)
        ctx.tiling, ctx.delta = tiling, delta
        ctx.set_materialize_grads(False)
        return tiling.untile(o, v), end.view(state.shape), tiling.untile(rho, v)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore
        ctx: Any, grad_o: Tensor | None, grad_end: Tensor | None, grad_rho: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, erase, starts = ctx.saved_tensors
        with torch.autocast(device_type=v.device.type, enabled=False):
            return _backward(
                ctx.tiling,
                q,
                k,
                v,
                log_decay,
                beta,
                erase,
                starts,
                ctx.delta,
                grad_o,
                grad_end,
                grad_rho,
                ctx.needs_input_grad,
            )


def _load(
    tiling: _Tiling,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    delta: bool,
    wide: torch.dtype,
) -> _Tiles:
    keys = tiling.tile(k, wide)
    z = tiling.tile(v, wide).mul_(tiling.tile(beta, wide))
    e = keys * tiling.tile(beta if erase is None else erase, wide) if delta else None
    return _tiles(tiling.tile(q, wide), keys, tiling.tile(log_decay, wide), z, e)


def _backward(
    tiling: _Tiling,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    starts: Tensor,
    delta: bool,
    grad_o: Tensor | None,
    grad_end: Tensor | None,
    grad_rho: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    wide, count, chunks = starts.dtype, tiling.rows * tiling.heads, tiling.chunks
    tiles = _load(tiling, q, k, v, log_decay, beta, erase, delta, wide)
    decay, states = tiles.decay, starts.view(-1, *starts.shape[2:])
    rho = _residuals(tiles, slice(None), states, None)
    do = tiling.tile(torch.zeros_like(v) if grad_o is None else grad_o, wide)

    # The state's gradient from the last chunk to the first.
    drho = torch.bmm(tiles.scores.mT, do)
    if grad_rho is not None:
        drho += tiling.tile(grad_rho, wide)
    from_reads = torch.bmm(tiles.q_start.mT, do)
    ends = torch.empty_like(starts)  # gradient of the state at each chunk's end
    first = torch.empty_like(starts[0])
    ends[-1] = 0 if grad_end is None else grad_end.reshape(first.shape)
    dz = torch.empty_like(drho) if delta else drho
    for t in range(chunks - 1, -1, -1):
        here = slice(t * count, (t + 1) * count)
        drho[here].baddbmm_(tiles.k_end[here], ends[t])
        before = ends[t - 1] if t else first
        torch.addcmul(from_reads[here], ends[t], decay.whole[here], out=before)
        if tiles.e_start is not None and tiles.solve is not None:
            torch.bmm(tiles.solve[here].mT, drho[here], out=dz[here])
            before.baddbmm_(tiles.e_start[here].mT, dz[here], alpha=-1)

    # Everything else for all chunks at once.
    dq, dk = decay.scores_backward(torch.bmm(do, rho.mT), tiles.q, tiles.k)
    dq.addcmul_(torch.bmm(do, states.mT), decay.since_start)
    dk_end = torch.bmm(rho, ends.view_as(states).mT).mul_(decay.to_end)
    dk += dk_end
    de = None
    if tiles.e is not None:
        de, more = decay.scores_backward(torch.bmm(dz, rho.mT).tril_(-1).neg_(), tiles.e, tiles.k)
        de.addcmul_(torch.bmm(dz, states.mT), decay.since_start, value=-1)
        dk += more

    dlog_decay = None
    if needed[3]:
        # G enters as exp(G) beside q and e and as exp(-G) beside k, so its gradient is what they have in common.
        dsums = tiles.q * dq - tiles.k * dk
        if de is not None and tiles.e is not None:
            dsums.addcmul_(tiles.e, de)
        at_end = (dk_end * tiles.k).sum(1) + (ends.view_as(states) * states).sum(2) * decay.whole[..., 0]
        dsums[:, -1] += at_end
        if not decay.per_channel:
            dsums = dsums.sum(-1, keepdim=True)
        dlog_decay = tiling.untile(dsums.double().flip(1).cumsum(1).flip(1), log_decay)

    def gate(product: Tensor, like: Tensor) -> Tensor:
        return tiling.untile(product if like.dim() == 4 else product.sum(-1, keepdim=True), like)

    dbeta, derase = dz * tiling.tile(v, wide), None
    if beta.dim() == 3:
        dbeta = dbeta.sum(-1, keepdim=True)
    if de is not None:
        if erase is None:
            dbeta += (de * tiles.k).sum(-1, keepdim=True)
        elif needed[5]:
            derase = gate(de * tiles.k, erase)
        dk.addcmul_(de, tiling.tile(beta if erase is None else erase, wide))
    dv = tiling.untile(dz * tiling.tile(beta, wide), v)
    dstate = first.view(tiling.rows, tiling.heads, *first.shape[1:]) if needed[6] else None
    return (
        tiling.untile(dq, q),
        tiling.untile(dk, k),
        dv,
        dlog_decay,
        tiling.untile(dbeta, beta),
        derase,
        dstate,
        None,
        None,
    )
