"The benchmark of all families: it runs, and its arithmetic is right"
import json

import pytest

from tpa_nb.arch import families


@pytest.fixture
def bench(benchmark): return benchmark('families')


def test_every_family_is_measured(bench):
    assert set(bench.BASE) == set(families)


def test_runs_and_writes(bench, tmp_path):
    out = tmp_path / 'families.json'
    bench.main(['--families', 'bert', 'llama', 't5', '--batch_sizes', '1', '2', '--seq_len', '16', '--repeats', '2',
                '--warmup', '1', '--tiny', '--out', str(out)])
    rows = json.loads(out.read_text())['rows']
    assert len(rows) == 3 * 3 * 2
    assert all(0 < r['floor'] < 1 and r['ratio'] > 0 for r in rows)
    both = {(r['family'], r['batch_size']): r['floor'] for r in rows if r['removed'] == 'both'}
    assert all(r['floor'] >= both[r['family'], r['batch_size']] for r in rows)


@pytest.mark.parametrize('ratios, expected', [((0.9, 0.8, 0.7), 1), ((1.2, 0.9, 0.8), 4), ((1.1, 0.9, 1.0), None),
                                              ((0.9, 1.1, 0.8), 16)])
def test_break_even(bench, ratios, expected):
    rows = [{'batch_size': b, 'ratio': r} for b, r in zip((1, 4, 16), ratios)]
    assert bench.break_even(rows) == expected
