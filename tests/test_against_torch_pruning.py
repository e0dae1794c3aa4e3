"The comparison with Torch-Pruning: both systems start from one model, meet the goal and take the same steps"
import subprocess
import sys
from pathlib import Path

import pytest

from tpa_nb.arch import Arch
from tpa_nb.families import tiny_arch
from tpa_nb.profile import count_flops
from tpa_nb.runner import Cell

FOLDER = Path(__file__).parent.parent / 'experiments'
SYSTEMS = ['tpa', 'tp-taylor', 'tp-width', 'tp-magnitude']


@pytest.fixture
def script(experiment):
    "The script on a toy, with FLOPs in the place of milliseconds"
    ratio = lambda arch, pruned, repeats: count_flops(pruned, 2, 16) / count_flops(arch, 2, 16)
    return experiment('against_torch_pruning', Arch=Arch, start_of=lambda *args: tiny_arch('bert'), CALIBRATION=16,
                      ROUND_TO=1, RECOVERY={'mrpc': 1}, EPOCHS={'mrpc': 2}, timed=ratio, BATCH=2, LENGTH=16,
                      TOLERANCE=0.08)


def installed(system):
    "Skip where Torch-Pruning is not there"
    return system if system == 'tpa' else pytest.importorskip('torch_pruning') and system


@pytest.mark.parametrize('system', SYSTEMS)
def test_a_cell_meets_the_goal(script, monkeypatch, tmp_path, system):
    installed(system)
    monkeypatch.setattr(script, 'tuned', lambda name: (script.SYSTEMS[name], 1e-3))
    r = script.run(Cell('mrpc', system, 'latency=75'), data_dir='', cache=tmp_path)
    assert abs(r['latency'] - 0.75) < 0.1 and r['steps'] == 2
    assert r['flops'] < r['dense_flops'] and r['params'] < r['dense_params']
    assert r['width'] == 32 or system == 'tp-width'
    assert r['accuracy'] == pytest.approx(sum(a == b for a, b in zip(r['labels'], r['answers'])) / 24)


@pytest.mark.parametrize('system', SYSTEMS[:2])
def test_ways_and_rates_are_tried_on_training_rows(script, monkeypatch, tmp_path, system):
    installed(system)
    seen = []
    monkeypatch.setattr(script, 'evaluate_model', lambda arch, task: seen.append(len(task.validation)) or
                        {'accuracy': 0.5, 'loss': 1.0})
    r = script.run(Cell('mrpc', f'tune-{system}', 'latency=75'), data_dir='', cache=tmp_path)
    assert set(seen) == {12}, 'a fifth of the 64 training rows'
    assert len(r['rates']) == len(script.RATES) and r['way'] in script.SYSTEMS[system]


def test_tuning_picks_the_best_rate_of_a_system(script, monkeypatch):
    monkeypatch.setattr(script, 'read_cells', lambda folder: [{'method': 'tune-tpa', 'result': {
        'ways': [{'way': {'add': 'squares'}}], 'rates': {'1e-04': {'score': .7, 'loss': .6},
                                                         '3e-04': {'score': .8, 'loss': .9}}}}])
    script.tuned.cache_clear()
    assert script.tuned('tpa') == ([{'add': 'squares'}], 3e-4)
    with pytest.raises(ValueError, match='not been tuned'):
        script.tuned('tp-taylor')
    script.tuned.cache_clear()


def test_the_command_line_says_what_is_wrong():
    path = FOLDER / 'against_torch_pruning.py'
    call = lambda *args: subprocess.run([sys.executable, path, *args], capture_output=True, text=True)
    assert 'mrpc.tpa.latency=50.s7' in call('--dry_run', '--seeds', '7').stdout
    assert "--systems knows tpa, tp-" in call('--dry_run', '--systems', 'tpa,other').stderr


def test_a_missing_package_is_named(script, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(SystemExit, match='pip install torch-pruning'):
        script.load_torch_pruning()
