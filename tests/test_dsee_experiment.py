"The experiment on DSEE: equal steps, shared first halves, and every cell of every table on a toy task"
import pytest

from tpa_nb.runner import Cell


@pytest.fixture
def script(experiment):
    "The script on a toy: tiny projections are 32 x 32"
    return experiment('dsee', best_rate=lambda kind: 1e-3, EPOCHS={'mrpc': 4}, R=4, SPARSE=6)


def test_every_cell_of_the_tables_runs(script, tmp_path):
    small = {'heads': {9: 3, 6: 2, 3: 1}, 'sparse': {6144: 256, 1024: 64, 256: 32}, 'r': {16: 8, 8: 4}}
    found = {}
    for cell in script.grid(script.TABLES, ['mrpc'], [0]):
        asked = {k: small.get(k, {}).get(v, v) for k, v in script.choices(cell.setting).items()}
        found[cell.method, cell.setting] = r = script.run(
            Cell('mrpc', cell.method, script.setting(**asked)), data_dir='', cache=tmp_path)
        right = sum(a == b for a, b in zip(r['labels'], r['answers'])) / len(r['labels'])
        assert r['accuracy'] == pytest.approx(right)
        if 'heads' in asked:
            assert r['heads'] == [asked['heads']] * 2 and r['flops'] < r['dense_flops']
    assert {r['steps'] for r in found.values()} == {8}
    assert found['adapter', ''].get('sparse_norm', 0) > 0 == found['adapter', 'sparse=0']['sparse_norm']
    equal = [found['adapter', script.setting(**way)]['trainable'] for way in script.EQUAL]
    assert equal[0] == equal[1]
    zeros = {s: r['zeros'] for (m, s), r in found.items() if m == 'zeros'}
    assert zeros['ratio=30,mask=merged'] == pytest.approx(0.3, abs=0.01) == zeros['ratio=50,steps=4'] - 0.2
    assert zeros['ratio=50,mask=weight'] < 0.5, 'a merge fills zeros of the weight that an update covers'
    names = {p.name for p in (tmp_path / 'whole').iterdir() if p.is_dir()}
    assert names == {'mrpc-0-0.001-2-4-6', 'mrpc-0-0.001-2-4-0'}, 'first halves are shared'


def test_rates_are_chosen_on_training_rows(script, tmp_path):
    tuned = script.run(Cell('mrpc', 'tune-low', 'sparse=0,lr=5e-04'), data_dir='', cache=tmp_path)
    assert sum(tuned['rows'].values()) == 64 and tuned['lr'] == 5e-4
    assert [c.setting for c in script.tuning_grid()][:2] == ['sparse=0,lr=1e-03', 'sparse=0,lr=5e-04']


def test_a_table_that_is_not_there_is_named(script):
    with pytest.raises(SystemExit, match="--tables knows 1, 12, .*; got '2'"):
        script.main(tables='1,2', dry_run=True)
