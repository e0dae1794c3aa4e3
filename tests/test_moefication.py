"The experiment on MoEfication: shared models, equal steps, and every method from routing to folding on a toy task"
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tpa_nb.families import tiny_arch
from tpa_nb.runner import Cell
from tpa_nb.tasks import toy_pairs

SCRIPT = Path(__file__).parent.parent / 'experiments' / 'moefication.py'


@pytest.fixture
def script(monkeypatch):
    "The script with a tiny model and a toy task in place of the real ones"
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location('moefication', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = replace(toy_pairs(n_train=64, n_validation=24), name='mrpc').with_max_length(24)
    tiny = type('Tiny', (), {'from_pretrained': staticmethod(lambda name, task, seed: tiny_arch('bert', seed=seed))})
    monkeypatch.setattr(module, 'load_task', lambda *args, **kwargs: task)
    monkeypatch.setattr(module, 'Arch', tiny)
    monkeypatch.setattr(module, 'best_rate', lambda way: 1e-3)
    monkeypatch.setattr(module, 'EPOCHS', {'mrpc': 2})
    monkeypatch.setattr(module, 'EXPERTS', 8)
    return module


def test_methods_share_models_and_get_equal_steps(script, tmp_path):
    found = {method: script.run(Cell('mrpc', method, 'experts=8,k=2'), data_dir='', cache=tmp_path)
             for method in script.GRID}
    assert {r['steps'] for m, r in found.items() if '+' not in m} == {4}
    assert {r['steps'] for m, r in found.items() if '+' in m} == {6}
    assert {p.name for p in (tmp_path / 'whole').iterdir()} == {'dense-mrpc-0', 'mlp-8-2-mrpc-0', 'paper-8-2-mrpc-0'}
    assert found['mlp']['router']['contribution'] == 'distance' != found['paper']['router']['contribution']
    assert found['dynamic']['mean_k'] != found['mlp']['mean_k'] == [2, 2]
    assert all(0 < z < 1 for z in found['dense']['zeros'])
    grown = 2 * 32 * 32  # neurons of a layer's LoRA expert: up and down
    for way in ('mlp', 'dense'):
        assert found[f'{way}+expert']['params'] - found[way]['params'] - 2 * grown in (0, 2 * 32)  # biases in dense layers
        assert found[f'{way}+expert']['trainable'] == 2 * grown + 2 * 33
    assert found['mlp+attention']['params'] == found['mlp']['params']
    assert found['mlp']['flops'] < found['mlp+expert']['flops'] < found['dense']['flops'] < found['dense+expert']['flops']


def test_rates_are_chosen_on_training_rows(script, tmp_path):
    tuned = script.run(Cell('mrpc', 'tune-expert', 'lr=1e-03'), data_dir='', cache=tmp_path)
    assert sum(tuned['rows'].values()) == 64
    assert not (tmp_path / 'whole').exists()


def test_a_dry_run_lists_what_is_missing():
    done = subprocess.run([sys.executable, SCRIPT, '--dry_run', '--tasks', 'wnli', '--seeds', '1'], capture_output=True,
                          text=True)
    assert done.returncode == 0 and 'cells are done; missing:' in done.stdout
    wrong = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert wrong.returncode == 1 and 'give --data_dir' in wrong.stderr
