"Fused LoRA layers where a notebook is the wrong place: stale outputs, hooks, transforms, other precisions, the benchmark"
import copy
import io
import json

import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.testing import assert_close

from tpa_nb import fused
from tpa_nb.families import tiny_arch, tiny_batch, tiny_cases
from tpa_nb.fused import FusedLoraLinear, fuse_lora, lora_linear, unfuse_lora
from tpa_nb.lora import add_lora


def adapted(family='bert', r=3, scale=0.05, dtype=None, **kwargs):
    "A tiny model whose adapters do something"
    arch = add_lora(tiny_arch(family, **kwargs), r=r)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in arch.model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return arch if dtype is None else (arch.model.to(dtype), arch)[1]


def fuse(arch, **kwargs):
    "Fused, however small"
    return fuse_lora(arch, min_work=0, **kwargs)


def gradients(arch, batch):
    "Gradients by name"
    arch.model.zero_grad(set_to_none=True)
    arch.model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in arch.model.named_parameters() if p.grad is not None}


def trio(arch):
    "The layers of queries, keys and values of the first attention"
    attn = arch.attns[0]
    return attn.q.site, attn.k.site, attn.v.site


def is_fused(y):
    return type(y.grad_fn).__name__ == '_FusedBackward'


@pytest.fixture
def layers():
    return trio(fuse(adapted()))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 40, 32)


def plain(layer, x):
    "What PEFT's own forward gives"
    return LoraLinear.forward(layer, x)


@pytest.mark.parametrize('name, kwargs', tiny_cases(), ids=lambda v: v if isinstance(v, str) else '-'.join(v.values()))
def test_two_products_equal_plain_in_every_family(name, kwargs, monkeypatch):
    arch = adapted(name, dtype=torch.float64, **kwargs)
    batch = tiny_batch(arch)
    want = gradients(arch, batch)
    monkeypatch.setattr(fused, '_takes_effective', lambda x, layers: False)
    got = gradients(fuse(arch), batch)
    assert got.keys() == want.keys()
    for n, grad in want.items():
        assert_close(got[n], grad, rtol=1e-10, atol=1e-10 * max(1, grad.abs().max().item()))


def test_the_others_take_what_the_first_computed(layers, x):
    q, k, v = (layer(x) for layer in layers)
    assert q.grad_fn is k.grad_fn is v.grad_fn and is_fused(q)
    assert not layers[0]._together.waiting


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_any_layer_may_come_first(layers, x, order):
    for i in order:
        assert_close(layers[i](x), plain(layers[i], x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('change', ['B', 'A', 'W', 'x', 'scale', 'disable', 'merge', 'weights that train', 'no grad',
                                    'autocast', 'a new B', 'a hook', 'double'])
def test_nothing_stale_is_handed_out(layers, x, change):
    q, k, _ = layers
    q(x)
    assert id(k) in q._together.waiting
    A, B, base = k.lora_A['default'], k.lora_B['default'], k.get_base_layer()
    with torch.no_grad():
        {'B': lambda: B.weight.add_(1), 'A': lambda: A.weight.add_(1), 'W': lambda: base.weight.add_(1),
         'x': lambda: x.add_(1), 'scale': lambda: k.scale_layer(3.0), 'disable': lambda: k.enable_adapters(False),
         'merge': k.merge, 'weights that train': lambda: base.weight.requires_grad_(True),
         'a new B': lambda: setattr(B, 'weight', nn.Parameter(B.weight + 1)),
         'a hook': lambda: base.register_forward_hook(lambda module, args, y: y + 1),
         'double': lambda: k.double()}.get(change, lambda: None)()
    given = x.double() if change == 'double' else x
    with torch.set_grad_enabled(change != 'no grad'), torch.autocast('cpu', torch.bfloat16, change == 'autocast'):
        got, want = k(given), plain(k, given)
    assert got.dtype == want.dtype and got.requires_grad == want.requires_grad
    tolerance = 2e-2 if change == 'autocast' else 1e-5
    assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_another_input_gives_the_group_up(layers, x):
    q, k, v = layers
    q(x)
    assert_close(k(x + 1), plain(k, x + 1), rtol=1e-5, atol=1e-5)
    assert not q._together.waiting and not q._together.layers
    ys = [layer(x) for layer in layers]
    assert all(map(is_fused, ys)) and len({y.grad_fn for y in ys}) == 3
    for layer, y in zip(layers, ys):
        assert_close(y, plain(layer, x), rtol=1e-5, atol=1e-5)


def test_the_same_values_in_another_tensor_are_another_input(layers, x):
    layers[0](x)
    assert_close(layers[1](x.clone()), plain(layers[1], x), rtol=1e-5, atol=1e-5)


def test_an_output_that_nobody_uses_has_no_gradient(layers, x):
    x.requires_grad_()
    q, k, v = (layer(x) for layer in layers)
    k.square().sum().backward()
    got, x.grad = x.grad, None
    assert layers[0].lora_A['default'].weight.grad is None and layers[2].lora_B['default'].weight.grad is None
    factors = [m['default'].weight for m in (layers[1].lora_A, layers[1].lora_B)]
    found = [p.grad.clone() for p in factors]
    plain(layers[1], x).square().sum().backward()
    assert_close(got, x.grad, rtol=1e-4, atol=1e-4)
    for p, g in zip(factors, found):
        assert_close(p.grad - g, g, rtol=1e-4, atol=1e-3)


def test_a_second_backward_gives_the_same_and_a_derivative_of_it_says_no(layers, x):
    y = layers[0](x.requires_grad_()).square().sum()
    first, = torch.autograd.grad(y, x, retain_graph=True)
    second, = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        second.sum().backward()


@pytest.mark.parametrize('with_waiting', [False, True])
def test_copies_have_groups_of_their_own(x, with_waiting):
    arch = fuse(adapted())
    if with_waiting:
        trio(arch)[0](x)
    again = io.BytesIO()
    torch.save(arch.model, again)
    again.seek(0)
    for model in (copy.deepcopy(arch.model), torch.load(again, weights_only=False)):
        found = [m for m in model.modules() if isinstance(m, FusedLoraLinear)]
        members = {id(m) for m in found}
        groups = {id(m._together): m._together for m in found if '_together' in vars(m)}
        assert len(found) == 8 and len(groups) == 2
        for group in groups.values():
            assert len(group.layers) == 3 and {id(m) for m in group.layers} <= members and not group.waiting


def test_a_replica_of_data_parallel_computes_for_itself(layers, x):
    layers[1]._is_replica = True
    assert_close(layers[1](x), plain(layers[1], x), rtol=1e-5, atol=1e-5)
    assert not layers[0]._together.waiting


def test_hooks_outside_a_layer_are_called_with_its_input_and_output(x):
    arch, seen = fuse(adapted()), []
    for layer in trio(arch):
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    ys = [layer(x) for layer in trio(arch)]
    for layer, y, (given, out) in zip(trio(arch), ys, seen):
        assert y is out and torch.equal(given, 2 * x)
        assert_close(y, plain(layer, 2 * x), rtol=1e-5, atol=1e-5)


def test_arguments_of_peft_reach_peft(layers, x):
    names = ['default', '__base__']
    y = layers[0](x, adapter_names=names)
    assert not is_fused(y)
    base = layers[0].get_base_layer()
    assert_close(y[1], base(x)[1], rtol=1e-5, atol=1e-5)
    assert_close(y[0], plain(layers[0], x)[0], rtol=1e-5, atol=1e-5)


def test_transforms_and_compilation_get_pefts_form(layers, x):
    names, values = zip(*((n, p) for n, p in layers[0].named_parameters() if 'lora_' in n))
    loss = lambda values, x: torch.func.functional_call(layers[0], dict(zip(names, values)), (x,)).square().sum()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))([v.detach() for v in values], x)
    for i in range(len(x)):
        want = torch.autograd.grad(plain(layers[0], x[i]).square().sum(), values)
        for got, w in zip(each, want):
            assert_close(got[i], w, rtol=1e-4, atol=1e-3)
    compiled = torch.compile(layers[0], backend='eager', fullgraph=True)
    assert_close(compiled(x), plain(layers[0], x), rtol=1e-5, atol=1e-5)


def test_inference_mode_and_numbers_without_a_gradient(layers, x):
    with torch.inference_mode():
        for layer in layers:
            assert_close(layer(x.clone()), plain(layer, x), rtol=1e-5, atol=1e-5)
            assert_close(layer(x), plain(layer, x), rtol=1e-5, atol=1e-5)
    assert layers[0](x).requires_grad


class OwnLinear(nn.Linear):
    "A linear layer that does something else"
    def forward(self, x): return super().forward(x) + 1


def test_only_plain_linear_layers_are_fused():
    arch = tiny_arch('bert')
    arch.attns[0].q.linear.__class__ = OwnLinear
    fuse(add_lora(arch, r=2))
    q, k, v = trio(arch)
    assert type(q) is LoraLinear and {type(k), type(v)} == {FusedLoraLinear}
    assert [id(m) for m in k._together.layers] == [id(k), id(v)]
    unfuse_lora(arch)
    assert not any(type(m) is FusedLoraLinear for m in arch.model.modules())


def test_errors_change_nothing():
    arch = adapted()
    with pytest.raises(ValueError, match='`min_work` must be a whole number from 0 up, got 1.5'):
        fuse_lora(arch, min_work=1.5)
    assert not any(type(m) is FusedLoraLinear for m in arch.model.modules())


def share(y, base, update):
    "Slope of the change of an output on the true update"
    return (((y.double() - base.double()) * update).sum() / update.square().sum()).item()


@pytest.mark.parametrize('stored', [torch.float32, torch.bfloat16])
def test_small_updates_survive_in_bf16(stored):
    "Weights stored in bf16 with factors in fp32, as PEFT keeps them, and autocast over fp32 weights"
    arch = add_lora(tiny_arch('bert'), r=4)
    layer, drawn = arch.attns[0].q.site, torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=drawn)
    with torch.no_grad():
        W = (1 + torch.rand(32, 32, generator=drawn) / 2) * normal(32, 32).sign()
        layer.get_base_layer().weight.copy_(W.bfloat16())
        layer.lora_A['default'].weight.copy_(normal(4, 32) * 2 ** -7)
        layer.lora_B['default'].weight.copy_(normal(32, 4) * 2 ** -7)
    layer.get_base_layer().to(stored)
    delta = layer.get_delta_weight('default').double()
    assert (delta.abs() / W.abs()).max() < 2 ** -9
    x = normal(1 << 16, 32).bfloat16()
    fuse(arch)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=stored == torch.float32):
        base, update = layer.get_base_layer()(x), x.double() @ delta.T
        got, peft = layer(x), plain(layer, x)
    assert got.dtype == peft.dtype == torch.bfloat16
    assert abs(share(got, base, update) - 1) < 0.05 and share(peft, base, update) < 0.5


def low_gradients(seed, dtype, how):
    "Adapters' gradients in low precision, PEFT's and fused, and in fp64 with the same rounded weights"
    arch = adapted(seed=seed)
    batch = tiny_batch(arch, batch_size=8, length=32, seed=seed)
    if how != 'autocast':
        arch.model.to(dtype)
    if how == 'fp32 factors':
        for n, p in arch.model.named_parameters():
            p.data = p.data.float() if 'lora_' in n else p.data
    exact = arch.clone()
    exact.model.double()
    exact = gradients(exact, batch)
    with torch.autocast('cpu', dtype, how == 'autocast'):
        found = gradients(arch, batch), gradients(fuse(arch), batch)
    return [{n: g for n, g in grads.items() if 'lora_' in n} for grads in (exact, *found)]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('how', ['autocast', 'stored', 'fp32 factors'])
def test_gradients_in_low_precision_are_as_good_as_pefts(dtype, how):
    errors = []
    for seed in range(8):  # roundings are noise: one model says little
        exact, *found = low_gradients(seed, dtype, how)
        assert {n: g.dtype for n, g in found[0].items()} == {n: g.dtype for n, g in found[1].items()}
        errors.append([[((f[n].double() - g).norm() / g.norm()).item() for n, g in exact.items()] for f in found])
    peft, own = torch.tensor(errors).mean((0, 2)).tolist()
    assert own < 1.15 * peft


def test_an_effective_weight_needs_exact_products(monkeypatch):
    x, W, A, B = torch.randn(99, 8), torch.randn(8, 8), torch.randn(2, 8), torch.randn(8, 2)
    layer = [(W, None, A, B, 1.0)]
    assert fused._takes_effective(x, layer)
    assert not fused._takes_effective(x.bfloat16(), [(W.bfloat16(), None, A.bfloat16(), B.bfloat16(), 1.0)])
    for setting in ('high', 'medium'):
        torch.set_float32_matmul_precision(setting)
        try:
            assert not fused._takes_effective(x, layer)
        finally:
            torch.set_float32_matmul_precision('highest')
    assert fused._takes_effective(x, layer)


def test_the_function_takes_frozen_weights_only():
    x, W, A, B = torch.randn(9, 8), torch.randn(8, 8), torch.randn(2, 8), torch.randn(8, 2)
    with pytest.raises(ValueError, match='must be frozen'):
        lora_linear(x, W, torch.zeros(8, requires_grad=True), A, B)


@pytest.fixture
def bench(benchmark): return benchmark('fused')


def test_benchmark_runs_and_writes(bench, tmp_path):
    out = tmp_path / 'fused.json'
    bench.main(['--quick', '--dtypes', 'float32', 'bfloat16', '--out', str(out)])
    found = json.loads(out.read_text())
    assert [one['dtype'] for one in found['training']] == ['float32', 'bfloat16']
    for one in found['training']:
        assert len(one['rows']) == 7 and one['rows']['full fine-tuning']['step x'] == 1
        assert one['rows']['LoRA, PEFT']['by PEFT'] == one['rows']['Prune-LoRA, PEFT']['by PEFT'] == 1
        assert one['rows']['LoRA, fused']['peak_bytes'] <= one['rows']['LoRA, PEFT']['peak_bytes']


def test_benchmark_compares_within_a_turn(bench):
    times = {'full fine-tuning': [9, 9, 9], 'LoRA, PEFT': [1, 10, 2], 'LoRA, fused': [0.5, 6, 1.8]}
    assert bench.against_peft(times) == {'LoRA, PEFT': 1, 'LoRA, fused': 0.6}
