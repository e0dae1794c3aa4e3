"""MoEfication and the LoRA expert: what routing loses, and what wins it back, on real data.

    python experiments/moefication.py --data_dir DATA --stage tune --jobs 2
    python experiments/moefication.py --data_dir DATA --jobs 2 --minutes 60
    python experiments/moefication.py --data_dir DATA --stage longer --jobs 2
    python experiments/moefication.py --data_dir DATA --stage sweep --jobs 2
    python experiments/moefication.py --data_dir DATA --stage budgets --tasks sst2,cola,mnli --seeds 1 --jobs 2
    python experiments/moefication.py --data_dir DATA --stage again --seeds 1 --jobs 2

A MiniLM is fine-tuned, ReLU-fied in the middle and fine-tuned on; that is the dense model. Its feed-forward layers
are split into experts of which a fifth runs for each token: chosen by an oracle or by a router. Then what is left to
train is trained for as many steps in every method: a LoRA expert (by the labels, with the dense model as its teacher
beside them, or by the dense model alone), LoRA on the attentions, all weights, the head alone; and, as baselines, the
same on the dense model. Of larger sets, 9,000 training rows serve. The task t5-sst2 is SST-2 asked in words, of a
small T5 that is trained here from nothing on all rows and recovers on 9,000 of them. The first command tries learning
rates on a slice of the training rows, the second runs the comparison, the third gives some methods twice as many
steps, the fourth changes one thing after the other: how many experts run, their size, how neurons are dealt out, what
chooses, and the rank of the LoRA expert. The fifth lets a token run more or fewer experts, over several numbers of
them, the last runs cells once more, on dense models that are trained once more with the same seeds, to see how much
such a training varies. With `sparse=1` in its setting a cell has a dense model that was trained for sparse activations
too; experiments/expert_choices.py tries that. Each cell leaves a file in experiments/results/moefication; what is there
is not run again.
"""
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from shared import answers, at_most, cells_of, choices, kept, listed, need_data, setting, slice_of, steps_of
from small_t5 import PREFIX, asked_in_words, small_t5

from tpa_nb.arch import Arch
from tpa_nb.compensate_routing import compensate_routing
from tpa_nb.distill import distill
from tpa_nb.lora import add_lora, merge_lora
from tpa_nb.lora_expert import add_lora_expert, fit_lora_expert, fold_lora_expert
from tpa_nb.moe import expert_usage, moefy, moes, set_router
from tpa_nb.profile import count_flops, count_params
from tpa_nb.router import OracleRouter, activation_sparsity, fit_routers, relufy, set_dynamic_k
from tpa_nb.runner import Cell, best_setting, read_cells, run_script
from tpa_nb.sparsity import SparsityLoss
from tpa_nb.tasks import load_task
from tpa_nb.train import finetune

FOLDER = Path(__file__).parent / 'results' / 'moefication'
EPOCHS = {'sst2': 2, 'mnli': 2, 'mrpc': 4, 'cola': 4, 'rte': 6, 't5-sst2': 3}  # of the dense model
ROWS = 9000            # training rows at most, of the larger sets, drawn at random; the same for all methods
RECOVERY = 0.5         # epochs of every recovery, as a share of the dense model's
DENSE_LR, T5_LR = 1e-4, 1e-3  # the T5 begins with random weights
DEFAULTS = dict(experts=48, k=10, split='kmeans', r=32, times=1, rows=2048, sparse=0)  # T5 is as wide as MiniLM
RATES = {'expert': (2e-3, 1e-3, 4e-3), 'fitted-expert': (3e-4, 1e-3), 'fitted-norm': (1e-3, 3e-4),
         'fitted-pooler': (1e-3, 3e-4), 'distilled-pooler': (1e-3, 3e-4),
         'fitted-distilled': (1e-3, 3e-4), 'fitted-unlabelled': (1e-3, 3e-4), 'both-unlabelled': (1e-3, 3e-4),
         'attention': (1e-3, 5e-4, 2e-3), 'full': (5e-5, 2e-5, 1e-4), 'head': (1e-3, 1e-2)}
COACT, MANY = dict(split='coactivation'), dict(rows=8192)
BESIDE = [('distilled-pooler', dict(times=3)), ('fitted-expert', dict(r=128)), ('fitted-expert', COACT),
          ('both', COACT), *((way, {**MANY, **COACT}) for way in ('both', 'fitted', 'both-expert', 'fitted-distilled')),
          ('both', MANY), ('fitted', MANY), ('both-expert', dict(lr=3e-4, **MANY, **COACT))]  # tried at 1e-3 otherwise
TUNED = ('sst2', 'cola')  # the tasks that rates are chosen on; the best on their mean is used for all
ROUTERS = {'mlp': {}, 'paper': dict(contribution='activation', scale='batch'),  # settings of `fit_routers`
           'centroid': dict(router='centroid'), 'hash': dict(router='hash')}
UNLABELLED = 'fitted-unlabelled', 'both-unlabelled'
WIDER = {'fitted-norm': ('norm', 'head'), 'fitted-pooler': ('norm', 'head', 'pooler'),
         'distilled-pooler': ('norm', 'head', 'pooler')}  # what trains beside the expert; otherwise the head
FITTED = 'fitted', 'fitted-expert', 'fitted-distilled', 'both', 'both-expert', *UNLABELLED, *WIDER
COMPENSATED = 'compensated', 'both', 'both-expert', 'both-unlabelled'
DISTILLED = 'distilled', 'fitted-distilled', 'distilled-pooler', *UNLABELLED
EXPERT_WAYS = ('expert', 'distilled', *FITTED)  # a LoRA expert trained by labels; with the dense model as its teacher;
# fitted to what is left out, and then trained; 'both': fitted, and what runs takes over what does not
UNTRAINED = 'fitted', 'compensated', 'both'
GRID = ('dense', 'mlp', 'mlp+compensated', 'mlp+both', 'mlp+both-expert', 'mlp+expert', 'mlp+fitted',
        'mlp+fitted-expert', 'mlp+distilled', 'oracle-activation', 'oracle-distance', 'paper', 'paper+expert',
        'mlp+full', 'dense+expert', 'dense+full', 'mlp+attention', 'mlp+head', 'dynamic', 'dynamic+expert',
        'dynamic+fitted-expert')
TRIED = 'mlp+fitted-distilled', *(f'mlp+{way}' for way in (*UNLABELLED, *WIDER))  # on slices: not in the comparison
AGAIN = ('dense', 'mlp', 'mlp+fitted-expert', 'mlp+expert', 'mlp+compensated', 'oracle-distance', 'dynamic', 'mlp+full',
         'mlp+attention', 'mlp+head')
AGAIN_COACT = 'mlp', 'mlp+compensated', 'oracle-distance'
LONGER = 'mlp+fitted-expert', 'mlp+expert', 'mlp+full', 'dense+full'  # with twice as many steps
BUDGETS = [{**k, **split} for split in ({}, COACT) for k in ({}, *(dict(k=k) for k in (5, 14, 24)))]
SWEEPS = [
    *((way, dict(k=k)) for k in (5, 14, 24) for way in ('mlp', 'oracle-distance', 'dynamic')),
    *((way, dict(experts=E, k=k)) for E, k in ((12, 2), (24, 5), (96, 19)) for way in ('mlp', 'oracle-distance')),
    *((way, dict(split=how)) for how in ('random', 'coactivation', 'importance')
      for way in ('mlp', 'oracle-distance')),
    ('dynamic', COACT), *((way, dict(k=k, **COACT)) for k in (5, 14, 24) for way in ('mlp', 'dynamic')),
    *(('mlp+compensated', dict(k=k)) for k in (5, 14, 24)),
    *((way, dict(split='coactivation')) for way in ('mlp+compensated', 'mlp+both')),
    ('centroid', {}), ('hash', {}), ('mlp+expert', dict(r=8)), ('mlp+expert', dict(r=128))]


def tuning_grid():
    "Cells that try learning rates of the ways to recover, and some other settings"
    return [Cell(task, f'tune-{way}', setting(lr=lr)) for way, rates in RATES.items() for lr, task in
            product(rates, TUNED)] + [Cell(task, f'tune-{way}', setting(**{'lr': 1e-3, **change}))
                                      for way, change in BESIDE for task in TUNED]


def grid(tasks, seeds, methods=GRID):
    "Cells of the comparison, what decides first; neighbours are of different tasks, so that none waits for the other"
    return [Cell(task, method, seed=seed) for seed, method, task in product(seeds, methods, tasks)]


def longer_grid(tasks, seeds, methods=LONGER):
    "Cells that train for as many epochs as the dense model did"
    return [Cell(task, method, setting(times=2), seed) for seed, method, task in product(seeds, methods, tasks)]


def again_grid(tasks, seeds, methods=AGAIN):
    "Cells of the comparison once more, and after co-activation; give them a `cache_dir` of their own"
    once_more = dict(repeat=1)
    return [Cell(task, method, setting(**once_more), seed) for seed, method, task in product(seeds, methods, tasks)] + [
        Cell(task, method, setting(**COACT, **once_more), seed)
        for seed, method, task in product(seeds, AGAIN_COACT, tasks) if method in methods]


def budget_grid(tasks, seeds):
    "Cells that run as many experts for every token or more for some, over several budgets and two splits"
    return [Cell(task, way, setting(**change), seed)
            for seed, change, way, task in product(seeds, BUDGETS, ('mlp', 'dynamic'), tasks)]


def sweep_grid(tasks, seeds):
    "Cells that differ from the comparison in one thing"
    return [Cell(task, method, setting(**change), seed)
            for seed, (method, change), task in product(seeds, SWEEPS, tasks)]


@lru_cache
def best_rate(way):
    "The learning rate with the best mean score on slices of the training rows"
    way = {'distilled': 'expert', 'both-expert': 'fitted-expert'}.get(way, way)
    tried = [setting(lr=lr) for lr in RATES[way]]
    return choices(best_setting(read_cells(FOLDER), f'tune-{way}', tried, TUNED))['lr']


def load(name, data_dir):
    "The task by its name; a T5 needs all rows to learn the language"
    task = load_task(name.removeprefix(PREFIX), data_dir=data_dir, partial=True)
    return asked_in_words(task) if name.startswith(PREFIX) else at_most(task, ROWS)


def epochs_of(task):
    return EPOCHS[task.name.removesuffix('_partial')]


def half(arch, task, seed, part=0, sparse=0):
    "Half of a dense MiniLM's training, the first or the second, with a weight for sparse activations"
    added = [SparsityLoss(arch, sparse)] if sparse else []
    return finetune(arch, task, epochs_of(task) / 2, DENSE_LR, seed=seed + 1000 * part, mixed_precision='bf16',
                    added=added)


def relufied(task, seed, sparse=0):
    "A MiniLM whose GELU becomes a ReLU half-way through its training"
    arch = half(Arch.from_pretrained('minilm', task, seed), task, seed)
    return half(relufy(arch, calibration(task, seed)), task, seed, 1, sparse)


def trained_t5(task, seed):
    "A small T5 that has learnt the task from nothing"
    return finetune(small_t5(task, seed), task, epochs_of(task), T5_LR, seed=seed, batch_size=64,
                    mixed_precision='bf16')


def dense_model(task, seed, cache, sparse=0):
    "A model with ReLU, tuned on the task; cells of one task and seed share it"
    make = trained_t5 if task.name.startswith(PREFIX) else partial(relufied, sparse=sparse)
    return kept(Path(cache) / f"dense-{task.name}-{seed}{f'-{sparse:g}' if sparse else ''}", partial(make, task, seed))


def calibration(task, seed, rows=DEFAULTS['rows']):
    "Training rows for routers and biases, and for what is fitted"
    return task.calibration(min(rows, len(task.train)), seed)


def routed(dense, task, seed, asked, **router):
    "The dense model with experts and routers; its history has what these catch, layer by layer"
    few = calibration(task, seed)
    arch = moefy(dense, asked['experts'], asked['k'], few, split=asked['split'], router=None, seed=seed)
    report = fit_routers(arch, few, seed=seed, **router)
    arch.history[-1]['layers'] = report.round(4).to_dict('list')
    return arch


def routed_model(task, seed, way, asked, cache):
    "The dense model, split and routed; cells of one task, seed and split share it"
    sparse = asked['sparse']
    name = (way, asked['experts'], asked['k'], asked['split'], task.name, seed, *([f'{sparse:g}'] if sparse else []))
    return kept(Path(cache) / '-'.join(map(str, name)),
                lambda: routed(dense_model(task, seed, cache, sparse), task, seed, asked, **ROUTERS[way]))


def model_of(way, task, seed, asked, cache):
    "The model before anything is won back"
    if way == 'dense':
        return dense_model(task, seed, cache, asked['sparse'])
    arch = routed_model(task, seed, way if way in ROUTERS else 'mlp', asked, cache)
    if way.startswith('oracle'):
        for row in moes(arch):
            set_router(arch.ffns[row], OracleRouter(asked['experts'], way.removeprefix('oracle-')))
    if way == 'dynamic':
        set_dynamic_k(arch, calibration(task, seed), asked['k'], seed=seed)
    return arch


def recover(arch, task, way, lr, asked, seed, cache):
    "Train what `way` lets train, and fold it in"
    epochs, trained_on, r = asked['times'] * RECOVERY * epochs_of(task), at_most(task, ROWS), asked['r']
    few = calibration(task, seed, asked['rows'])
    if way in EXPERT_WAYS:
        add_lora_expert(arch, r=r, train=WIDER.get(way, ('head',)), seed=seed)
    if way in FITTED:
        fit_lora_expert(arch, few, seed=seed)
    if way in COMPENSATED:
        compensate_routing(arch, dense_model(task, seed, cache, asked['sparse']), few)
    if way == 'attention':
        add_lora(arch, r=8, seed=seed)
    if way in ('full', 'head'):
        arch.model.requires_grad_(way == 'full')
        for name in arch.head_modules:
            arch.base.get_submodule(name).requires_grad_(True)
    trainable = sum(p.numel() for p in arch.model.parameters() if p.requires_grad)
    settings = dict(lr=lr, seed=seed + 2000, mixed_precision='bf16')
    if way in DISTILLED:
        distill(arch, dense_model(task, seed, cache, asked['sparse']), trained_on, epochs,
                labels=way not in UNLABELLED, **settings)
    elif way not in UNTRAINED:
        finetune(arch, trained_on, epochs, **settings)
    if way in EXPERT_WAYS:
        fold_lora_expert(arch)
    if way == 'attention':
        merge_lora(arch)
    return trainable


def used(arch, task):
    "Experts that a validation token runs in each layer, and the share of tokens that each runs for; none if dense"
    usage = expert_usage(arch, task.examples('validation')) if moes(arch) else None
    return {'mean_k': [round(n, 4) for n in usage.mean_k.values()] if usage else [],
            'usage': [[round(s, 4) for s in row.tolist()] for row in usage.share.values()] if usage else []}


def run(cell, data_dir, cache):
    "Carry out one cell"
    torch.manual_seed(cell.seed)
    task = load(cell.task, data_dir)
    tuning = cell.method.startswith('tune-')
    task, cache = slice_of(task) if tuning else task, Path(cache) / ('part' if tuning else 'whole')
    asked = {**DEFAULTS, **choices(cell.setting)}
    way, _, more = ('mlp+' + cell.method.removeprefix('tune-') if tuning else cell.method).partition('+')
    arch, trainable = model_of(way, task, cell.seed, asked, cache), 0
    if more:
        lr = asked.get('lr') or (best_rate(more) if more not in UNTRAINED else 0)
        trainable = recover(arch, task, more, lr, asked, cell.seed, cache)
        if way == 'dynamic':  # training has moved the scores
            set_dynamic_k(arch, calibration(task, cell.seed), asked['k'], seed=cell.seed)
    zeros = activation_sparsity(arch, calibration(task, cell.seed), 4096) if cell.method == 'dense' else None
    fits, experts = ([h for h in arch.history if h['verb'] == verb] for verb in ('fit_routers', 'fit_lora_expert'))
    return {**answers(arch, task), 'trainable': trainable, 'params': count_params(arch)['params'],
            'flops': count_flops(arch), 'zeros': zeros, 'router': fits[-1] if fits and way != 'dense' else None,
            'fit': experts[-1] if experts else None,
            'compensated': next((h['tokens'] for h in arch.history if h['verb'] == 'compensate_routing'), 0),
            **used(arch, task), 'steps': steps_of(arch), 'partial': task.partial,
            'rows': {'train': len(task.train), 'validation': len(task.validation)}}


@call_parse
@delegates(run_script, but='prepare')
def main(
    data_dir: str = '',                  # Folder with <task>/train.parquet and validation.parquet
    tasks: str = 'sst2,cola,mrpc,mnli',  # Tasks, with commas
    methods: str = '',                   # Methods, with commas; all of the stage if not given
    seeds: int = 2,                      # Seeds 0, 1, ...
    stage: str = 'grid',                 # 'grid' (the comparison), 'tune', 'longer', 'sweep', 'budgets', 'again'
    **kwargs,
):
    "Run the cells that are missing"
    need_data('moefication', data_dir, kwargs)
    names = listed('moefication', 'tasks', tasks, EPOCHS)
    asked = methods.split(',') if methods else None
    cells = cells_of('moefication', stage, {
        'tune': tuning_grid, 'grid': lambda: grid(names, range(seeds), asked or GRID),
        'longer': lambda: longer_grid(names, range(seeds), asked or LONGER),
        'sweep': lambda: sweep_grid(names, range(seeds)), 'budgets': lambda: budget_grid(names, range(seeds)),
        'again': lambda: again_grid(names, range(seeds), asked or AGAIN)})
    run_script(cells, partial(run, data_dir=data_dir), FOLDER, **kwargs)
