"The experiment on MoEfication: shared models, equal steps, and every method from routing to folding on a toy task"

from dataclasses import replace

import pytest

from tpa_nb.families import tiny_arch
from tpa_nb.router import relufy
from tpa_nb.runner import Cell
from tpa_nb.tasks import toy_sentences


@pytest.fixture
def script(experiment):
    "The script on a toy"
    return experiment('moefication', best_rate=lambda way: 1e-3, EPOCHS={'mrpc': 2},
                      DEFAULTS=dict(experts=8, k=2, split='kmeans', r=32, times=1, rows=2048,
                                    sparse=0))


def test_methods_share_models_and_get_equal_steps(script, tmp_path):
    found = {method: script.run(Cell('mrpc', method), data_dir='', cache=tmp_path)
             for method in (*script.GRID, *script.TRIED)}
    untrained = [m for m in found if '+' not in m or m.partition('+')[2] in script.UNTRAINED]
    assert {found[m]['steps'] for m in untrained} == {4}
    assert {r['steps'] for m, r in found.items() if m not in untrained} == {6}
    fits = found['mlp+fitted-expert']['fit']
    compensated = {m: found[m]['compensated'] for m in found}
    assert {m for m, rows in compensated.items() if rows} == {
        'mlp+compensated', 'mlp+both', 'mlp+both-expert', 'mlp+both-unlabelled'}
    assert fits['left'] < fits['missing'] and found['mlp+expert']['fit'] is None
    assert {p.name for p in (tmp_path / 'whole').iterdir() if p.is_dir()} == {
        'dense-mrpc-0', 'mlp-8-2-kmeans-mrpc-0', 'paper-8-2-kmeans-mrpc-0'}
    assert found['mlp']['router']['contribution'] == 'distance' != found['paper']['router']['contribution']
    assert found['dynamic']['mean_k'] != found['mlp']['mean_k'] == [2, 2]
    assert all(0 < z < 1 for z in found['dense']['zeros'])
    grown = 2 * 32 * 32  # neurons of a layer's LoRA expert: up and down
    for way in ('mlp', 'dense'):
        assert found[f'{way}+expert']['params'] - found[way]['params'] - 2 * grown in (0, 2 * 32)  # biases in dense layers
        assert found[f'{way}+expert']['trainable'] == 2 * grown + 2 * 33
    assert found['mlp+attention']['params'] == found['mlp']['params']
    assert found['mlp']['flops'] < found['mlp+expert']['flops'] < found['dense']['flops'] < found['dense+expert']['flops']


def test_twice_as_many_steps(script, tmp_path):
    once, twice = (script.run(Cell('mrpc', 'mlp+expert', s), data_dir='', cache=tmp_path)['steps'] for s in ('', 'times=2'))
    assert (once, twice) == (6, 8)
    assert {c.setting for c in script.longer_grid(['mrpc'], [0])} == {'times=2'}


def test_rates_are_chosen_on_training_rows(script, tmp_path):
    tuned = script.run(Cell('mrpc', 'tune-expert', 'lr=1e-03'), data_dir='', cache=tmp_path)
    assert sum(tuned['rows'].values()) == 64
    assert not (tmp_path / 'whole').exists()


def test_every_cell_of_the_sweep_runs(script, tmp_path):
    small = {'k': {5: 1, 14: 3, 24: 4, 2: 1, 19: 4}, 'experts': {12: 2, 24: 4, 96: 16}}
    found = {}
    for cell in script.sweep_grid(['mrpc'], [0]):
        asked = {k: small.get(k, {}).get(v, v) for k, v in script.choices(cell.setting).items()}
        r = script.run(Cell('mrpc', cell.method, script.setting(**asked)), data_dir='', cache=tmp_path)
        found[cell.method, cell.setting] = r
        assert r['mean_k'] == [asked.get('k', 2)] * 2 or cell.method == 'dynamic'
    ranks = [found['mlp+expert', f'r={r}']['trainable'] for r in (8, 128)]
    assert ranks[0] < ranks[1]
    assert {r['router']['router'] for (m, _), r in found.items() if m in ('hash', 'centroid')} == {'hash', 'centroid'}


def test_cells_once_more_and_budgets_are_cells_that_there_are(script, tmp_path):
    once = script.run(Cell('mrpc', 'mlp'), data_dir='', cache=tmp_path)
    again = script.run(Cell('mrpc', 'mlp', 'repeat=1'), data_dir='', cache=tmp_path)
    assert again['answers'] == once['answers'], 'of the same dense model, in one folder'
    cells = script.again_grid(['mrpc'], [0], ('mlp', 'dynamic'))
    assert [(c.method, c.setting) for c in cells] == [
        ('mlp', 'repeat=1'), ('dynamic', 'repeat=1'), ('mlp', 'split=coactivation,repeat=1')]
    budgets = script.budget_grid(['mrpc'], [0])
    assert len({c.name for c in budgets}) == len(budgets) == 2 * 2 * 4
    swept = {c.name for c in script.grid(['mrpc'], [0]) + script.sweep_grid(['mrpc'], [0])}
    assert {c.name for c in budgets} <= swept, 'no run is asked for under two names'


def test_dense_models_that_were_trained_for_sparse_activations(script, tmp_path):
    found = {s: script.run(Cell('mrpc', 'dense', s), data_dir='', cache=tmp_path) for s in ('repeat=2', 'sparse=3')}
    assert found['repeat=2']['steps'] == found['sparse=3']['steps']
    assert sum(found['sparse=3']['zeros']) > sum(found['repeat=2']['zeros']), 'a few steps show it'
    routed = script.run(Cell('mrpc', 'mlp', 'split=coactivation,sparse=3'), data_dir='', cache=tmp_path)
    assert routed['steps'] == found['sparse=3']['steps'] and routed['mean_k'] == [2, 2]
    names = {p.name for p in (tmp_path / 'whole').iterdir() if p.is_dir()}
    assert names == {'dense-mrpc-0', 'dense-mrpc-0-3', 'mlp-8-2-coactivation-mrpc-0-3'}


def test_the_small_t5_takes_part(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'load_task', lambda *args, **kwargs: replace(
        toy_sentences(n_train=64, n_validation=24), name='sst2', text_columns=('sentence',)))
    monkeypatch.setitem(script.EPOCHS, 't5-sst2', 2)
    monkeypatch.setattr(script, 'ROWS', 32)
    found = {m: script.run(Cell('t5-sst2', m), data_dir='', cache=tmp_path)
             for m in ('dense', 'mlp', 'mlp+expert')}
    assert found['mlp+expert']['steps'] == found['dense']['steps'] + 1, 'it recovers on the smaller part'
    assert found['mlp']['flops'] < found['mlp+expert']['flops'] < found['dense']['flops']
    assert len(found['mlp']['mean_k']) == 3, 'encoder and decoder'


def test_every_way_that_trains_has_learning_rates(experiment):
    script = experiment('moefication')
    ways = {method.partition('+')[2] for method in (*script.GRID, *script.LONGER, *script.TRIED)} - {'', *script.UNTRAINED}
    named = {'distilled': 'expert', 'both-expert': 'fitted-expert'}
    assert {named.get(way, way) for way in ways} == set(script.RATES)
    cells = script.tuning_grid()
    assert {c.method for c in cells} == {f'tune-{way}' for way in (*script.RATES, *(way for way, _ in script.BESIDE))}
    assert len({c.name for c in cells}) == len(cells)


def test_the_parts_one_by_one(experiment, tmp_path):
    task = replace(toy_sentences(n_train=80, n_validation=8), name='sst2').with_max_length(24)
    script = experiment('expert_choices', load=lambda *args: task, epochs_of=lambda task: 2,
                        DEFAULTS=dict(experts=8, k=2, split='kmeans', r=4),
                        SPARSE=[dict(weight=1, **k) for k in ({}, dict(k=2))],
                        dense_model=lambda task, seed, cache, sparse=0: relufy(tiny_arch('bert', seed=seed)))
    found = {(c.method, c.setting): script.run(c, data_dir='', cache=tmp_path) for c in script.grid([0])}
    assert found['gelu', '']['rows'] == {'train': 64, 'validation': 16}, 'a slice of the training rows'
    steps = {way: found[way, '']['steps'] for way in script.RELU if way != 'biases-on'}
    assert steps == {'gelu': 2, 'relu': 2, 'biases': 2, 'gelu-on': 4, 'relu-on': 4, 'relu-first': 4}
    assert max(found['gelu-on', '']['zeros']) < 0.01 < min(found['relu', '']['zeros'])
    errors = {s: r['layers'] for (m, s), r in found.items() if m == 'router'}
    assert len(errors) == 6 and len({tuple(e['error']) for e in errors.values()}) > 3
    distance, activation = (errors[f'contribution={kind},scale=token'] for kind in ('distance', 'activation'))
    assert distance['error_oracle'] < activation['error_oracle'], 'the best by distance leaves out less'
    assert {r['steps'] for (m, s), r in found.items() if m == 'expert'} == {2}
    assert found['sparse', 'weight=1']['layers'] is None is not found['sparse', 'weight=1,k=2']['layers']
