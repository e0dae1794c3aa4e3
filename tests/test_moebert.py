"The experiment on MoEBERT: one teacher for all students, equal steps and equal size, every ablation on a toy task"
from dataclasses import replace

import pytest

from tpa_nb.runner import Cell


@pytest.fixture
def script(experiment):
    "The script on a toy"
    return experiment('moebert', EPOCHS={'mrpc': 1}, STUDENT_EPOCHS={'mrpc': 2}, SIZES={22: 8},
                      MOEFIED=dict(experts=16, split='kmeans'),
                      best=lambda way, taught=True: (1e-3, int(taught)))


def test_students_are_alike_in_size_and_steps(script, tmp_path):
    found = {c.method: script.run(c, data_dir='', cache=tmp_path) for c in script.grid(['mrpc'], [0])}
    steps = {'teacher': 2, 'dense-more': 6, **dict.fromkeys(script.STUDENTS, 6)}
    assert {m: r['steps'] for m, r in found.items()} == steps
    assert found['moebert']['active'] == found['dense-student']['active'] == found['dense-student']['stored']
    assert found['moebert']['stored'] == found['teacher']['stored'] == found['dense-more']['active']
    assert found['moebert']['flops'] == found['dense-student']['flops'] < found['teacher']['flops']
    assert [p.name for p in (tmp_path / 'whole').iterdir() if p.is_dir()] == ['teacher-mrpc-0']


def test_students_are_scored_and_timed_before_training(script, tmp_path):
    for cell in script.start_grid(['mrpc'], [0]):
        r = script.run(cell, data_dir='', cache=tmp_path)
        assert r['steps'] == 2 and r['flops'] and set(r['latency']) == {'dense', 'this'}


def test_a_better_start_costs_nothing_that_runs(script, tmp_path):
    found = {}
    for cell in (*script.grid(['mrpc'], [0]), *script.better_grid(['mrpc'], [0])):
        asked = script.choices(cell.setting) | ({'size': 22} if 'size' in cell.setting else {})
        cell = replace(cell, setting=script.setting(**asked))
        found[cell.method, 'compensated' in cell.setting] = script.run(cell, data_dir='', cache=tmp_path)
    for way, _ in script.BETTER:
        plain, better = found[way, False], found[way, True]
        assert all(plain[key] == better[key] for key in ('flops', 'active', 'stored', 'steps', 'weight'))
        assert len(better['compensated']) == 1 and not plain['compensated']
    r = found['moefied', False]
    assert r['flops'] < found['teacher', False]['flops'] and r['steps'] == 6 and r['stored'] > r['active']
    assert r['made'][0]['verb'] == 'moefy' and len(r['compensated']) == 1


def test_every_ablation_runs(script, tmp_path, monkeypatch):
    tiny = {384: 22, 256: 8, 128: 4, 320: 16}
    for cell in script.ablation_grid(['mrpc'], [0]):
        asked = {k: tiny.get(v, v) for k, v in script.choices(cell.setting).items()}
        r = script.run(replace(cell, setting=script.setting(**asked)), data_dir='', cache=tmp_path)
        (made,) = r['made']
        assert r['steps'] == 6 and made['expert_size'] == 22
        assert (r['weight'] == 0) == ('teacher' in asked)
        assert made['shared'] == asked.get('shared', 8)
        assert made['n_experts'][0] == asked.get('experts') or 'experts' not in asked
        assert (made['router'], made['balanced']) == {'balanced': ('hash', True)}.get(
            asked.get('router'), (asked.get('router', 'hash'), False))


def test_choices_are_made_on_training_rows(script, tmp_path):
    tuned = script.run(Cell('mrpc', 'tune-dense-student', 'lr=1e-04,weight=5'), data_dir='', cache=tmp_path)
    assert sum(tuned['rows'].values()) == 64 and (tuned['lr'], tuned['weight']) == (1e-4, 5)
    assert not (tmp_path / 'whole').exists()
