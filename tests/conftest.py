"Options, the scripts of experiments on a toy, and the closing count of the test run"
import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
CORES = os.cpu_count() or 1
THREADS = max(1, CORES // int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1)))
os.environ.setdefault('OMP_NUM_THREADS', str(min(THREADS, 4)))  # before torch is imported: a worker's share of the cores


def pytest_xdist_auto_num_workers(config):
    "A test process for each core, four at most: each of them imports torch"
    return min(CORES, 4)


def opened(folder, name, monkeypatch):
    "The script `name` of `folder` as a module of its own; it imports from its folder, as when it is run"
    with monkeypatch.context() as m:
        m.syspath_prepend(str(ROOT / folder))
        spec = importlib.util.spec_from_file_location(f'{folder}_{name}', ROOT / folder / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch):
    "A function that opens a benchmark by name"
    return lambda name: opened('benchmarks', name, monkeypatch)


@pytest.fixture
def experiment(monkeypatch):
    "A function that opens a script by name, with a tiny model, a toy task and `changes` in place of the real ones"
    from tpa_nb.families import tiny_arch
    from tpa_nb.tasks import toy_pairs

    def changed(name, **changes):
        module = opened('experiments', name, monkeypatch)
        task = replace(toy_pairs(n_train=64, n_validation=24), name='mrpc').with_max_length(24)
        tiny = SimpleNamespace(from_pretrained=lambda name, task, seed: tiny_arch('bert', seed=seed))
        toys = {'load_task': lambda *args, **kwargs: task, 'Arch': tiny}
        for attribute, value in {**{n: v for n, v in toys.items() if hasattr(module, n)}, **changes}.items():
            monkeypatch.setattr(module, attribute, value)
        return module
    return changed


@pytest.fixture
def prune_lora(experiment):
    "The grid of Prune-LoRA on a toy"
    return experiment('prune_lora', best_rate=lambda method: 1e-3, EPOCHS={'mrpc': 4})


def pytest_addoption(parser):
    parser.addoption('--nb_flags', default='', help="flagged cells to run too, e.g. 'cuda slow online'")


def pytest_terminal_summary(terminalreporter):
    "Say how many notebooks ran and how many assertions they executed, just before pytest's own last line"
    reports = terminalreporter.stats.get('passed', [])
    counts = [value for r in reports for name, value in r.user_properties if name == 'nb_assertions']
    if not counts: return
    sites, executions = (sum(o) for o in zip(*counts))
    terminalreporter.write_line(f'{len(counts)} notebooks executed {sites} assertions ({executions} counting loops)')
