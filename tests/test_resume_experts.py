"Checkpoints of a model with experts hold all that trains, with an adapter beside them and without"
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tpa_nb.families import tiny_arch
from tpa_nb.lora import add_lora
from tpa_nb.lora_expert import add_lora_expert
from tpa_nb.moe import moefy, moes
from tpa_nb.tasks import toy_pairs
from tpa_nb.train import finetune

TASK = toy_pairs(n_train=48, n_validation=8).with_max_length(32)
CALIBRATION = TASK.calibration(16)


def mixed(adapter, shift=0.0):
    "A tiny mixture with LoRA experts, with an adapter or without; `shift` moves what the checkpoint has to bring back"
    arch = moefy(tiny_arch('bert'), 8, 2, CALIBRATION, epochs=1)
    arch = add_lora(arch, r=2, train=('head',)) if adapter else arch
    add_lora_expert(arch, 4)
    with torch.no_grad():
        for moe in moes(arch).values():
            moe.shared.lora_down += shift
            moe.router.first.weight += 0 if adapter else shift  # frozen beneath an adapter: what makes the model, makes it
    return arch


def state(arch):
    return {n: t.clone() for n, t in arch.model.state_dict().items()}


def differing(a, b):
    assert a.keys() == b.keys()
    return [n for n in a if not torch.equal(a[n], b[n])]


@pytest.mark.parametrize('adapter', [True, False])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, adapter):
    settings = dict(epochs=2, lr=1e-2, batch_size=8, progress=False, output_dir=tmp_path, save_total_limit=None)
    whole = finetune(mixed(adapter), TASK, **settings)
    first, second = sorted(tmp_path.glob('checkpoint-*'), key=lambda p: int(p.name.split('-')[1]))
    assert (first / 'beneath.safetensors').exists() == adapter
    shutil.rmtree(second)
    again = finetune(mixed(adapter, shift=1.0), TASK, resume=True, **settings)
    assert not differing(state(again), state(whole))


def test_a_checkpoint_holds_the_adapter_once_and_the_experts_beside_it(tmp_path):
    finetune(mixed(True), TASK, epochs=1, progress=False, output_dir=tmp_path)
    folder, = tmp_path.glob('checkpoint-*')
    below = load_file(folder / 'beneath.safetensors')
    assert {n.split('.')[-1] for n in below} == {'lora_up', 'lora_down', 'neurons'}
    assert not [n for n in load_file(folder / 'adapter_model.safetensors') if 'shared' in n]


def test_an_adapter_alone_needs_no_second_file(tmp_path):
    finetune(add_lora(tiny_arch('bert'), r=2), TASK, epochs=1, progress=False, output_dir=tmp_path)
    folder, = tmp_path.glob('checkpoint-*')
    assert {f.name for f in folder.glob('*.safetensors')} == {'adapter_model.safetensors'}


@pytest.mark.parametrize('adapter', [True, False])
def test_early_stopping_returns_to_the_whole_best_epoch(tmp_path, adapter):
    arch = finetune(mixed(adapter), TASK, epochs=4, lr=0.3, batch_size=8, early_stopping=1, holdout=0.25,
                    output_dir=tmp_path, progress=False, save_total_limit=None)
    best = max((r for r in arch.history[-1]['log'] if 'eval_accuracy' in r), key=lambda r: r['eval_accuracy'])
    folders = {int(p.name.split('-')[1]): p for p in tmp_path.glob('checkpoint-*')}
    assert best['step'] < max(folders), 'it did not end with the best epoch'
    name = 'beneath' if adapter else 'model'
    stored, last = (load_file(folders[step] / f'{name}.safetensors') for step in (best['step'], max(folders)))
    found = {n: t for n, t in state(arch).items() if n in stored}
    assert found.keys() == stored.keys() and not differing(found, stored) and differing(found, last)


def test_a_checkpoint_without_the_experts_is_refused_and_changes_nothing(tmp_path):
    settings = dict(epochs=2, batch_size=8, progress=False, output_dir=tmp_path)
    finetune(mixed(True), TASK, **settings)
    for file in tmp_path.glob('checkpoint-*/beneath.safetensors'):
        file.unlink()
    arch = mixed(True)
    before = state(arch)
    with pytest.raises(ValueError, match='is in one of them only; give another `output_dir` or leave out `resume`'):
        finetune(arch, TASK, resume=True, **settings)
    assert not differing(state(arch), before)
