"The benchmark of all families runs and is right; the commands for a GPU are ones that exist"
import inspect
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tpa_nb.arch import families
from tpa_nb.bench import run_bench

ON_GPU = Path(__file__).parent.parent / 'benchmarks' / 'on_gpu.sh'


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


def test_commands_for_a_gpu_have_the_options_that_they_give(benchmark):
    script = ON_GPU.read_text().replace('\\\n', '')
    lines = [shlex.split(line.removeprefix('run ')) for line in script.splitlines()
             if line.startswith('run ') and ' -c ' not in line]
    scripts = [words for words in lines if words[0] == 'python']
    assert len(scripts) >= 4 and len({words[-1] for words in scripts}) == len(scripts), 'each has a file of its own'
    for _, path, *argv in scripts:
        assert benchmark(Path(path).stem).parse(argv).device == 'cuda'
    known = {f'--{name}' for name in inspect.signature(run_bench).parameters}
    for words in (words for words in lines if words[0] == 'tpa_bench'):
        assert {w for w in words if w.startswith('--')} <= known


def test_what_follows_on_a_gpu_uses_the_table_that_was_made():
    script = ON_GPU.read_text()
    assert 'export TPA_CACHE' in script and 'path=' not in script.partition('calibrate_plans(')[2].partition(')')[0]


def test_a_whole_t5_is_timed_with_its_routers(benchmark, tmp_path, monkeypatch):
    bench, out = benchmark('whole_t5'), tmp_path / 't5.json'
    monkeypatch.setitem(bench.SIZES, 'small', dict(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=64))
    bench.main(['--batch', '2x8', '--expert_size', '8', '--repeats', '2', '--out', str(out)])
    row, = json.loads(out.read_text())['rows']
    assert 0 < row['floor'] and row['ratio'] > 0 and row['paper'] == 1.348 and (row['batch'], row['length']) == (2, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU, which it would use for minutes')
def test_without_a_gpu_the_command_says_so():
    done = subprocess.run(['bash', ON_GPU], capture_output=True, text=True)
    assert done.returncode == 1 and 'torch sees no GPU' in done.stderr


def test_the_kernels_for_gpus_compile_without_one(tmp_path):
    pytest.importorskip('triton')
    out = tmp_path / 'kernels.json'
    command = [sys.executable, ON_GPU.parent / 'gpu_kernels.py', '--chips', 'H100', '--dtypes', 'float32', 'bfloat16',
               '--tokens', '64', '--sizes', '128', '--out', out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    rows = json.loads(out.read_text())['rows']
    assert len(rows) == 6 and all(r['fits'] and not r['spilled'] and r['products'] == 'mma' for r in rows)
