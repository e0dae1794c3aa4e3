"""What stays takes over what heads and neurons that go did: pruning without training, three ways, on real data.

    python experiments/compensate.py --data_dir DATA --jobs 2
    python experiments/compensate.py --data_dir DATA --stage ablate --jobs 2

A MiniLM that was fine-tuned (the teacher of experiments/moebert.py; its --cache_dir serves here too) loses heads or
neurons by importance and is scored without another step of training: with the weights as they are ('plain'), with the
means of what went in the bias ('means', the compensation of FLAP), and with weights that take over by least squares
('least-squares', the default of `compensate`). The second command varies what least squares goes by: calibration rows,
ridge, and chance in place of importance. Each cell leaves a file in experiments/results/compensate; what is there is
not run again.
"""
import math
from functools import partial
from itertools import product
from pathlib import Path

import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from moebert import ROWS, taught
from shared import answers, at_most, cells_of, choices, need_data, setting

from tpa_nb.compensate import compensate
from tpa_nb.importance import head_importance, neuron_importance
from tpa_nb.profile import count_flops
from tpa_nb.prune import prune_heads, prune_neurons, select_heads, select_neurons
from tpa_nb.runner import Cell, run_script
from tpa_nb.tasks import load_task

FOLDER = Path(__file__).parent / 'results' / 'compensate'
CALIBRATION = 512
WAYS = {'plain': None, 'means': math.inf, 'least-squares': 0.1}  # ridge
LEFT = (dict(heads=36), dict(heads=24), dict(neurons=768), dict(neurons=384))  # in all; in each layer
ABLATIONS = (dict(rows=64), dict(rows=2048), dict(ridge=0.01), dict(ridge=1.0))


def grid(tasks, seeds):
    "Cells of the comparison, and the model as it was"
    found = []
    for seed, task in product(seeds, tasks):
        found.append(Cell(task, 'teacher', seed=seed))
        found += [Cell(task, way, setting(**left), seed) for left, way in product(LEFT, WAYS)]
    return found


def ablation_grid(tasks, seeds):
    "Cells that differ in what least squares goes by, and chance in place of importance"
    kept = LEFT[-1]
    found = [('least-squares', {**kept, **change}) for change in ABLATIONS]
    found += [(way, {**left, 'by': 'random'}) for left in (LEFT[0], LEFT[2]) for way in WAYS]
    return [Cell(task, way, setting(**asked), seed) for seed, task in product(seeds, tasks) for way, asked in found]


def chosen(arch, task, seed, asked):
    "What goes: heads over the whole model or neurons in each layer, by importance or by chance"
    rows, draw = task.calibration(min(CALIBRATION, len(task.train)), seed), torch.Generator().manual_seed(seed)
    imp = head_importance(arch, rows) if 'heads' in asked else neuron_importance(arch, rows)
    if asked.get('by') == 'random':
        imp = [torch.rand(scores.shape, generator=draw) for scores in imp]
    if 'heads' in asked:
        return {'heads': select_heads(torch.stack(list(imp)), keep=asked['heads'])}
    return {'neurons': select_neurons(imp, keep=asked['neurons'], scope='layer')}


def run(cell, data_dir, cache):
    "Carry out one cell"
    torch.manual_seed(cell.seed)
    task, asked = at_most(load_task(cell.task, data_dir=data_dir, partial=True), ROWS), choices(cell.setting)
    arch = taught(task, cell.seed, Path(cache) / 'whole')
    dense, gone = count_flops(arch), chosen(arch, task, cell.seed, asked) if asked else {}
    ridge = asked.get('ridge', WAYS.get(cell.method))
    if ridge:
        rows = task.calibration(min(asked.get('rows', CALIBRATION), len(task.train)), cell.seed)
        compensate(arch, rows, **gone, ridge=ridge)
    prune_neurons(prune_heads(arch, gone.get('heads', {})), gone.get('neurons', {}))
    return {**answers(arch, task), 'flops': count_flops(arch) / dense, 'partial': task.partial,
            'rows': {'train': len(task.train), 'validation': len(task.validation)},
            'compensated': [h for h in arch.history if h['verb'] == 'compensate']}


@call_parse
@delegates(run_script, but='prepare')
def main(
    data_dir: str = '',                  # Folder with <task>/train.parquet and validation.parquet
    tasks: str = 'sst2,cola,mrpc',        # Tasks, with commas
    seeds: int = 1,                      # Seeds 0, 1, ...
    stage: str = 'grid',                 # 'grid' (the comparison) or 'ablate'
    **kwargs,
):
    "Run the cells that are missing"
    need_data('compensate', data_dir, kwargs)
    asked = tasks.split(','), range(seeds)
    cells = cells_of('compensate', stage, {'grid': lambda: grid(*asked), 'ablate': lambda: ablation_grid(*asked)})
    run_script(cells, partial(run, data_dir=data_dir), FOLDER, **kwargs)
