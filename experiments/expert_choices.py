"""The parts of MoEfication one by one: how a ReLU comes in, what routers learn from, how a LoRA expert starts, and what
training for sparse activations is worth.

    python experiments/expert_choices.py --data_dir DATA --jobs 2

On SST-2, with the models of experiments/moefication.py: fine-tuned on four fifths of its training rows and scored on
the rest, so that no choice of a default rests on validation rows. Each cell leaves a file in
experiments/results/expert_choices; what is there is not run again. nbs/results/moefication.ipynb shows what exists.
"""
from functools import partial
from pathlib import Path

import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from moefication import COACT, DEFAULTS, calibration, dense_model, epochs_of, half, load, routed
from shared import answers, choices, kept, need_data, setting, slice_of, steps_of

from tpa_nb.arch import Arch
from tpa_nb.lora_expert import add_lora_expert, fold_lora_expert
from tpa_nb.router import activation_sparsity, relufy
from tpa_nb.runner import Cell, run_script
from tpa_nb.train import finetune

FOLDER = Path(__file__).parent / 'results' / 'expert_choices'
TASK = 'sst2'
RELU = ('gelu', 'gelu-on', 'relu', 'relu-on', 'biases', 'biases-on', 'relu-first')  # '-on': with the second half
ROUTERS = [dict(contribution=kind, scale=scale) for kind in ('activation', 'output', 'distance')
           for scale in ('batch', 'token')]
EXPERTS = [dict(lr=2e-3), dict(lr=2e-3, lora_alpha=128), dict(lr=5e-4), dict(lr=2e-3, init='normal', lora_alpha=1)]
SPARSE = [dict(weight=w, **k) for w in (0, 1, 3, 0.2) for k in ({}, dict(k=10), dict(k=5))]  # without k: dense


def grid(seeds):
    "The cells, each with one choice"
    return [Cell(TASK, *cell, seed) for seed in seeds for cell in [
        *((way, '') for way in RELU), *(('router', setting(**way)) for way in ROUTERS),
        *(('expert', setting(**way)) for way in EXPERTS), *(('sparse', setting(**way)) for way in SPARSE)]]


def with_relu(way, task, seed, cache):
    "A model whose ReLUs came in at some time, or never"
    if way == 'biases-on':
        return dense_model(task, seed, cache)
    if way == 'relu-first':
        arch = Arch.from_pretrained('minilm', task, seed)
        relufy(arch)
        return half(half(arch, task, seed), task, seed, 1)
    arch = kept(Path(cache) / f'half-{task.name}-{seed}',
                lambda: half(Arch.from_pretrained('minilm', task, seed), task, seed))
    if way.startswith('relu'):
        relufy(arch)
    if way.startswith('biases'):
        relufy(arch, calibration(task, seed))
    return half(arch, task, seed, 1) if way.endswith('-on') else arch


def run(cell, data_dir, cache):
    "Carry out one cell"
    torch.manual_seed(cell.seed)
    task, asked, layers, zeros = slice_of(load(cell.task, data_dir)), choices(cell.setting), None, None
    if cell.method in RELU:
        arch = with_relu(cell.method, task, cell.seed, cache)
        zeros = activation_sparsity(arch, calibration(task, cell.seed), 4096)
    elif cell.method == 'sparse':
        arch = dense_model(task, cell.seed, cache, asked['weight'])
        zeros = activation_sparsity(arch, calibration(task, cell.seed), 4096)
        if 'k' in asked:
            arch = routed(arch, task, cell.seed, {**DEFAULTS, **COACT, 'k': asked['k']})
            layers = arch.history[-1]['layers']
    else:
        arch = routed(dense_model(task, cell.seed, cache), task, cell.seed, DEFAULTS,
                      **(asked if cell.method == 'router' else {}))
        layers = arch.history[-1]['layers']
    if cell.method == 'expert':
        lr = asked.pop('lr')
        add_lora_expert(arch, r=DEFAULTS['r'], seed=cell.seed, **asked)
        finetune(arch, task, epochs_of(task) / 2, lr, seed=cell.seed + 2000, mixed_precision='bf16')
        fold_lora_expert(arch)
    return {**answers(arch, task), 'zeros': zeros, 'steps': steps_of(arch), 'partial': task.partial,
            'layers': layers,
            'rows': {'train': len(task.train), 'validation': len(task.validation)}}


@call_parse
@delegates(run_script, but='prepare')
def main(
    data_dir: str = '',           # Folder with <task>/train.parquet and validation.parquet
    seeds: int = 1,               # Seeds 0, 1, ...
    **kwargs,
):
    "Run the cells that are missing"
    need_data('expert_choices', data_dir, kwargs)
    run_script(grid(range(seeds)), partial(run, data_dir=data_dir), FOLDER, **kwargs)
