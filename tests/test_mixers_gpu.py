"""Every mixer and hybrid on a GPU gives what it gives on the CPU in float64: outputs, states and gradients."""

import pytest
import torch
from sizes import small_model_args
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.mixers import MIXERS, build
from tsgdn.model.backbone import BACKBONES, Backbone, cycle
from tsgdn.streamable import map_state

pytestmark = pytest.mark.gpu

WIDTH, ROWS, TOKENS = 64, 5, 131
DISCRETE = ("ham", "oryx")
"""They choose among tokens: a near tie may fall otherwise in single precision, and then whole reads differ."""


def relative(got, want):
    return float((got.double().cpu() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def stream(mixer, x, gap, lengths, weight):
    x = x.detach().requires_grad_()
    head, state = mixer(x[:, :50], gap=gap[:, :50])
    tail, state = mixer(x[:, 50:], state, gap=gap[:, 50:], lengths=lengths)
    y = torch.cat([head, tail], 1)
    keep = torch.arange(TOKENS, device=x.device) < 50 + lengths[:, None]
    y = torch.where(keep[..., None], y, 0.0)
    mixer.zero_grad()
    (y * weight).sum().backward()
    gradients = {key: p.grad.clone() for key, p in mixer.named_parameters()}  # they move with their parameters
    return y.detach(), map_state(torch.Tensor.detach, state), x.grad, gradients


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in DISCRETE])
def test_a_mixer_on_the_gpu_is_the_one_on_the_cpu(name):
    args = {"heads": 2} if "heads" in small_model_args(name) else {}
    mixer = build(name, WIDTH, args).double()
    x, weight = torch.randn(2, ROWS, TOKENS, WIDTH, dtype=torch.float64).unbind()
    gap = torch.where(torch.rand(ROWS, TOKENS) < 0.05, 3.0, 0.0).double()
    lengths = torch.tensor([81, 1, 0, 40, 64])
    want = stream(mixer, x, gap, lengths, weight)
    mixer = mixer.float().cuda()
    got = stream(mixer, x.float().cuda(), gap.float().cuda(), lengths.cuda(), weight.float().cuda())
    assert relative(got[0], want[0]) < 1e-4
    checks.assert_states_close(
        map_state(lambda leaf: leaf.double().cpu(), got[1]),
        map_state(lambda leaf: leaf.double(), want[1]),
        rtol=1e-3,
        atol=1e-4,
    )
    assert relative(got[2], want[2]) < 1e-3
    for key, grad in want[3].items():
        assert relative(got[3][key], grad) < 2e-3, key


@pytest.mark.parametrize("name", sorted([*MIXERS, *BACKBONES]))
def test_a_backbone_on_the_gpu_streams_as_it_trains(name):
    backbone = Backbone(WIDTH, len(cycle(name)) + 1, name, small_model_args(name)).cuda()
    x = torch.randn(ROWS, 1, TOKENS, WIDTH, device="cuda")
    with torch.no_grad():
        whole, end = backbone(x)
        outputs, state = [], None
        for piece in x.split([1, 64, 1, 1, 64], 2):
            y, state = backbone(piece, state)
            outputs.append(y)
        near = {"rtol": 1e-4, "atol": 1e-4}
        parts = torch.cat(outputs, 2)
        if name in DISCRETE:
            assert (parts - whole).abs().amax((1, 3)).lt(1e-4).float().mean() > 0.9
        else:
            assert_close(parts, whole, **near)
            checks.assert_states_close(state, end, **near)


@pytest.mark.parametrize("name", sorted([*MIXERS, *BACKBONES]))
def test_a_backbone_learns_under_bfloat16(name):
    backbone = Backbone(WIDTH, len(cycle(name)), name, small_model_args(name), variate_every=0).cuda()
    x = torch.randn(ROWS, 1, TOKENS, WIDTH, device="cuda")
    want, _ = backbone(x)
    with torch.autocast("cuda", torch.bfloat16):
        got, _ = backbone(x)
    got.square().mean().backward()
    assert (got - want).norm() < (0.3 if name in DISCRETE else 0.06) * want.norm()
    for key, parameter in backbone.named_parameters():
        if "rate_log" not in key:  # there was no silence
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
