"The benchmark of experts: its numbers are those of the work that was done, and what is stored is whole"
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tpa_nb import bench
from tpa_nb.bench import bench_experts, break_even, fit_power, plan_work, run_bench
from tpa_nb.experts import plans
from tpa_nb.hardware import Machine

ROOT = Path(__file__).resolve().parents[1]
STORED = json.loads((ROOT / 'benchmarks/results/bench_cpu.json').read_text())
RIVALS = {'plain loop', 'eager', 'batched_mm', 'grouped_mm'}


@pytest.fixture
def quick(monkeypatch):
    "No second spent on the machine's peak, and sizes of T5 that take none"
    machine = Machine('made', 'cpu', 'float32', 1, 1e11, 1e10)
    monkeypatch.setattr(bench, 'machine_peak', lambda *args: machine)
    monkeypatch.setattr(bench, 'T5_SIZES', {'small': (16, 32, 1), 'base': (16, 64, 1), 'large': (16, 128, 1)})


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
def test_every_rival_gives_the_masked_reference(gated, bias, dtype):
    row, = bench_experts(64, 128, 8, 0.375, 24, gated, bias, dtype, repeats=1, warmup=0, give_up=1e9)
    missing = RIVALS - set(row['ratios'])
    assert missing <= {'grouped_mm'}, row['left_out']
    assert not missing or dtype == 'float64', row['left_out']  # torch has no grouped product for it
    assert set(row['errors']) == set(row['ratios'])
    assert max(row['errors'].values()) < {'float32': 1e-6, 'bfloat16': 1e-2, 'float64': 1e-14}[dtype]


@pytest.mark.parametrize('part', ['up', 'down', 'bias'])
def test_a_rival_with_other_weights_is_left_out(part, monkeypatch):
    real = bench._as_interface

    def spoiled(experts, k):
        other = bench._layer(64, 128, 8, False, True, torch.float32, 'cpu')
        getattr(other, part).data[..., 0] += 1
        return real(other, k)
    monkeypatch.setattr(bench, '_as_interface', spoiled)
    row, = bench_experts(64, 128, 8, 0.375, 24, repeats=1, warmup=0, give_up=1e9)
    for name in ('eager', 'batched_mm', 'grouped_mm'):
        assert 'its output is off by' in row['left_out'][name]
    assert 'plain loop' in row['ratios']


def test_the_bias_is_added_once_and_not_per_expert():
    layer = bench._layer(64, 128, 8, False, True, torch.float32, 'cpu')
    layer.down.data.zero_()
    case = bench._case(layer, 6, 3, torch.Generator().manual_seed(0))
    for name in ('eager', 'batched_mm', 'grouped_mm'):
        torch.testing.assert_close(bench._as_interface(layer, 3)(case, name), layer.bias.expand(6, -1))


def test_a_plan_that_sleeps_reads_as_slow(monkeypatch):
    import time
    masked = plans['masked']

    def sleepy(*args):
        time.sleep(0.01)
        return masked.run(*args)
    monkeypatch.setitem(plans, 'loop', type(masked)(sleepy, lambda *args: ''))
    row, = bench_experts(64, 128, 8, 0.25, 256, names=['masked', 'loop'], repeats=3, give_up=1e9)
    assert row['ms']['loop'] > 10 and row['ms']['dense'] < row['ms']['loop']
    assert row['ratios']['loop'] > row['ratios']['masked']


def test_inputs_differ_from_turn_to_turn_and_runs_repeat(monkeypatch):
    seen, real = [], bench._case

    def watched(*args):
        seen.append(real(*args))
        return seen[-1]
    monkeypatch.setattr(bench, '_case', watched)
    errors = [bench_experts(64, 128, 8, 0.25, 200, names=['loop'], repeats=2, warmup=1)[0]['errors'] for _ in range(2)]
    assert errors[0] == errors[1]
    half = len(seen) // 2
    assert all(torch.equal(a.x, b.x) for a, b in zip(seen[:half], seen[half:]))
    assert len({case.x.sum().item() for case in seen[:half]}) == half == 4  # one is looked at, three are timed


def test_what_a_user_gets_is_timed_with_the_choice_of_a_plan(monkeypatch):
    import tpa_nb.experts
    asked = []
    monkeypatch.setattr(tpa_nb.experts, 'choose_plan', lambda *args: asked.append(1) or 'loop')
    bench_experts(64, 128, 8, 0.25, 200, names=['auto'], repeats=3, warmup=0)
    assert len(asked) == 2 + 3  # looked at, timed once to see whether it is far too slow, and three turns


def test_a_share_of_all_is_the_dense_layer():
    for plan in ('grouped', 'loop', 'compiled'):
        work, dense = (plan_work(p, 32, 8, 8, 16, 64) for p in (plan, 'dense'))
        assert (work.flops, work.weights, work.ends) == (dense.flops, dense.weights, dense.ends)


@pytest.mark.parametrize('dtype, size', [('float32', 4), ('bfloat16', 2)])
def test_weights_of_one_token_are_those_of_its_experts(dtype, size):
    work = plan_work('token', 1, 96, 19, 32, 768, dtype=dtype)
    assert math.isclose(work.weights, size * 2 * 19 * 32 * 768)
    assert math.isclose(plan_work('token', 1, 96, 19, 32, 768, True, dtype).weights, 1.5 * work.weights)


def test_run_writes_a_folder_and_restores_the_threads(quick, tmp_path, capsys):
    before = torch.get_num_threads()
    found = run_bench(tmp_path / 'a' / 'b', 32, 64, '4,8', '0.25,0.5', '1,2x8', gated=True, no_bias=True, repeats=2,
                      clock='cpu', threads=1, device='cpu', sizes='small,base,large', size_neurons=16)
    assert torch.get_num_threads() == before
    stored = json.loads((tmp_path / 'a' / 'b' / 'bench.json').read_text(), parse_constant=pytest.fail)  # no NaN in it
    assert stored == found and str(tmp_path) not in json.dumps(stored)
    assert {p.name for p in (tmp_path / 'a' / 'b').iterdir()} == {'bench.json', 'break_even.png', 'rivals_float32.png',
                                                                 'sizes.png'}
    out = capsys.readouterr().out
    assert 'From how many tokens on experts pay, run by auto' in out and 'size **' in out and 'bench.json' in out
    assert found['command'].startswith('tpa_bench --d_model 32 --d_ff 64') and '--gated --no_bias' in found['command']
    assert all(r['gated'] and not r['bias'] for r in found['rows'])


def test_break_even_of_what_was_asked_for(quick, tmp_path):
    said = []
    found = run_bench(tmp_path, 32, 64, '8', tokens='8', names='token,loop', repeats=1, device='cpu', say=said.append)
    assert found['rows'][0]['left_out'] == {'token': 'it is for 4 tokens at most'}
    assert any('run by loop' in line for line in said)


def test_the_plan_for_gpus_takes_part():
    row, = bench_experts(32, 64, 8, 0.25, 8, repeats=1, warmup=0)
    assert 'triton' in {*row['ratios'], *row['left_out']}


def test_a_failure_leaves_no_half_written_file(quick, tmp_path, monkeypatch):
    real, written = bench._write_json, []

    def full(path, found):
        if written:
            raise OSError('No space left on device')
        written.append(real(path, found))
    monkeypatch.setattr(bench, '_write_json', full)
    with pytest.raises(OSError, match='No space'):
        run_bench(tmp_path, 32, 64, '4,8', tokens='4', repeats=1, device='cpu', say=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ['bench.json']
    assert len(json.loads((tmp_path / 'bench.json').read_text())['rows']) == 1


def test_a_device_that_is_not_there_is_a_users_mistake():
    if torch.cuda.is_available():
        pytest.skip('there is one')
    with pytest.raises(ValueError, match="`device` 'cuda' is not there"):
        bench_experts(device='cuda')


def test_stored_figures_are_whole():
    settings = {(r['dtype'], r['n_experts'], r['k'], r['tokens']) for r in STORED['rows']}
    assert len(settings) == len(STORED['rows']) == 32
    for row in STORED['rows'] + STORED['sizes']:
        assert RIVALS <= set(row['ratios']) | set(row['left_out'])
        assert all(error < (1e-5 if row['dtype'] == 'float32' else 3e-2) for error in row['errors'].values())
        for name, reason in row['left_out'].items():
            assert any(said in reason for said in ('4 tokens at most', 'times the dense layer', 'would copy', 'could copy',
                                                   'for GPUs, not for cpu')), (name, reason)
    assert break_even(STORED['rows']).to_dict('records') == STORED['break_even']
    dense = fit_power([r['params'] for r in STORED['sizes']], [r['ms']['dense'] for r in STORED['sizes']])
    assert vars(dense) == pytest.approx(STORED['fits']['ms']['dense'])
    assert STORED['provenance']['threads'] == 1 and STORED['clock'] == 'cpu'


def test_command_answers_without_torch():
    done = subprocess.run([Path(sys.executable).with_name('tpa_bench'), '--help'], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPROFILEIMPORTTIME': '1'})
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and 'tpa_nb.cli' in imported and 'torch' not in imported
    assert '--n_experts' in done.stdout and '--compile' in done.stdout


def test_the_command_has_the_options_of_the_function():
    from tpa_nb.cli import tpa_bench
    ours, theirs = (inspect.signature(f).parameters for f in (tpa_bench, run_bench))
    assert set(ours) == set(theirs) - {'say'}
    flags = {name for name, p in theirs.items() if p.default is False}  # fastcore keeps those of a command elsewhere
    assert {n: ours[n].default for n in set(ours) - flags} == {n: theirs[n].default for n in set(ours) - flags}
