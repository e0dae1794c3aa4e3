"Distillation: several processes and accumulation, resuming, storing answers, and the experiments that use it"
import pytest
import torch
from safetensors.torch import load_file
from test_distributed import distance, part, read, run
from transformers import TrainerCallback

from tpa_nb.distill import Distillation, distill
from tpa_nb.dsee import add_dsee
from tpa_nb.families import tiny_arch
from tpa_nb.importance import neuron_importance
from tpa_nb.lora_expert import add_lora_expert
from tpa_nb.moe import moefy
from tpa_nb.moebert import BalanceLoss, moebert
from tpa_nb.prune import prune_heads, prune_neurons, select_neurons
from tpa_nb.runner import Cell
from tpa_nb.save import load_model, save_model
from tpa_nb.tasks import toy_pairs
from tpa_nb.train import finetune, make_trainer


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp('distilled'), one=['distilled', 'narrow'], two=['distilled', 'narrow'])


@pytest.mark.parametrize('case', ['distilled', 'narrow'])
def test_two_processes_distil_as_one(trained, case):
    (one, said), (first, said0), (second, _) = (read(trained, case, n, r) for n, r in ((1, 0), (2, 0), (2, 1)))
    assert distance(part(first, 'gradients'), part(one, 'gradients')) < 1e-5
    assert distance(part(first, 'weights'), part(one, 'weights')) < 1e-5
    assert all(torch.equal(first[n], second[n]) for n in first), 'both processes hold the same'
    maps, maps0 = (torch.tensor(s['maps']) for s in (said, said0))
    assert len(maps) == (3 if case == 'narrow' else 0)
    torch.testing.assert_close(maps0, maps, rtol=1e-4, atol=1e-6)
    for a, b in zip(said['history']['log'], said0['history']['log'], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


class StopAfter(TrainerCallback):
    "Ends the run with its first epoch"
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_stopped_run_goes_on_with_its_projections(tmp_path, monkeypatch):
    task, teacher = toy_pairs(n_train=64, n_validation=16).with_max_length(32), tiny_arch('bert', seed=1)
    new = lambda: tiny_arch('bert', hidden_size=16)
    monkeypatch.setattr(Distillation, 'lr', 0.1)  # maps that move far
    settings = dict(lr=1e-3, warmup_ratio=0, lr_scheduler_type='constant')
    whole = distill(new(), teacher, task, epochs=2, **settings)

    student = new()
    trainer = make_trainer(student, task, output_dir=tmp_path, added=[Distillation(student, teacher, task)],
                           num_train_epochs=2, learning_rate=1e-3, seed=0, save_strategy='epoch',
                           lr_scheduler_type='constant')
    trainer.add_callback(StopAfter())
    trainer.train()
    stored, fresh = load_file(next(tmp_path.glob('*/added.safetensors'))), Distillation(new(), teacher, task).state_dict()
    assert max((stored[f'0.{k}'] - fresh[k]).abs().max() for k in fresh) > 0.1, 'the maps had moved'
    again = distill(new(), teacher, task, epochs=2, output_dir=tmp_path, resume=True, **settings)
    for (n, p), q in zip(whole.model.named_parameters(), again.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=n)


def test_nothing_of_the_teacher_is_saved(tmp_path):
    task, teacher = toy_pairs(n_train=32, n_validation=16).with_max_length(32), tiny_arch('bert', seed=1)
    student = distill(tiny_arch('bert', hidden_size=16), teacher, task, epochs=1)
    plain = finetune(tiny_arch('bert', hidden_size=16), task, epochs=1)
    save_model(student, tmp_path / 'student')
    save_model(plain, tmp_path / 'plain')
    sizes = [(tmp_path / who / 'model.safetensors').stat().st_size for who in ('student', 'plain')]
    assert sizes[0] == sizes[1]
    for (n, p), q in zip(student.model.named_parameters(), load_model(tmp_path / 'student').model.parameters()):
        assert torch.equal(p, q), n


def test_early_stopping_watches_the_task_alone():
    task = toy_pairs(n_train=64, n_validation=16).with_max_length(32)
    student = distill(tiny_arch('bert'), tiny_arch('bert', seed=1), task, epochs=3, early_stopping=1, holdout=0.25)
    log = student.history[-1]['log']
    assert any('eval_accuracy' in row for row in log)
    assert max(row['loss'] for row in log if 'loss' in row) > 2, 'the logged loss holds all terms'


def test_distilled_cells_get_the_same_steps_and_say_what_the_teacher_cost(prune_lora, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_lora, 'best_weight', lambda teacher: 1)
    found = {m: prune_lora.run(Cell('mrpc', m, 'keep=5'), data_dir='', cache=tmp_path)
             for m in ('warm', 'warm-distill', 'warm-self')}
    assert {r['steps'] for r in found.values()} == {8}
    assert [r.get('teacher_steps') for r in found.values()] == [None, 8, 0]
    assert {tuple(r['kept']) for r in found.values()} == {tuple(found['warm']['kept'])}, 'the same heads are left'
    assert len({tuple(r['loss']) for r in found.values()}) == 3
    assert sorted(p.name.split('-')[0] for p in (tmp_path / 'whole').iterdir() if p.is_dir()) == ['mrpc', 'teacher']


def test_a_weight_of_zero_is_the_plain_method(prune_lora, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_lora, 'best_weight', lambda teacher: 1e-30)
    plain = prune_lora.run(Cell('mrpc', 'warm', 'keep=5'), data_dir='', cache=tmp_path)
    same = prune_lora.run(Cell('mrpc', 'warm-self', 'keep=5'), data_dir='', cache=tmp_path)
    assert same['answers'] == plain['answers']
    assert same['loss'] == pytest.approx(plain['loss'], rel=1e-4)


def test_weights_are_chosen_on_training_rows(prune_lora, tmp_path, monkeypatch):
    tried = prune_lora.run(Cell('mrpc', 'tune-distill', 'keep=5,teacher=lora,weight=5'), data_dir='', cache=tmp_path)
    assert tried['rows']['train'] + tried['rows']['validation'] == 64
    assert (tried['teacher'], tried['weight']) == ('lora', 5)
    assert not (tmp_path / 'whole').exists()
    scores = {1: 0.6, 5: 0.7}
    cells = [{'task': c.task, 'method': c.method, 'setting': c.setting,
              'result': {'metric': 'accuracy', 'accuracy': scores[prune_lora.choices(c.setting)['weight']]}}
             for c in prune_lora.distill_tuning_grid()]
    monkeypatch.setattr(prune_lora, 'read_cells', lambda folder: cells)
    assert prune_lora.best_weight('lora') == 5
    monkeypatch.setattr(prune_lora, 'read_cells', lambda folder: cells[:-1])
    prune_lora.best_weight.cache_clear()
    with pytest.raises(ValueError, match='run --stage tune-distill first'):
        prune_lora.best_weight('self')


def moefied(arch, task):
    return moefy(arch, n_experts=4, k=2, split='random', router='hash', calibration=task.calibration(16))


def dealt(arch, task):
    return moebert(arch, neuron_importance(arch, task.calibration(16)), 22, 8, router='token')


def lighter(arch, task):
    return prune_neurons(arch, select_neurons(neuron_importance(arch, task.calibration(16)), pruning_ratio=0.5))


STUDENTS = {'neurons': lighter, 'moefied': moefied, 'moebert': dealt,
            'dsee': lambda arch, task: add_dsee(prune_heads(arch, {0: [1]}), r=2),
            'lora expert': lambda arch, task: add_lora_expert(moefied(arch, task), r=4)}


@pytest.mark.parametrize('kind', STUDENTS)
def test_every_student_of_this_package_can_learn(kind, tmp_path):
    task, teacher = toy_pairs(n_train=64, n_validation=16).with_max_length(40), tiny_arch('bert')
    student = STUDENTS[kind](teacher.clone(), task)
    names, added = list(student.model.state_dict()), [BalanceLoss(student)] if kind == 'moebert' else []
    distill(student, teacher, task, epochs=6, lr=3e-3, labels=False, added=added)
    losses = [row['loss'] for row in student.history[-1]['log']]
    assert losses[-1] < 0.95 * losses[0], losses
    assert list(student.model.state_dict()) == names
    save_model(student, tmp_path / 'model')
    batch = next(task.examples('validation').batches(student.tokenizer))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'model').model(**batch).logits, student.model(**batch).logits)
