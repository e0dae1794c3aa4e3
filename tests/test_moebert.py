"The experiment on MoEBERT: one teacher for all students, equal steps and equal size, every ablation on a toy task"
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tpa_nb.families import tiny_arch
from tpa_nb.runner import Cell
from tpa_nb.tasks import toy_pairs

SCRIPT = Path(__file__).parent.parent / 'experiments' / 'moebert.py'


@pytest.fixture
def script(monkeypatch):
    "The script with a tiny model and a toy task in place of the real ones"
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location('moebert_experiment', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = replace(toy_pairs(n_train=64, n_validation=24), name='mrpc').with_max_length(24)
    tiny = type('Tiny', (), {'from_pretrained': staticmethod(lambda name, task, seed: tiny_arch('bert', seed=seed))})
    monkeypatch.setattr(module, 'load_task', lambda *args, **kwargs: task)
    monkeypatch.setattr(module, 'Arch', tiny)
    monkeypatch.setattr(module, 'EPOCHS', {'mrpc': 1})
    monkeypatch.setattr(module, 'SIZES', {22: 8})
    monkeypatch.setattr(module, 'best', lambda way: (1e-3, 1))
    return module


def test_students_are_alike_in_size_and_steps(script, tmp_path):
    found = {c.method: script.run(c, data_dir='', cache=tmp_path) for c in script.grid(['mrpc'], [0])}
    assert {m: r['steps'] for m, r in found.items()} == {'teacher': 2, 'moebert': 4, 'dense-student': 4, 'dense-more': 4}
    assert found['moebert']['active'] == found['dense-student']['active'] == found['dense-student']['stored']
    assert found['moebert']['stored'] == found['teacher']['stored'] == found['dense-more']['active']
    assert found['moebert']['flops'] == found['dense-student']['flops'] < found['teacher']['flops']
    assert [p.name for p in (tmp_path / 'whole').iterdir()] == ['teacher-mrpc-0']
    assert set(found['moebert']['latency']) == {'dense', 'this'}


def test_every_ablation_runs(script, tmp_path, monkeypatch):
    tiny = {384: 22, 256: 8, 128: 4, 320: 16}
    for cell in script.ablation_grid(['mrpc'], [0]):
        asked = {k: tiny.get(v, v) for k, v in script.choices(cell).items()}
        r = script.run(replace(cell, setting=script.setting(**asked)), data_dir='', cache=tmp_path)
        (made,) = r['made']
        assert r['steps'] == 4 and made['expert_size'] == 22
        assert (r['weight'] == 0) == ('teacher' in asked)
        assert made['shared'] == asked.get('shared', 8)
        assert made['n_experts'][0] == asked.get('experts') or 'experts' not in asked
        assert (made['router'], made['balanced']) == {'balanced': ('hash', True)}.get(
            asked.get('router'), (asked.get('router', 'hash'), False))


def test_choices_are_made_on_training_rows(script, tmp_path):
    tuned = script.run(Cell('mrpc', 'tune-dense-student', 'lr=1e-04,weight=5'), data_dir='', cache=tmp_path)
    assert sum(tuned['rows'].values()) == 64 and (tuned['lr'], tuned['weight']) == (1e-4, 5)
    assert not (tmp_path / 'whole').exists()


def test_a_dry_run_lists_what_is_missing():
    done = subprocess.run([sys.executable, SCRIPT, '--dry_run', '--tasks', 'wnli', '--seeds', '1'], capture_output=True,
                          text=True)
    assert done.returncode == 0 and 'cells are done; missing:' in done.stdout
    wrong = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert wrong.returncode == 1 and 'give --data_dir' in wrong.stderr
