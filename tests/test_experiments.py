"The grid of experiments: equal steps for all methods, shared warm-ups, answers that give the scores"
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

from tpa_nb.runner import Cell

EXPERIMENTS = Path(__file__).parent.parent / 'experiments'


def test_every_method_gets_the_same_steps_and_its_answers_give_its_score(prune_lora, tmp_path):
    found = {}
    for method in ('full', 'lora', 'warm', 'random-warm', 'cold', 'random-cold', 'kept'):
        cell = Cell('mrpc', method, '' if method in ('full', 'lora') else 'keep=5')
        found[method] = prune_lora.run(cell, data_dir='', cache=tmp_path)
    assert {r['steps'] for r in found.values()} == {8}
    for method, r in found.items():
        right = sum(a == b for a, b in zip(r['labels'], r['answers'])) / len(r['labels'])
        assert r['accuracy'] == pytest.approx(right)
        assert sum(r['kept']) == (8 if method in ('full', 'lora') else 5)
    assert sum(p.is_dir() for p in (tmp_path / 'whole').iterdir()) == 1, 'the two warm cells share one warm-up'
    assert found['warm']['importance'] == found['random-warm']['importance'], 'the same model was measured'
    assert found['warm']['importance'] != found['cold']['importance']


def test_choices_are_made_on_training_rows(prune_lora, tmp_path):
    tuned = prune_lora.run(Cell('mrpc', 'tune-lora', 'lr=1e-03'), data_dir='', cache=tmp_path)
    tried = prune_lora.run(Cell('mrpc', 'explore', 'keep=5,normalize=none'), data_dir='', cache=tmp_path)
    kept = prune_lora.run(Cell('mrpc', 'explore', 'keep=5,adapter=kept'), data_dir='', cache=tmp_path)
    assert sum(kept['kept']) == 5 and kept['steps'] == tried['steps'] and kept['importance'] is not None
    for r in (tuned, tried, kept):
        assert r['rows']['train'] + r['rows']['validation'] == 64
    assert tried['recipe']['normalize'] is None
    assert not (tmp_path / 'whole').exists(), 'a warm-up on all training rows would have seen the slice'


def test_the_adapter_after_pruning_has_the_scale_of_lora(prune_lora, tmp_path):
    found = [prune_lora.run(Cell('mrpc', 'explore', f'keep=5{more}'), data_dir='', cache=tmp_path)
             for more in ('', ',scale=2', ',scale=1', ',lr_after=5e-04')]
    assert found[0]['loss'] == found[1]['loss'], 'alpha 16 at rank 8 is a scale of 2'
    assert len({str(r['loss']) for r in found}) == 3 and {r['steps'] for r in found} == {found[0]['steps']}
    again = prune_lora.run(Cell('mrpc', 'explore', 'keep=5,lr_after=1e-03'), data_dir='', cache=tmp_path)
    assert again['loss'] == found[0]['loss'], 'another rate, not another scale'


def test_the_rate_of_lora_runs_on_past_the_pruning(prune_lora, tmp_path):
    recipe = prune_lora.recipe_of(Cell('mrpc', 'explore', 'keep=5,schedule=whole,warm_up=8e-01'))
    task, lr = prune_lora.load_task('mrpc'), recipe.lr
    rates = {whole: [row['learning_rate'] for row in prune_lora.warmed(task, recipe, tmp_path, whole).history[-1]['log']]
             for whole in (False, True)}
    assert rates[False][1:] == [lr] * len(rates[False][1:])
    assert lr > rates[True][1] > rates[True][-1] == pytest.approx(0.2 * lr, rel=0.6) and rates[True][-1] > 0.2 * lr
    assert prune_lora.rate_after(recipe, True) == pytest.approx(0.2 * lr) and prune_lora.rate_after(recipe, False) == lr
    found = [prune_lora.run(Cell('mrpc', 'explore', f'keep=5{more}'), data_dir='', cache=tmp_path)
             for more in ('', ',schedule=whole', ',adapter=kept', ',adapter=kept,schedule=whole')]
    assert len({str(r['loss']) for r in found}) == 4 and {r['steps'] for r in found} == {8}


def test_longer_and_larger_cells(prune_lora, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_lora, 'ROWS', 40)
    monkeypatch.setattr(prune_lora, 'SCORED', 8)
    once, thrice = (prune_lora.run(Cell('mrpc', 'lora', more), data_dir='', cache=tmp_path) for more in ('', 'times=3'))
    assert thrice['steps'] == 3 * once['steps']
    lora, pruned = (prune_lora.run(Cell('mrpc', 'large', how), data_dir='', cache=tmp_path) for how in ('', 'keep=5'))
    assert lora['steps'] == pruned['steps'] and (sum(lora['kept']), sum(pruned['kept'])) == (8, 5)
    assert lora['rows'] == {'train': 40, 'validation': 8}


@pytest.mark.parametrize('name, needed', [
    ('prune_lora', 'data_dir'), ('moefication', 'data_dir'), ('moebert', 'data_dir'), ('dsee', 'data_dir'),
    ('compensate', 'data_dir'),
    ('data_to_text', 'data_dir'),
    ('against_torch_pruning', 'data_dir'), ('llama', 'model_dir')])
def test_a_dry_run_lists_what_is_missing(name, needed):
    call = lambda *args: subprocess.run([sys.executable, EXPERIMENTS / f'{name}.py', *args], capture_output=True,
                                        text=True)
    done = call('--dry_run', '--seeds', '7', *(['--tasks', 'rte'] if needed == 'data_dir' else []))
    assert done.returncode == 0 and 'cells are done; missing:' in done.stdout
    assert 's7' in done.stdout if name == 'against_torch_pruning' else 's6' in done.stdout
    wrong = call()
    assert wrong.returncode == 1 and f'give --{needed}' in wrong.stderr


@pytest.mark.parametrize('name', sorted(p.stem for p in EXPERIMENTS.glob('*.py') if 'call_parse' in p.read_text()))
def test_every_script_has_the_options_of_the_runner_and_names_a_stage_that_is_not_there(experiment, name):
    main = experiment(name).main
    options = signature(main).parameters
    assert {'shard', 'minutes', 'jobs', 'cache_dir', 'dry_run'} <= set(options)
    trained = {'tasks'} if name in ('dsee', 'moebert', 'moefication', 'prune_lora') else set()  # those that know epochs
    for option in trained | ({'stage', 'systems', 'tables'} & set(options)):
        with pytest.raises(SystemExit, match=f"{name}.py: --{option} knows .*; got 'grit'"):
            main(**{option: 'grit'}, dry_run=True)
