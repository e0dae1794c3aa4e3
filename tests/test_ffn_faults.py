"Feed-forward layers that are replaced: what must not get lost on the way, in whole models"
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.testing import assert_close

from tpa_nb.arch import Arch
from tpa_nb.experts import Experts, _Plan, choose_plan, plans
from tpa_nb.families import tiny_arch, tiny_batch
from tpa_nb.lora import add_lora
from tpa_nb.lora_expert import add_lora_expert
from tpa_nb.moe import moefy, moes
from tpa_nb.save import load_model, save_model
from tpa_nb.tasks import load_task
from tpa_nb.text import as_prompts


def unchanged(arch, call, message):
    "`call` raises `message`, and neither logits nor modules change"
    batch, modules = tiny_batch(arch), [(name, id(module)) for name, module in arch.model.named_modules()]
    want = arch.model.eval()(**batch).logits
    with pytest.raises(ValueError, match=message):
        call(arch)
    assert modules == [(name, id(module)) for name, module in arch.model.named_modules()]
    assert torch.equal(arch.model(**batch).logits, want)


def random_adapters(arch):
    "Adapters that do something"
    for name, p in arch.model.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(p)
    return arch


@pytest.mark.parametrize('family, target', [('bert', 'up'), ('llama', 'up'), ('llama', 'gate'), ('gpt2', 'down')])
def test_an_adapter_in_the_layer_is_not_lost_under_a_lora_expert(family, target):
    arch = random_adapters(add_lora(tiny_arch(family), r=4, targets=('q', target)))
    unchanged(arch, lambda arch: add_lora_expert(arch, r=3), 'carries an adapter, which would be lost; merge or remove')


def test_an_adapter_beside_the_layer_stays():
    arch = random_adapters(add_lora(tiny_arch('bert'), r=4))
    want = arch.model.eval()(**tiny_batch(arch)).logits
    assert_close(add_lora_expert(arch, r=3).model(**tiny_batch(arch)).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', ['intermediate.dense', 'layer.1.output.dense'])
def test_an_adapter_of_transformers_is_not_lost(name):
    arch = tiny_arch('bert')
    arch.model.add_adapter(LoraConfig(target_modules=[name]))
    unchanged(random_adapters(arch), lambda arch: moefy(arch, 8, 8, router=None), 'carries an adapter')


class Packed(nn.Linear):
    "A linear layer with whole numbers for weights"
    def forward(self, x): return nn.functional.linear(x, self.weight.float() / 100, self.bias)


@pytest.mark.parametrize('call', [lambda arch: moefy(arch, 8, 8, router=None), lambda arch: add_lora_expert(arch, r=3)])
def test_packed_weights_are_one_clear_error(call):
    arch = tiny_arch('bert')
    arch.ffns[0].root.set_submodule(arch.ffns[0].up.name, Packed(32, 64))
    weight = torch.randint(-100, 100, (64, 32), dtype=torch.int8)
    arch.ffns[0].up.linear.weight = nn.Parameter(weight, requires_grad=False)
    unchanged(arch, call, 'is Packed, whose weights are no plain numbers')


@pytest.fixture(params=['relu', 'gated-gelu'])
def half(request, tmp_path):
    "A T5 in float16, whose `wo` transformers keeps in float32"
    arch = tiny_arch('t5', task_type='seq_2_seq_lm', feed_forward_proj=request.param)
    arch.model.save_pretrained(tmp_path / 'model')
    arch.tokenizer.save_pretrained(tmp_path / 'model')
    arch = Arch.from_pretrained(tmp_path / 'model', dtype=torch.float16, task_type='seq_2_seq_lm')
    assert {(f.up.weight.dtype, f.down.weight.dtype) for f in arch.ffns} == {(torch.float16, torch.float32)}
    return arch


@pytest.mark.parametrize('router', ['mlp', 'hash'])
def test_t5_in_half_precision(half, router, tmp_path):
    batch = tiny_batch(half)
    x = torch.randn(5, 32, dtype=torch.float16)
    ffn = half.ffns[0]
    layer = ffn.root.get_submodule(ffn.down.name.rpartition('.')[0])
    want, dense = half.model(**batch).logits, layer(x)
    moefy(half, 8, 8, [tiny_batch(half, batch_size=8, seed=seed) for seed in range(2)], router=router)
    assert torch.equal(half.model(**batch).logits, want)
    experts = moes(half)[0].experts
    for plan in ('auto', 'masked', 'loop'):
        experts.plan = plan
        got = experts(x, torch.ones(5, 8, dtype=torch.bool))
        assert got.dtype == dense.dtype == torch.float32
        assert_close(got, dense, atol=1e-4, rtol=1e-4)
    experts.plan = 'grouped'
    with pytest.raises(ValueError, match='the weights are torch.float16, torch.float32'):
        experts(x, torch.ones(5, 8, dtype=torch.bool))
    experts.plan = 'auto'
    again = load_model(save_model(half, tmp_path / 'mixture'))
    assert torch.equal(again.model(**batch).logits, half.model(**batch).logits)


@pytest.fixture(params=['relu', 'gated-gelu'])
def dropping(request):
    "A T5 that drops half of its activations, dense and as a mixture"
    dense = tiny_arch('t5', task_type='seq_2_seq_lm', dropout_rate=0.5, feed_forward_proj=request.param)
    return dense, moefy(dense.clone(), 8, 8, router=None)


def passes(layer, x, n=600):
    "Mean and deviation over `n` passes"
    with torch.no_grad():
        outputs = torch.stack([layer(x) for _ in range(n)])
    return outputs.mean(0), outputs.std(0)


def test_dropout_inside_the_layer_is_kept(dropping):
    dense, mixture = dropping
    ffn, experts = dense.ffns[0], moes(mixture)[0].experts
    layer = ffn.root.get_submodule(ffn.down.name.rpartition('.')[0])
    torch.manual_seed(0)
    x, everyone = torch.randn(3, 32), torch.ones(3, 8, dtype=torch.bool)
    exact = layer.eval()(x)
    assert_close(moes(mixture)[0](x), exact, atol=1e-5, rtol=1e-5)
    mean, spread = passes(layer.train(), x)
    mixture.model.train()
    ways = {name: lambda x, name=name: plans[name].run(experts, x, everyone) for name in plans if plans[name].drops}
    for name, way in {**ways, 'dense': moes(mixture)[0]}.items():
        if name in plans and plans[name].refuses(experts, x):
            continue
        found, off = passes(way, x)
        assert ((found - exact).abs() < 6 * spread / 600 ** 0.5).all(), name
        assert 0.9 < (off / spread).mean() < 1.1 and off.min() > 0, name
    mixture.model.eval()
    assert torch.equal(moes(mixture)[0](x), moes(mixture)[0](x))


def test_dropout_changes_nothing_in_evaluation(dropping):
    dense, mixture = dropping
    without = mixture.clone()
    for moe in moes(without).values():
        moe.experts.dropout = None
    batch = tiny_batch(dense)
    assert torch.equal(mixture.model(**batch).logits, without.model(**batch).logits)
    assert all(moe.experts.dropout is None for moe in moes(moefy(tiny_arch('bert'), 8, 8, router=None)).values())


def test_dropout_is_there_after_loading(dropping, tmp_path):
    _, mixture = dropping
    again = load_model(save_model(mixture, tmp_path / 'model'))
    assert [moe.experts.dropout.p for moe in moes(again).values()] == [0.5] * 4
    assert all(moe.experts.dropout is ffn.dropout for ffn, moe in zip(again.ffns, moes(again).values()))


def test_a_plan_that_cannot_drop_does_not_run_in_training(dropping, monkeypatch):
    experts = moes(dropping[1])[0].experts
    monkeypatch.setitem(plans, 'other', _Plan(plans['masked'].run, lambda experts, x: ''))
    monkeypatch.setattr('tpa_nb.experts._order', lambda *args: ('other',))
    x, chosen = torch.randn(3, 32), torch.ones(3, 8, dtype=torch.bool)
    assert choose_plan(experts, x, chosen) == 'other'
    dropping[1].model.train()
    assert choose_plan(experts, x, chosen) == 'masked'
    experts.plan = 'other'
    with pytest.raises(ValueError, match='it cannot apply the dropout that this layer has in training'):
        experts(x, chosen)
    experts.dropout.p = 0.
    assert experts(x, chosen).shape == x.shape


def replica(model):
    "What `nn.DataParallel` runs on one GPU: copies of all modules, with the same weights"
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copy in copies.items():
        for name, child in module.named_children():
            setattr(copy, name, copies[child])
        for name, p in module.named_parameters(recurse=False):
            setattr(copy, name, p)
    return copies[model]


@pytest.mark.parametrize('router', ['centroid', 'hash'])
def test_data_parallel_is_one_clear_error(router):
    arch = tiny_arch('bert')
    batch = tiny_batch(arch)
    assert_close(replica(arch.model)(**batch).logits, arch.model(**batch).logits)
    moefy(arch, 8, 2, [batch], router=router)
    with pytest.raises(RuntimeError, match='`torchrun` \\(DistributedDataParallel\\)'):
        replica(arch.model)(**batch)


def checkpointing(model, **kwargs):
    "Switch gradient checkpointing on, under the name that this version of transformers has for it"
    getattr(model, 'activation_checkpointing_enable', model.gradient_checkpointing_enable)(kwargs)


@pytest.mark.parametrize('family', ['bert', 't5', 'llama'])
@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing_with_ids(family, reentrant):
    "Two passes, one backward: the gradients are those without checkpointing"
    arch = tiny_arch(family)
    moefy(arch, 8, 2, [tiny_batch(arch)], router='hash')
    found = []
    for checkpoint in (False, True):
        each = arch.clone()
        if checkpoint:
            checkpointing(each.model, use_reentrant=reentrant)
            each.model.enable_input_require_grads()
        each.model.train()
        torch.manual_seed(0)  # dropout is at work
        sum(each.model(**tiny_batch(each, seed=seed)).loss for seed in (0, 1)).backward()
        found.append(torch.cat([moe.experts.up.grad.flatten() for moe in moes(each).values()]))
    assert found[0].abs().sum() > 0
    assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_too_many_passes_before_backward_are_one_clear_error():
    arch = moefy(tiny_arch('bert'), 8, 2, [tiny_batch(tiny_arch('bert'))], router='hash')
    checkpointing(arch.model, use_reentrant=False)
    losses = [arch.model.train()(**tiny_batch(arch, seed=seed)).loss for seed in range(18)]
    with pytest.raises(ValueError, match='call `backward` after 16 passes at the latest'):
        sum(losses).backward()


@pytest.mark.parametrize('start', [(), (0, 5)])
def test_prompts_whose_decoder_reads_several_tokens(start):
    asked = as_prompts(load_task('toy_pairs'), label_words=('ay', 'an')).with_decoder_start(*start)
    arch = moefy(tiny_arch('t5', task_type='seq_2_seq_lm'), 8, 2, asked.calibration(32), epochs=2)
    assert len(moes(arch)) == 4


def test_labels_that_are_no_tensor():
    with pytest.raises(TypeError, match='`labels` must be a tensor of whole numbers, got list'):
        Experts.from_ffn(tiny_arch('bert').ffns[0], [0] * 64)
