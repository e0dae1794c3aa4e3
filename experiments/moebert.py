"""MoEBERT: experts that share their most important neurons against a dense student as large as what runs, on real data.

    python experiments/moebert.py --data_dir DATA --stage tune --jobs 2
    python experiments/moebert.py --data_dir DATA --jobs 2 --minutes 60
    python experiments/moebert.py --data_dir DATA --stage start --seeds 1
    python experiments/moebert.py --data_dir DATA --stage better --jobs 2
    python experiments/moebert.py --data_dir DATA --stage ablate --jobs 2 --minutes 60

A MiniLM (six layers of 1,536 neurons) is fine-tuned; it is the teacher of every student, and every student is made from
it and trained for the same number of steps: 'moebert' is dealt out into experts, 'dense-student' keeps the neurons that
matter most, as many as run in an expert, and 'dense-more' is the teacher itself, trained on. 'moefied' is dealt out as
MoEfication does it: small experts of neurons that fire together, as many of them run as make up the size, and routers
are fitted to what they add. With compensated=1, neurons that run take over what the others add before training begins,
in a dense student too; this is always so in 'moefied'. The first command tries learning rates and weights on a slice of
the training rows, the second compares a quarter, half and an eighth of the neurons, the third times the students and
scores them before any training, the fourth asks what a better start is worth, the fifth leaves out one thing after the
other: the teacher, importance, shared neurons, hash routing, completeness. Of larger sets, 9,000 training rows serve.
Each cell leaves a file in experiments/results/moebert; what is there is not run again.
"""
import time
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from shared import answers, at_most, cells_of, choices, kept, listed, need_data, setting, slice_of, steps_of

from tpa_nb.arch import Arch
from tpa_nb.compensate import compensate
from tpa_nb.compensate_routing import compensate_routing
from tpa_nb.distill import distill
from tpa_nb.importance import neuron_importance
from tpa_nb.moe import moefy
from tpa_nb.moebert import BalanceLoss, active_params, moebert, token_counts
from tpa_nb.profile import count_flops, latency_together
from tpa_nb.prune import prune_neurons, select_neurons
from tpa_nb.router import fit_routers
from tpa_nb.runner import Cell, best_setting, read_cells, run_script
from tpa_nb.tasks import load_task
from tpa_nb.train import finetune

FOLDER = Path(__file__).parent / 'results' / 'moebert'
EPOCHS = {'rte': 4, 'mrpc': 4, 'cola': 5, 'stsb': 3, 'sst2': 2, 'mnli': 2}  # of the teacher
STUDENT_EPOCHS = {'rte': 3, 'mrpc': 3, 'cola': 3, 'stsb': 2, 'sst2': 2, 'mnli': 2}  # of every student
ROWS = 9000                         # training rows at most
TEACHER_LR = 1e-4
SIZES = {384: 256, 768: 512, 192: 128}  # neurons that run in a layer, and those that all experts share
STUDENTS = ('moebert', 'dense-student', 'moefied')
MOEFIED = dict(experts=48, split='kmeans')  # experts of 32 neurons, as on the page of MoEfication
BETTER = (('dense-student', dict(compensated=1)), ('moebert', dict(compensated=1)))
CALIBRATION = 2048  # training rows that routers and least squares go by
RATES = (1e-4, 3e-4)
WEIGHTS = {'moebert': (1, 5, 0), 'dense-student': (1, 5), 'moefied': (1,), 'dense-more': (0,)}  # 0: no teacher
TUNED = ('sst2', 'cola')  # the tasks that are tuned on; the best on their mean is used for all
ABLATIONS = (dict(teacher=0), dict(criterion='random'), dict(criterion='inverse'), dict(router='token'),
             dict(router='sentence'), dict(router='balanced'), dict(shared=0), dict(shared=128), dict(shared=320),
             dict(experts=4))


def tuning_grid():
    "Cells that try learning rates and weights, for every kind of student; the rates with half of the neurons too"
    return [Cell(task, f'tune-{way}', setting(lr=lr, weight=weight))
            for way, weights in WEIGHTS.items() for weight, lr, task in product(weights, RATES, TUNED)] + [
        Cell(task, f'tune-{way}', setting(lr=lr, weight=1, size=768))
        for way, lr, task in product(STUDENTS, RATES, TUNED)]


def grid(tasks, seeds):
    "Cells of the comparison, what decides first"
    found = []
    for seed, size, task in product(seeds, SIZES, tasks):
        found += [Cell(task, way, setting(size=size), seed) for way in STUDENTS]
        found += [Cell(task, 'teacher', seed=seed), Cell(task, 'dense-more', seed=seed)]
    return list(dict.fromkeys(found))


def start_grid(tasks, seeds):
    "Cells of the students before any training: what they cost, and what they know"
    ways = [*((way, {}) for way in STUDENTS), *BETTER]
    return [Cell(task, f'start-{way}', setting(size=size, **change), seed)
            for seed, task, size, (way, change) in product(seeds, tasks, SIZES, ways)]


def better_grid(tasks, seeds):
    "Cells of students that begin with more, at a quarter of the neurons"
    return [Cell(task, way, setting(size=384, **change), seed)
            for seed, task, (way, change) in product(seeds, tasks, BETTER)]


def ablation_grid(tasks, seeds):
    "Cells that differ from 'moebert' at a quarter of the neurons in one thing"
    return [Cell(task, 'moebert', setting(size=384, **change), seed)
            for seed, change, task in product(seeds, ABLATIONS, tasks)]


@lru_cache
def best(way, taught=True):
    "Learning rate and weight with the best mean score on slices of the training rows, with a teacher or without"
    weights = [w for w in WEIGHTS[way] if bool(w) == taught]
    tried = [setting(lr=lr, weight=weight) for lr, weight in product(RATES, weights)]
    found = choices(best_setting(read_cells(FOLDER), f'tune-{way}', tried, TUNED))
    return found['lr'], found['weight']


def epochs(task, found):
    return found[task.name.removesuffix('_partial')]


def taught(task, seed, cache):
    "The teacher; cells of one task and seed share it"
    def make():
        return finetune(Arch.from_pretrained('minilm', task, seed), task, epochs(task, EPOCHS), TEACHER_LR, seed=seed,
                        mixed_precision='bf16')
    return kept(Path(cache) / f'teacher-{task.name}-{seed}', make)


def scores_of(arch, task, seed, criterion):
    "Scores of the neurons, by importance on training rows, the other way round, or by chance"
    imp = neuron_importance(arch, task.calibration(min(512, len(task.train)), seed))
    if criterion == 'random':
        draw = torch.Generator().manual_seed(seed)
        return [torch.rand(scores.shape, generator=draw) for scores in imp]
    return [-scores for scores in imp] if criterion == 'inverse' else imp


def student_of(arch, way, task, seed, asked):
    "The student before it has learnt anything"
    if way == 'dense-more':
        return arch
    size, few = asked.get('size', next(iter(SIZES))), task.calibration(min(CALIBRATION, len(task.train)), seed)
    if way == 'moefied':
        E, dense = MOEFIED['experts'], arch.clone()
        moefy(arch, E, E * size // arch.ffns[0].d_ff, few, split=MOEFIED['split'], router=None, seed=seed)
        fit_routers(arch, few, seed=seed)
        return compensate_routing(arch, dense, few)
    imp = scores_of(arch, task, seed, asked.get('criterion', 'importance'))
    if way == 'dense-student':
        gone = select_neurons(imp, keep=[size] * len(imp))
        if asked.get('compensated'):
            compensate(arch, few, neurons=gone)
        return prune_neurons(arch, gone)
    dense, router = arch.clone(), asked.get('router', 'hash')
    counts = token_counts(arch, task.examples('train')) if router == 'balanced' else None
    moebert(arch, imp, size, asked.get('shared', SIZES[size]), asked.get('experts'),
            'hash' if router == 'balanced' else router, counts, seed=seed)
    return compensate_routing(arch, dense, few) if asked.get('compensated') else arch


def train(student, teacher, task, seed, lr, weight, router):
    "Distil, or fine-tune where there is no weight; learned routers are kept even"
    settings = dict(lr=lr, seed=seed + 1000, mixed_precision='bf16',
                    added=[BalanceLoss(student)] if router in ('token', 'sentence') else [])
    n = epochs(task, STUDENT_EPOCHS)
    if weight:
        return distill(student, teacher, task, n, weight, **settings)
    return finetune(student, task, n, **settings)


def times(teacher, arch):
    "Seconds of CPU time on 32 x 64 tokens, of the teacher and beside it, in turns"
    found = latency_together({'dense': teacher, 'this': arch}, 32, 64, repeats=5, warmup=2, clock=time.process_time)
    return {name: t.median for name, t in found.items()}


def run(cell, data_dir, cache):
    "Carry out one cell"
    torch.manual_seed(cell.seed)
    task, asked = at_most(load_task(cell.task, data_dir=data_dir, partial=True), ROWS), choices(cell.setting)
    tuning, way = cell.method.startswith('tune-'), cell.method.removeprefix('tune-').removeprefix('start-')
    task, cache = slice_of(task) if tuning else task, Path(cache) / ('part' if tuning else 'whole')
    teacher = taught(task, cell.seed, cache)
    arch, lr, weight = teacher, TEACHER_LR, 0
    if way != 'teacher':
        arch = student_of(teacher.clone(), way, task, cell.seed, asked)
        is_taught = way != 'dense-more' and bool(asked.get('teacher', 1))
        if not cell.method.startswith('start-'):
            lr, weight = (asked['lr'], asked['weight']) if tuning else best(way, is_taught)
            train(arch, teacher, task, cell.seed, lr, weight, asked.get('router'))
    return {**answers(arch, task), 'lr': lr, 'weight': weight, **active_params(arch), 'flops': count_flops(arch),
            'latency': times(teacher, arch) if cell.method.startswith('start-') else None,
            'steps': steps_of(arch), 'partial': task.partial,
            'rows': {'train': len(task.train), 'validation': len(task.validation)},
            'made': [h for h in arch.history if h['verb'] in ('moebert', 'moefy')],
            'compensated': [h for h in arch.history if h['verb'].startswith('compensate')]}


@call_parse
@delegates(run_script, but='prepare')
def main(
    data_dir: str = '',                  # Folder with <task>/train.parquet and validation.parquet
    tasks: str = 'sst2,cola,mrpc',        # Tasks, with commas
    seeds: int = 2,                      # Seeds 0, 1, ...
    stage: str = 'grid',                 # 'tune', 'grid', 'start', 'better' or 'ablate': see above
    **kwargs,
):
    "Run the cells that are missing"
    need_data('moebert', data_dir, kwargs)
    asked = listed('moebert', 'tasks', tasks, EPOCHS), range(seeds)
    cells = cells_of('moebert', stage, {
        'tune': tuning_grid, 'grid': lambda: grid(*asked), 'start': lambda: start_grid(*asked),
        'better': lambda: better_grid(*asked), 'ablate': lambda: ablation_grid(*asked)})
    run_script(cells, partial(run, data_dir=data_dir), FOLDER, **kwargs)
