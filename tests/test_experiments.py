"The grid of experiments: equal steps for all methods, shared warm-ups, answers that give the scores"
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tpa_nb.families import tiny_arch
from tpa_nb.runner import Cell
from tpa_nb.tasks import toy_pairs

SCRIPT = Path(__file__).parent.parent / 'experiments' / 'prune_lora.py'


@pytest.fixture
def script(monkeypatch):
    "The script with a tiny model and a toy task in place of the real ones"
    spec = importlib.util.spec_from_file_location('prune_lora', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = replace(toy_pairs(n_train=64, n_validation=24), name='mrpc').with_max_length(24)
    tiny = type('Tiny', (), {'from_pretrained': staticmethod(lambda name, task, seed: tiny_arch('bert', seed=seed))})
    monkeypatch.setattr(module, 'load_task', lambda *args, **kwargs: task)
    monkeypatch.setattr(module, 'Arch', tiny)
    monkeypatch.setattr(module, 'best_rate', lambda method: 1e-3)
    monkeypatch.setattr(module, 'EPOCHS', {'mrpc': 4})
    return module


def test_every_method_gets_the_same_steps_and_its_answers_give_its_score(script, tmp_path):
    found = {}
    for method in ('full', 'lora', 'warm', 'random-warm', 'cold', 'random-cold'):
        cell = Cell('mrpc', method, '' if method in ('full', 'lora') else 'keep=5')
        found[method] = script.run(cell, data_dir='', cache=tmp_path)
    assert {r['steps'] for r in found.values()} == {8}
    for method, r in found.items():
        right = sum(a == b for a, b in zip(r['labels'], r['answers'])) / len(r['labels'])
        assert r['accuracy'] == pytest.approx(right)
        assert sum(r['kept']) == (8 if method in ('full', 'lora') else 5)
    assert len(list((tmp_path / 'whole').iterdir())) == 1, 'the two warm cells share one warm-up'
    assert found['warm']['importance'] == found['random-warm']['importance'], 'the same model was measured'
    assert found['warm']['importance'] != found['cold']['importance']


def test_choices_are_made_on_training_rows(script, tmp_path):
    tuned = script.run(Cell('mrpc', 'tune-lora', 'lr=1e-03'), data_dir='', cache=tmp_path)
    tried = script.run(Cell('mrpc', 'explore', 'keep=5,normalize=none'), data_dir='', cache=tmp_path)
    for r in (tuned, tried):
        assert r['rows']['train'] + r['rows']['validation'] == 64
    assert tried['recipe']['normalize'] is None
    assert not (tmp_path / 'whole').exists(), 'a warm-up on all training rows would have seen the slice'


def test_a_dry_run_lists_what_is_missing():
    done = subprocess.run([sys.executable, SCRIPT, '--dry_run', '--tasks', 'wnli', '--seeds', '1'], capture_output=True,
                          text=True)
    assert done.returncode == 0 and 'cells are done; missing:' in done.stdout
    wrong = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert wrong.returncode == 1 and 'give --data_dir' in wrong.stderr
