"""Fine-tuning in two processes on a CPU gives what one process gives: gradients, weights, scores, files.

Without dropout, with the same rows in the same steps. `distributed_worker.py` trains; here its results are compared.
"""
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from distributed_worker import BATCH, uneven
from safetensors.torch import load_file

WORKER = Path(__file__).with_name('distributed_worker.py')
SECONDS = 400
TORCHRUN = ['-m', 'torch.distributed.run', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0', '--local-addr',
            'localhost', '--nproc-per-node', '2']
ALONE = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
TOKENS = ('causal_lm', 'seq_2_seq_lm', 'token_cls')
HALVES = ('causal_lm in halves', 'token_cls in halves')
SAME = ('full', 'lora', 'accumulated', 'checkpointing', 'decoder', 'number')


def start(folder, processes, cases):
    "The worker, alone or under torchrun, on the CPU"
    env = {k: v for k, v in os.environ.items() if k not in ALONE}
    env |= {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive', 'HF_HUB_OFFLINE': '1', 'CUDA_VISIBLE_DEVICES': '',
            'TOKENIZERS_PARALLELISM': 'false', 'DS_ACCELERATOR': 'cpu', 'PYTHONFAULTHANDLER': '1'}
    launcher = TORCHRUN if processes > 1 else []
    with open(folder/f'log-{processes}', 'w') as log:
        return subprocess.Popen([sys.executable, *launcher, WORKER, folder, *cases], env=env, stdin=subprocess.DEVNULL,
                                stdout=log, stderr=subprocess.STDOUT)


def complaint(job, seconds):
    "Why `job` failed; None if it did not"
    try:
        code = job.wait(seconds)
    except subprocess.TimeoutExpired:
        return f'was not done after {SECONDS} s and was stopped'
    return f'returned {code}' if code else None


def run(folder, **cases):
    "Run cases in one process and in two, at the same time; fail with what the processes printed"
    jobs = {n: start(folder, n, cases[key]) for n, key in ((1, 'one'), (2, 'two'))}
    until = time.monotonic() + SECONDS
    try:
        for n, job in jobs.items():
            if wrong := complaint(job, max(1, until - time.monotonic())):
                printed = (folder/f'log-{n}').read_text()[-8000:]
                pytest.fail(f'the worker ({n} processes) {wrong}; it printed:\n{printed}', pytrace=False)
    finally:
        for job in jobs.values():
            job.terminate()  # torchrun ends its workers then
            job.wait(60)
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    both = [*SAME, *TOKENS, *HALVES, 'scores']
    return run(tmp_path_factory.mktemp('trained'), one=both, two=[*both, 'grouped', 'stopped', 'written'])


@pytest.fixture(scope='module')
def cut(tmp_path_factory):
    pytest.importorskip('deepspeed')
    return run(tmp_path_factory.mktemp('cut'), one=['full', 'lora'], two=['zero 2', 'zero 3'])


def read(folder, case, processes, rank=0):
    "What a process wrote: tensors by name, and the rest"
    stem = f'{folder}/{case}-{processes}-{rank}'
    return load_file(f'{stem}.safetensors'), json.loads(Path(f'{stem}.json').read_text())


def part(tensors, prefix):
    return {n: t for n, t in tensors.items() if n.startswith(f'{prefix}/')}


def distance(found, expected):
    "Largest difference, as a share of the largest value"
    assert found.keys() == expected.keys() and expected
    gap = max((found[n] - expected[n]).abs().max() for n in expected)
    return (gap / max(t.abs().max() for t in expected.values())).item()


@pytest.mark.parametrize('case', SAME)
def test_two_processes_train_as_one(trained, case):
    (one, said), (first, said0), (second, said1) = (read(trained, case, n, r) for n, r in ((1, 0), (2, 0), (2, 1)))
    steps = [a + b for a, b in zip(said0['rows'], said1['rows'], strict=True)]
    assert len(said['rows'][0]) == BATCH // (2 if case == 'accumulated' else 1) and steps == said['rows'], 'same order'
    assert distance(part(first, 'gradients'), part(one, 'gradients')) < 1e-5
    assert distance(part(first, 'weights'), part(one, 'weights')) < 1e-5
    assert all(torch.equal(first[n], second[n]) for n in first), 'both processes hold the same'
    assert said0['history'] == said1['history']
    for a, b in zip(said['history']['log'], said0['history']['log'], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert {k: said['history'][k] for k in ('batch_size', 'steps')} == {'batch_size': BATCH, 'steps': 10}
    assert said['validation'] == pytest.approx(said0['validation'], rel=1e-4)


@pytest.mark.parametrize('case', [*TOKENS, *HALVES])
def test_every_label_counts_the_same(trained, case):
    "Whichever process or batch its row is in, though rows differ in their number of labels"
    (one, said), (two, said0) = read(trained, case.removesuffix(' in halves'), 1), read(trained, case, 2)
    assert len({len(row) for row in said['rows'][0]}) > 4 and len(said0['rows'][0]) < BATCH
    assert distance(part(two, 'gradients'), part(one, 'gradients')) < 1e-5


def test_accumulated_batches_have_the_gradient_of_one(trained):
    for whole, halves in (('full', 'accumulated'), ('token_cls', 'token_cls in halves')):
        (expected, _), (found, _) = read(trained, whole, 1), read(trained, halves, 1)
        assert distance(part(found, 'gradients'), part(expected, 'gradients')) < 1e-5


def test_a_doubled_gradient_would_be_seen(trained):
    tensors, _ = read(trained, 'full', 2)
    gradients = part(tensors, 'gradients')
    assert distance({n: 2 * g for n, g in gradients.items()}, gradients) == 1


def test_processes_agree_where_rows_are_grouped_by_length(trained):
    "Also in the second epoch, when dropout has moved their random states apart"
    (_, said0), (_, said1) = (read(trained, 'grouped', 2, r) for r in (0, 1))
    steps = [a + b for a, b in zip(said0['rows'], said1['rows'], strict=True)]
    half = (n := uneven().train.num_rows) // BATCH
    epochs = [Counter(tuple(row) for step in steps[i:i + half] for row in step) for i in (0, half)]
    assert len(steps) == 2 * half and set(epochs[0].values()) == {1} and len(epochs[0]) == n, 'every row once'
    assert epochs[0] == epochs[1] and steps[:half] != steps[half:], 'in another order'
    rows = [row for step in steps for row in step]
    apart = [sorted(rows)[i:i + BATCH] for i in range(0, len(rows), BATCH)]
    assert filled(apart) < 0.7 and filled(steps) > 0.8, 'rows of like length are together, over both processes'


def filled(steps):
    "Share of real tokens where each step is padded to its longest row"
    return sum(len(row) for step in steps for row in step) / sum(max(map(len, step)) * len(step) for step in steps)


def test_early_stopping_returns_to_the_best_epoch_in_both_processes(trained):
    (first, said0), (second, said1) = (read(trained, 'stopped', 2, r) for r in (0, 1))
    seen = [row['eval_accuracy'] for row in said0['history']['log'] if 'eval_accuracy' in row]
    assert len(seen) < 8 and said0['best'] == said1['best'] == pytest.approx(max(seen))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_both_processes_get_all_logits_and_scores(trained):
    one, said = read(trained, 'scores', 1)
    for rank in (0, 1):
        tensors, said2 = read(trained, 'scores', 2, rank)
        for n in (5, 30):
            assert tensors[f'logits of {n}'].shape == (n, 2)
            torch.testing.assert_close(tensors[f'logits of {n}'], one[f'logits of {n}'], rtol=0, atol=1e-5)
            assert said2[f'scores of {n}'] == pytest.approx(said[f'scores of {n}'], abs=1e-5)


def test_the_first_process_writes(trained):
    (first, said0), (second, said1) = (read(trained, 'written', 2, r) for r in (0, 1))
    assert (said0['bar'], said1['bar']) == (True, False)
    assert said0['same'] and said1['same'] and all(torch.equal(first[n], second[n]) for n in first)
    assert [p.name for p in (trained/'written-2'/'checkpoints').iterdir()] == ['checkpoint-10']
    assert sorted(p.name for p in (trained/'written-2').iterdir()) == ['checkpoints', 'model']


@pytest.mark.parametrize(('stage', 'case'), [(2, 'full'), (3, 'lora')])
def test_zero_trains_as_one_process(cut, stage, case):
    "DeepSpeed ZeRO with the documented configuration, and a plain model afterwards"
    (one, said), (first, said0), (second, said1) = (
        read(cut, c, n, r) for c, n, r in ((case, 1, 0), (f'zero {stage}', 2, 0), (f'zero {stage}', 2, 1)))
    assert distance(part(first, 'weights'), part(one, 'weights')) < 1e-5
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert [row['loss'] for row in said0['history']['log']] == pytest.approx(
        [row['loss'] for row in said['history']['log']], rel=1e-4)
    assert said0['plain'] and said1['plain']
    for key in ('validation', 'merged'):
        assert said0[key] == said1[key] == pytest.approx(said['validation'], rel=1e-4)
    assert said0['again'] == said1['again']
