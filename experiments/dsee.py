"""DSEE: is a sparse residual worth its parameters, and what do zeros and missing heads cost, on real data.

    python experiments/dsee.py --data_dir DATA --stage tune --jobs 2
    python experiments/dsee.py --data_dir DATA --tables 1,3 --jobs 2 --minutes 60

A MiniLM gets a low-rank update of queries and values with a sparse residual, and trains for the same number of steps in
every cell. Tables are named after those of the paper (Chen et al. 2023): 1 low rank against low rank and sparse at equal
parameters; 12 the size of the residual and where it sits; 9 which projections; 3 shares of weights that are zeroed
half-way, under masks of both forms (a share of 0 restarts half-way as well and zeroes nothing); 7 what decides; 14 in
one step or gradually; 6 heads that are removed half-way. The first command tries learning rates on a slice of the
training rows. Of larger sets, 9,000 training rows serve. Each cell leaves a file in experiments/results/dsee; what is
there is not run again.
"""
import time
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from shared import answers, at_most, cells_of, choices, kept, listed, need_data, setting, slice_of, steps_of, zeros_of

from tpa_nb.arch import Arch
from tpa_nb.dsee import DSEELinear, add_dsee, merge_dsee
from tpa_nb.lora import n_trainable
from tpa_nb.masks import gradual_ratios, mask_from_update, prune_adapted_heads, update_importance
from tpa_nb.profile import count_flops, count_params, latency_together
from tpa_nb.prune import select_heads
from tpa_nb.runner import Cell, best_setting, read_cells, run_script
from tpa_nb.tasks import load_task
from tpa_nb.train import finetune

FOLDER = Path(__file__).parent / 'results' / 'dsee'
EPOCHS = {'rte': 4, 'mrpc': 4, 'cola': 5, 'stsb': 3, 'sst2': 2, 'mnli': 2}  # of all cells; those with zeros or missing
ROWS = 9000                          # heads have them after half of the steps. Training rows at most
RATES = (1e-3, 5e-4, 2e-3)
TUNED = ('cola',)                    # the tasks that rates are chosen on, for each kind of adapter
R, SPARSE, SCALE = 8, 64, 4          # rank and card(Ω) where nothing else is asked for; alpha by rank
EQUAL = (dict(r=16, sparse=0), dict(r=8, sparse=6144))  # as many parameters in a matrix of 384 x 384
KINDS = {'low': dict(sparse=0), 'both': {}}             # whose learning rates are tuned
TABLES = {
    '1': [('adapter', way) for way in (*EQUAL, dict(sparse=0), {})],
    '12': [('adapter', dict(sparse=n)) for n in (16, 256, 1024)] + [
        ('adapter', dict(support=how)) for how in ('random', 'magnitude', 'gradient')] + [
        ('adapter', dict(**EQUAL[1], support='gradient'))],
    '9': [('adapter', dict(targets=t)) for t in ('q', 'v', 'qk', 'qkvo')],
    '3': [('zeros', dict(ratio=0))] + [
        ('zeros', dict(ratio=ratio, mask=mask)) for ratio, mask in product((20, 30, 50), ('merged', 'weight'))] + [
        ('zeros', dict(ratio=50, sparse=0))],
    '7': [('zeros', dict(ratio=50, **way)) for way in (dict(by='final'), dict(by='random'), dict(scope='matrix'),
                                                         dict(by='final', scope='matrix'))] + [
        ('zeros', dict(ratio=ratio, by='final')) for ratio in (20, 30)],
    '14': [('zeros', dict(ratio=50, steps=4))],
    '6': [('heads', dict(heads=n)) for n in (9, 6, 3)] + [('heads', dict(heads=6, by='random'))]}


def tuning_grid():
    "Cells that try learning rates for low rank alone and for low rank with a sparse residual"
    return [Cell(task, f'tune-{kind}', setting(**way, lr=lr)) for (kind, way), lr, task in
            product(KINDS.items(), RATES, TUNED)]


def grid(tables, tasks, seeds):
    "Cells of the paper's tables, those asked for first coming first"
    return [Cell(task, method, setting(**way), seed) for table, seed in product(tables, seeds)
            for (method, way), task in product(TABLES[table], tasks)]


@lru_cache
def best_rate(kind):
    "The learning rate with the best mean score on slices of the training rows"
    tried = [setting(**KINDS[kind], lr=lr) for lr in RATES]
    return choices(best_setting(read_cells(FOLDER), f'tune-{kind}', tried, TUNED))['lr']


def adapted(task, seed, asked):
    "A MiniLM with its adapter, before training"
    arch = Arch.from_pretrained('minilm', task, seed)
    r, support = asked.get('r', R), asked.get('support', 'rpca')
    return add_dsee(arch, r, asked.get('sparse', SPARSE), tuple(asked.get('targets', 'qv')), support,
                    lora_alpha=SCALE * r, train=('norm', 'head', 'pooler'), seed=seed,
                    calibration=task.calibration(min(512, len(task.train)), seed) if support == 'gradient' else None)


def half_way(task, seed, asked, lr, epochs, cache):
    "The model when heads or weights go; cells with the same adapter share it"
    def make():
        return finetune(adapted(task, seed, asked), task, epochs, lr, seed=seed, mixed_precision='bf16')
    key = f"{task.name}-{seed}-{lr:g}-{epochs:g}-{asked.get('r', R)}-{asked.get('sparse', SPARSE)}"
    return kept(Path(cache) / key, make)


@torch.no_grad()
def sparse_norm(arch):
    "Norm of the residual beside that of the whole update, the mean over the adapted matrices"
    layers = [m for m in arch.base.modules() if isinstance(m, DSEELinear)]
    return sum((m.lora_S['default'].norm() / m.update().norm()).item() if 'default' in m.lora_S else 0.
               for m in layers) / len(layers)


def tune_again(arch, task, asked, lr, epochs, seed):
    "Zero weights at once or gradually, or remove heads, and train on"
    train = partial(finetune, arch, task, lr=lr, mixed_precision='bf16')
    if 'heads' in asked:
        scores = update_importance(arch)
        if asked.get('by') == 'random':
            scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
        prune_adapted_heads(arch, select_heads(scores, keep=asked['heads'], scope='layer'))
        train(epochs=epochs, seed=seed + 1000)
        return
    ratios = gradual_ratios(asked['ratio'] / 100, asked.get('steps', 1))
    for i, ratio in enumerate(ratios):
        mask_from_update(arch, ratio, criterion=asked.get('by', 'update'), scope=asked.get('scope', 'global'),
                         mask=asked.get('mask', 'merged'), seed=seed)
        train(epochs=epochs / len(ratios), seed=seed + 1000 + i)


def run(cell, data_dir, cache):
    "Carry out one cell"
    torch.manual_seed(cell.seed)
    task, asked = at_most(load_task(cell.task, data_dir=data_dir, partial=True), ROWS), choices(cell.setting)
    tuning = cell.method.startswith('tune-')
    task, cache = slice_of(task) if tuning else task, Path(cache) / ('part' if tuning else 'whole')
    lr = asked.get('lr') or best_rate('both' if asked.get('sparse', SPARSE) else 'low')
    epochs = EPOCHS[task.name.removesuffix('_partial')]
    if cell.method in ('zeros', 'heads'):
        arch = half_way(task, cell.seed, asked, lr, epochs / 2, cache)
        trainable = n_trainable(arch)
        tune_again(arch, task, asked, lr, epochs / 2, cell.seed)
    else:
        arch = adapted(task, cell.seed, asked)
        trainable = n_trainable(arch)
        finetune(arch, task, epochs, lr, seed=cell.seed, mixed_precision='bf16')
    found = {**answers(arch, task), 'trainable': trainable, 'lr': lr, 'sparse_norm': sparse_norm(arch)}
    merge_dsee(arch, densify=asked.get('mask') == 'weight')
    if cell.method == 'heads':
        dense = Arch.from_pretrained('minilm', task, cell.seed)
        times = latency_together({'dense': dense, 'this': arch}, 32, 64, repeats=5, warmup=2, clock=time.process_time)
        found |= {'latency': {n: t.median for n, t in times.items()}, 'dense_flops': count_flops(dense)}
    return {**found, 'params': count_params(arch)['params'], 'zeros': zeros_of(arch), 'flops': count_flops(arch),
            'steps': steps_of(arch), 'partial': task.partial, 'heads': [a.n_heads for a in arch.attns],
            'rows': {'train': len(task.train), 'validation': len(task.validation)}}


@call_parse
@delegates(run_script, but='prepare')
def main(
    data_dir: str = '',                  # Folder with <task>/train.parquet and validation.parquet
    tables: str = '1,3,6,12,7,14,9',     # The paper's tables, with commas
    tasks: str = 'cola,mrpc,rte',        # Tasks, with commas
    seeds: int = 2,                      # Seeds 0, 1, ...
    stage: str = 'grid',                 # 'tune' (learning rates) or 'grid' (the tables)
    **kwargs,
):
    "Run the cells that are missing"
    need_data('dsee', data_dir, kwargs)
    asked = listed('dsee', 'tables', tables, TABLES), listed('dsee', 'tasks', tasks, EPOCHS), range(seeds)
    cells = cells_of('dsee', stage, {'tune': tuning_grid, 'grid': lambda: grid(*asked)})
    run_script(cells, partial(run, data_dir=data_dir), FOLDER, **kwargs)
