"The experiment on compensation: the same heads and neurons go in every way, and what is varied is varied"
import math
from dataclasses import replace

import pytest

from tpa_nb.families import tiny_arch


@pytest.fixture
def script(experiment):
    "The script on a toy"
    return experiment('compensate', taught=lambda task, seed, cache: tiny_arch('bert', seed=seed), CALIBRATION=32)


def tiny(script, cell):
    "The cell with as many heads, neurons and rows as there are"
    sizes = {36: 5, 24: 3, 768: 32, 384: 16, 2048: 64, 64: 8}
    asked = {k: sizes.get(v, v) for k, v in script.choices(cell.setting).items()}
    return replace(cell, setting=script.setting(**asked))


def test_all_ways_remove_the_same(script, tmp_path):
    flops = {}
    for cell in script.grid(['mrpc'], [0]):
        r = script.run(tiny(script, cell), data_dir='', cache=tmp_path)
        flops.setdefault(cell.setting, set()).add(r['flops'])
        (ridge,) = [h['ridge'] for h in r['compensated']] or [None]
        assert ridge == {'means': 'inf', 'least-squares': 0.1}.get(cell.method)
    assert all(len(f) == 1 for f in flops.values()) and len(flops) == 5, flops
    assert flops[''] == {1.0}


def test_every_ablation_runs(script, tmp_path):
    for cell in script.ablation_grid(['mrpc'], [0]):
        asked = script.choices(cell.setting)
        r = script.run(tiny(script, cell), data_dir='', cache=tmp_path)
        assert r['flops'] < 1
        for h in r['compensated']:
            assert h['ridge'] == asked.get('ridge', {math.inf: 'inf'}.get(script.WAYS[cell.method], 0.1))


def test_chance_does_not_choose_what_importance_chooses(script, tmp_path):
    arch, task = tiny_arch('bert'), script.load_task()
    by = [script.chosen(arch, task, 0, {'neurons': 16, 'by': by}) for by in ('importance', 'random')]
    assert by[0] != by[1]
