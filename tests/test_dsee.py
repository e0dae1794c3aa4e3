"DSEE: nothing dense is kept, runs resume, several adapters, reduced precision, and what plain PEFT does with a folder"
import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tpa_nb.dsee import DSEEConfig, DSEELinear, add_dsee, merge_dsee
from tpa_nb.families import tiny_arch, tiny_batch
from tpa_nb.lora import add_lora, n_trainable
from tpa_nb.masks import mask_from_update, prune_adapted_heads, update_importance
from tpa_nb.prune import select_heads
from tpa_nb.save import load_model, save_model
from tpa_nb.tasks import toy_pairs
from tpa_nb.train import finetune


class Shapes(TorchDispatchMode):
    "Numbers of elements of all tensors that operations make"
    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (list, tuple)) else [out]
        self.made += [t.numel() for t in tensors if isinstance(t, torch.Tensor)]
        return out


def layer(n_sparse=16, m=96, n=80, r=2):
    "One trained layer of m outputs and n inputs"
    torch.manual_seed(0)
    site = DSEELinear(nn.Linear(n, m), 'default', DSEEConfig(r=r, n_sparse=n_sparse), r=r, lora_alpha=r)
    site.base_layer.requires_grad_(False)
    with torch.no_grad():
        site.lora_B['default'].weight.normal_()
        site.lora_S['default'].normal_()
        site.lora_S_index['default'] = torch.stack([torch.randint(m, (n_sparse,)), torch.randint(n, (n_sparse,))]).int()
    return site


def test_no_operation_makes_a_matrix():
    "In a forward and backward pass of 7 tokens nothing has more elements than 7 outputs; the matrix has 7,680"
    site, x = layer(), torch.randn(7, 80, requires_grad=True)
    with Shapes() as seen:
        site(x).square().sum().backward()
    views = {96 * 80}  # the transposed base weight, a view
    assert max(n for n in seen.made if n not in views) <= 7 * 96
    site.lora_S['default'].grad = None
    with Shapes() as seen:
        site.update().sum().backward()  # the test would see one
    assert sum(n == 96 * 80 for n in seen.made) > 3


def test_saved_for_backward():
    "Of the sparse part a pass keeps N numbers a token, N values and the positions"
    def kept(site):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            site(torch.randn(7, 80, requires_grad=True))
        return sizes
    plain, sparse = layer(), layer()
    del plain.lora_S['default']
    extra = kept(sparse)
    for size in kept(plain):
        extra.remove(size)
    assert sum(extra) <= 7 * 16 + 16 + 2 * 16 + 7 * 16


def test_numbers_that_are_kept():
    "Parameters, optimiser state and bytes of one entry: value and two coordinates"
    few, many = (add_dsee(tiny_arch('bert'), r=2, n_sparse=n) for n in (0, 50))
    assert n_trainable(many) - n_trainable(few) == 4 * 50
    states = []
    for arch in (few, many):
        optimizer = torch.optim.AdamW([p for p in arch.model.parameters() if p.requires_grad])
        arch.model(**tiny_batch(arch)).loss.backward()
        optimizer.step()
        states.append(sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.numel() > 1))
    assert states[1] - states[0] == 2 * 4 * 50
    buffers = [sum(b.nbytes for b in arch.model.buffers()) for arch in (few, many)]
    assert buffers[1] - buffers[0] == 4 * 50 * 8


def test_bytes_on_disk(tmp_path):
    sizes = []
    for n in (16, 516):
        folder = save_model(add_dsee(tiny_arch('bert'), r=2, n_sparse=n), tmp_path / str(n))
        sizes.append((folder / 'adapter' / 'adapter_model.safetensors').stat().st_size)
    assert abs(sizes[1] - sizes[0] - 4 * 500 * 12) < 200  # the header names longer sizes


def test_gradients_are_those_of_a_dense_residual():
    site, x = layer(), torch.randn(7, 80, requires_grad=True)
    site(x).square().sum().backward()
    found = [x.grad, *(p.grad for n, p in sorted(site.named_parameters()) if p.grad is not None)]
    x.grad = None
    site.zero_grad()
    (x @ (site.base_layer.weight + site.update()).T + site.base_layer.bias).square().sum().backward()
    expected = [x.grad, *(p.grad for n, p in sorted(site.named_parameters()) if p.grad is not None)]
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def trained():
    "A tiny model with a trained update"
    arch = add_dsee(tiny_arch('bert'), r=3, n_sparse=5)
    return finetune(arch, toy_pairs(n_train=48, n_validation=8), epochs=1, lr=1e-2, batch_size=8, progress=False)


def logits(arch):
    with torch.no_grad():
        return arch.model.eval()(**tiny_batch(arch)).logits


def test_plain_peft_fails_loudly(trained, tmp_path):
    "Neither PEFT's loader nor its configuration takes the folder for LoRA"
    folder = str(save_model(trained, tmp_path / 'model') / 'adapter')
    assert json.loads((Path(folder) / 'adapter_config.json').read_text())['peft_type'] == 'DSEE'
    with pytest.raises(KeyError, match='DSEE'):
        PeftModel.from_pretrained(tiny_arch('bert').model, folder)
    with pytest.raises(KeyError, match='DSEE'):
        PeftConfig.from_pretrained(folder)
    plain = add_lora(tiny_arch('bert'))
    with pytest.raises(KeyError, match='DSEE'):
        plain.model.load_adapter(folder, 'other')


def test_peft_own_save_is_refused_too(trained, tmp_path):
    "What `save_pretrained` of PEFT writes names its kind as well"
    trained.model.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match='DSEE'):
        PeftModel.from_pretrained(tiny_arch('bert').model, str(tmp_path))


def test_a_folder_without_its_sparse_part_is_refused(trained, tmp_path):
    folder = save_model(trained, tmp_path / 'model')
    config = folder / 'adapter' / 'adapter_config.json'
    recipe = json.loads((folder / 'tpa.json').read_text())
    for change in ({'peft_type': 'LORA'}, {'n_sparse': 4, 'sparse_pattern': {}}, {'peft_type': 'NONE'}):
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        recipe['files']['adapter/adapter_config.json'] = hashlib.sha256(config.read_bytes()).hexdigest()
        (folder / 'tpa.json').write_text(json.dumps(recipe))
        with pytest.raises(ValueError, match='cannot be loaded'):
            load_model(folder)


def test_resume_brings_the_sparse_part_back(tmp_path):
    "A run of two epochs that goes on from its first checkpoint ends where it ended before"
    task = toy_pairs(n_train=48, n_validation=8)
    settings = dict(epochs=2, lr=1e-2, batch_size=8, progress=False, output_dir=tmp_path, save_total_limit=None)
    whole = finetune(add_dsee(tiny_arch('bert'), r=3, n_sparse=5), task, **settings)
    first, second = sorted(tmp_path.glob('checkpoint-*'), key=lambda p: int(p.name.split('-')[1]))
    shutil.rmtree(second)
    again = add_dsee(tiny_arch('bert'), r=3, n_sparse=5)
    positions = again.attns[0].q.site.lora_S_index['default'].clone()
    again.attns[0].q.site.lora_S_index['default'] = torch.zeros_like(positions)  # the checkpoint knows better
    finetune(again, task, resume=True, **settings)
    assert torch.equal(again.attns[0].q.site.lora_S_index['default'], positions)
    assert torch.equal(logits(again), logits(whole))


def test_several_adapters():
    "A second adapter of the same kind: each alone, both together, merged and taken back"
    arch = add_dsee(tiny_arch('bert'), r=2, n_sparse=4, train=[])
    config = copy.deepcopy(arch.model.peft_config['default'])
    arch.model.add_adapter('second', config)
    with torch.no_grad():
        for name, p in arch.model.named_parameters():
            if 'lora_B' in name or 'lora_S' in name:
                p.normal_()
    for m in arch.model.modules():
        if isinstance(m, DSEELinear):
            m.lora_S_index['second'] = torch.randint(32, (2, 4), dtype=torch.int32)
    alone = []
    for names in ('default', 'second', ['default', 'second']):
        arch.model.base_model.set_adapter(names)
        alone.append(logits(arch))
    assert all((a - b).abs().max() > 1e-2 for a, b in ((alone[0], alone[1]), (alone[1], alone[2])))
    weight = arch.attns[0].q.weight.clone()
    arch.model.merge_adapter()
    torch.testing.assert_close(logits(arch), alone[2], rtol=1e-3, atol=1e-4)
    arch.model.unmerge_adapter()
    assert torch.equal(arch.attns[0].q.weight, weight)


def test_second_adapter_saves(tmp_path):
    arch = add_dsee(tiny_arch('bert'), r=2, n_sparse=4)
    arch.model.add_adapter('second', copy.deepcopy(arch.model.peft_config['default']))
    again = load_model(save_model(arch, tmp_path / 'model'))
    assert torch.equal(logits(again), logits(arch))
    with pytest.raises(ValueError, match='must carry one adapter'):
        with torch.no_grad():
            for name, p in arch.model.named_parameters():
                if 'lora_B' in name:
                    p.normal_()
        mask_from_update(arch)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_reduced_precision(dtype, tmp_path):
    "Base weights of 16 bits: positions stay whole numbers, masks hold, the folder gives the same logits"
    arch = tiny_arch('bert')
    arch.model.to(dtype)
    add_dsee(arch, r=2, n_sparse=4)
    with torch.no_grad():
        for name, p in arch.model.named_parameters():
            if 'lora_B' in name or 'lora_S' in name:
                p.normal_()
    assert {m.lora_S_index['default'].dtype for m in arch.model.modules() if isinstance(m, DSEELinear)} == {torch.int32}
    mask_from_update(arch, 0.5)
    before = logits(arch)
    again = load_model(save_model(arch, tmp_path / 'model'))
    assert torch.equal(logits(again), before)
    gone = arch.attns[0].q.weight == 0
    merge_dsee(arch)
    assert arch.attns[0].q.weight.dtype == dtype and torch.equal(arch.attns[0].q.weight == 0, gone)
    torch.testing.assert_close(logits(arch), before, rtol=0, atol=0)


def test_autocast_and_checkpointing():
    "bf16 autocast trains; gradient checkpointing gives the same gradients"
    arch = add_dsee(tiny_arch('bert'), r=2, n_sparse=4)
    batch = tiny_batch(arch)
    with torch.autocast('cpu', torch.bfloat16):
        arch.model(**batch).loss.backward()
    sparse = [p for n, p in arch.model.named_parameters() if 'lora_S' in n]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in sparse)
    arch.model.zero_grad()
    arch.model.train()
    for m in arch.model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.
    arch.model(**batch).loss.backward()
    plain = [p.grad.clone() for p in sparse]
    arch.model.zero_grad()
    arch.base.gradient_checkpointing_enable({'use_reentrant': False})
    arch.model(**batch).loss.backward()
    for p, expected in zip(sparse, plain):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


def test_dropout_under_a_mask(trained):
    "With dropout the masked update sees the dropped inputs; without, its forward pass is that of the merged weights"
    arch = trained.clone()
    mask_from_update(arch, 0.5)
    site = arch.attns[0].q.site
    x = torch.randn(4, 32)
    calm = site(x)
    site.lora_dropout['default'] = nn.Dropout(0.5)
    site.train()
    torch.manual_seed(0)
    dropped = site(x)
    torch.manual_seed(0)
    expected = site.base_layer(x) + site.lora_dropout['default'](x) @ site.update().T
    torch.testing.assert_close(dropped, expected)
    assert not torch.allclose(dropped, calm)
    site.eval()
    assert torch.equal(site(x), calm)


def test_bad_calls_change_nothing(trained):
    "Every illegal call of the verbs leaves weights, masks, history and configuration as they were"
    arch = trained.clone()
    state = {n: t.clone() for n, t in arch.model.state_dict().items()}
    history, config = copy.deepcopy(arch.history), copy.deepcopy(arch.model.peft_config['default'])
    last = len(arch.attns)
    broken = arch.clone()
    with torch.no_grad():
        broken.ffns[1].down.weight[0, 0] = float('nan')
    for call in (lambda: mask_from_update(arch, 1.0), lambda: mask_from_update(arch, float('nan')),
                 lambda: mask_from_update(arch, True), lambda: mask_from_update(arch, criterion=''),
                 lambda: mask_from_update(broken), lambda: prune_adapted_heads(arch, {last: [0]}),
                 lambda: prune_adapted_heads(arch, {0: [9]}), lambda: prune_adapted_heads(arch, {0: [0, 1, 2, 3]}),
                 lambda: add_dsee(arch)):
        with pytest.raises((ValueError, TypeError)):
            call()
    assert all(torch.equal(t, state[n]) for n, t in arch.model.state_dict().items())
    assert arch.history == history and arch.model.peft_config['default'] == config
    merge_dsee(arch)
    merged = {n: t.clone() for n, t in arch.model.state_dict().items()}
    with pytest.raises(ValueError, match='carries no adapter'):
        merge_dsee(arch)
    with pytest.raises(ValueError, match='carries no adapter'):
        update_importance(arch)
    assert all(torch.equal(t, merged[n]) for n, t in arch.model.state_dict().items())


def test_uneven_heads_and_gqa():
    "Heads that share keys: whole groups go, and the update's rows with them"
    arch = add_dsee(tiny_arch('llama'), r=2, n_sparse=6, targets=('q', 'k', 'v', 'o'))
    with torch.no_grad():
        for name, p in arch.model.named_parameters():
            if 'lora_B' in name or 'lora_S' in name:
                p.normal_()
    scores = update_importance(arch)
    delta = {part: getattr(arch.attns[0], part).site.update().abs() for part in 'qkvo'}
    rows, own = slice(8, 16), slice(0, 8)  # query head 1 shares the first key head with head 0
    expected = delta['q'][rows].sum() + (delta['k'][own].sum() + delta['v'][own].sum()) / 2 + delta['o'][:, rows].sum()
    torch.testing.assert_close(scores[0, 1], expected.detach())
    prune_adapted_heads(arch, select_heads(scores, keep=2, scope='layer', group_size=arch.group_size))
    assert [a.n_kv_heads for a in arch.attns] == [1, 1]
    assert arch.attns[0].k.site.lora_B['default'].weight.shape == (8, 2)
    assert arch.attns[0].o.site.lora_A['default'].weight.shape == (2, 16)
    logits(arch)


@pytest.mark.parametrize('name', ['rpca', 'dsee'])
def test_benchmarks_run(benchmark, name, tmp_path):
    module = benchmark(name)
    small = {'rpca': ['--matrices', '2', '--size', '48', '--rank', '4', '--repeats', '1', '--no_minilm'],
             'dsee': ['--width', '64', '--layers', '1', '--batch_size', '2', '--seq_len', '8', '--repeats', '2', '--r', '4']}
    out = tmp_path / 'found.json'
    threads = torch.get_num_threads()
    module.main([*small[name], '--threads', str(threads), '--out', str(out)])
    rows = json.loads(out.read_text())['rows']
    if name == 'rpca':
        assert [r['wrong_positions'] for r in rows if r['algorithm'] == 'grebsmo' and r['matrices'] == 'planted'] == [0]
    else:
        rows = {r['model']: r for r in rows}
        assert rows['dsee']['trainable'] - rows['lora']['trainable'] == 2 * 16
        assert rows['dsee']['optimizer_numbers'] - rows['lora']['optimizer_numbers'] == 2 * 2 * 16
        assert rows['dsee']['adapter_bytes'] - rows['lora']['adapter_bytes'] == 2 * 16 * 12
        assert rows['merged']['adapter_bytes'] - rows['dsee']['adapter_bytes'] == 2 * 64 * 64 // 8
