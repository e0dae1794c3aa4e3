"What could make a fast plan for experts read wrong memory, keep a result, or choose badly"
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import tpa_nb.gpu_experts  # noqa: F401, brings a plan
from tpa_nb import experts as experts_module
from tpa_nb.experts import Experts, _ranked, calibrate_plans, choose_plan, plans
from tpa_nb.families import tiny_arch, tiny_batch
from tpa_nb.fused import lora_linear
from tpa_nb.moe import moefy, moes

CHOSEN = torch.tensor([[True, False, True, False]]).repeat(8, 1)


def made(act=None, gated=False, n=16, D=32):
    torch.manual_seed(0)
    def draw(*shape): return torch.randn(*shape) / D ** 0.5
    return Experts(draw(4, n, D), draw(4, n, D), act or nn.ReLU(), draw(4, n, D) if gated else None, draw(4, n),
                   bias=draw(D)).requires_grad_(False)


def equal_to_masked(ex, x, tokens=(8, 1)):
    for n in tokens:
        want = plans['masked'].run(ex, x[:n], CHOSEN[:n])
        with torch.no_grad():
            assert_close(ex(x[:n], CHOSEN[:n]), want.to(x.dtype), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('part', ['up_bias', 'bias', 'gate', 'down'])
def test_a_weight_of_another_precision_keeps_fast_plans_away(part):
    ex, x = made(gated=part == 'gate'), torch.randn(8, 32)
    setattr(ex, part, nn.Parameter(getattr(ex, part).double(), requires_grad=False))
    assert choose_plan(ex, x, CHOSEN) == 'masked'
    for name in ('token', 'grouped', 'compiled', 'triton'):
        assert plans[name].why_not(ex, x[:1])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_an_activation_may_change_the_precision(dtype):
    class Other(nn.Module):
        def forward(self, h): return h.relu().to(dtype).to(h.dtype) if h.dtype == dtype else h.relu().to(dtype)
    ex, plain, x = made(Other()), made(), torch.randn(8, 32)
    if plans['compiled'].why_not(ex, x):
        pytest.skip('no compiler')
    for n in (8, 1):
        with torch.no_grad():
            got, want = plans['compiled'].run(ex, x[:n], CHOSEN[:n]), plans['masked'].run(plain, x[:n], CHOSEN[:n])
        assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize('make', [lambda w: 2 * w, lambda w: (2 * w).transpose(1, 2).contiguous().transpose(1, 2)])
def test_parametrized_weights(make):
    class Changed(nn.Module):
        def forward(self, w): return make(w)
    ex, x = made(), torch.randn(8, 32)
    parametrize.register_parametrization(ex, 'down', Changed())
    equal_to_masked(ex, x)
    assert plans['triton'].why_not(ex, x)
    if not plans['compiled'].why_not(ex, x):
        ex.plan = 'compiled'
        equal_to_masked(ex, x)


def test_few_of_many_experts_are_no_reason_for_a_loop():
    torch.manual_seed(0)
    ex, x = Experts(torch.randn(512, 4, 8), torch.randn(512, 4, 8), nn.ReLU()).requires_grad_(False), torch.randn(64, 8)
    chosen = torch.zeros(64, 512, dtype=torch.bool)
    chosen[:, 3] = True
    assert choose_plan(ex, x, chosen) != 'loop' or plans['compiled'].why_not(ex, x)


def test_a_plan_that_is_gone_is_passed_over(monkeypatch):
    ex, x = made(), torch.randn(8, 32)
    row = dict(device='cpu', dtype='float32', tokens=8, expert_size=16, share=0.5, plans={'of another day': 0.1, 'loop': 0.2})
    monkeypatch.setattr(experts_module, '_table', [row])
    experts_module._order.cache_clear()
    try:
        assert _ranked([row], 'cpu', 'float32', 8, 16, 0.5)[0] == 'of another day'
        assert choose_plan(ex, x, CHOSEN) == 'loop'
    finally:
        experts_module._order.cache_clear()


def test_calibration_of_an_odd_width(tmp_path, monkeypatch):
    monkeypatch.setattr(experts_module, '_table', [])
    rows = calibrate_plans(20, 28, (7,), (1, 8), ('float32',), repeats=1, path=tmp_path / 'plans.json')
    experts_module._order.cache_clear()
    assert {r['tokens'] for r in rows if r['device'] == 'cpu'} == {1, 8} and (tmp_path / 'plans.json').exists()


@pytest.mark.parametrize('wrong, message', [(dict(expert_sizes=()), '`expert_sizes` must'),
                                            (dict(dtypes=('float33',)), "`dtypes` must be names of torch's")])
def test_calibration_names_what_is_wrong(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        calibrate_plans(32, 64, **{'expert_sizes': (16,), **wrong}, path=tmp_path / 'plans.json')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('n', [8, 1])
def test_a_trace_computes(n):
    ex, x, other = made(), torch.randn(8, 32), torch.randn(8, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(lambda x: ex(x, CHOSEN[:n]), x[:n], check_trace=False)
        assert_close(traced(other[:n]), ex(other[:n], CHOSEN[:n]), atol=1e-5, rtol=1e-4)


def test_gradients_where_nobody_is_chosen():
    ex, x = made(), torch.randn(8, 32, requires_grad=True)
    ex.bias = None
    for name in ('loop', 'masked', 'grouped', 'compiled'):
        if not plans[name].why_not(ex, x):
            x.grad = None
            plans[name].run(ex, x, torch.zeros_like(CHOSEN)).sum().backward()
            assert_close(x.grad, torch.zeros_like(x))


def test_lora_linear_under_autocast():
    torch.manual_seed(0)
    x, W, A, B = (torch.randn(*s) for s in ((8, 32), (16, 32), (4, 32), (16, 4)))
    A.requires_grad_(), B.requires_grad_()
    want = torch.autograd.grad((x @ (W + B @ A).T).square().mean(), (A, B))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = lora_linear(x, W, None, A, B).float().square().mean()
    for got, exact in zip(torch.autograd.grad(loss, (A, B)), want):
        assert got.dtype == torch.float32 and (got - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize('shape', [(0, 3, 32), (2, 0, 32), (0, 32)])
def test_no_tokens(shape):
    arch = tiny_arch('bert')
    moefy(arch, 8, 2, [tiny_batch(arch)], router='centroid', split='random')
    for moe in moes(arch).values():
        assert moe(torch.empty(shape)).shape == shape
