"""Prune-LoRA against tuned full fine-tuning, tuned LoRA and random heads, on real data.

    python experiments/prune_lora.py --data_dir DATA --stage tune --jobs 2
    python experiments/prune_lora.py --data_dir DATA --stage explore --jobs 2
    python experiments/prune_lora.py --data_dir DATA --stage schedule --jobs 2
    python experiments/prune_lora.py --data_dir DATA --stage large --jobs 2
    python experiments/prune_lora.py --data_dir DATA --jobs 2 --minutes 60
    python experiments/prune_lora.py --data_dir DATA --stage longer --jobs 2
    python experiments/prune_lora.py --data_dir DATA --stage tune-distill --jobs 2
    python experiments/prune_lora.py --data_dir DATA --stage distill --jobs 2

The first command tries learning rates on a slice of the training rows, the second procedures of pruning on the same
slice (in its method 'kept' one adapter lives through the pruning, where others merge it and begin a second one; that
one on all rows too), the third how the learning rate runs past the pruning, on slices of CoLA with several seeds, the
fourth some procedures where there are rows enough to tell them apart, the fifth runs the grid with the best rates, the
sixth gives every method three times as many passes, at the same rates. The last two do the same as the fifth for pruned
models that learn from a teacher as well, in as many steps: 'warm-distill' from a tuned LoRA model of the same task and
seed, whose own steps come on top and are noted with the result, 'warm-self' from the model as it was before pruning,
which has had the warm-up only. Each cell leaves a file in experiments/results/prune_lora; what is there is not run
again. `--shard i/n` divides the cells between machines, `--minutes` fits them into the time there is.
nbs/results/prune_lora.ipynb draws what exists.
"""
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from shared import answers, at_most, cells_of, choices, kept, listed, need_data, setting, slice_of, steps_of

from tpa_nb.arch import Arch
from tpa_nb.distill import distill
from tpa_nb.dsee import add_dsee, merge_dsee
from tpa_nb.importance import head_derivatives, ranking_stability, score_heads
from tpa_nb.lora import add_lora, budget_ranks, merge_lora
from tpa_nb.masks import prune_adapted_heads
from tpa_nb.methods import Outcome
from tpa_nb.profile import count_flops, count_params
from tpa_nb.prune import prune_heads, select_heads
from tpa_nb.recipe import Recipe, recipe_methods
from tpa_nb.runner import Cell, best_setting, read_cells, run_script
from tpa_nb.tasks import load_task
from tpa_nb.train import finetune, warm_up

FOLDER = Path(__file__).parent / 'results' / 'prune_lora'
EPOCHS = {'rte': 6, 'mrpc': 5, 'cola': 5, 'wnli': 6, 'sst2': 1, 'mnli': 1}  # passes over the training rows, all methods
RATES = {'tune-lora': (1e-3, 5e-4, 2e-3), 'tune-full': (1e-4, 2e-4)}
TUNED = ('mrpc', 'cola')  # the tasks that rates are chosen on; the best on their mean is used for all
KEEP = (36, 24, 50)
TEACHERS = {'warm-distill': 'lora', 'warm-self': 'self'}  # who teaches: a tuned LoRA model, the model before pruning
WEIGHTS = (1, 5)  # weights of distillation that are tried
TAUGHT = ('cola',)  # the tasks that these are chosen on, the cheapest one: a teacher has to be trained for each
WARM_UP = 0.5
LARGE, LARGE_EPOCHS = ('sst2', 'mnli'), 3  # sets with rows enough to tell procedures apart
ROWS, SCORED = 9000, 4000  # of these, to train on and to score
AFTER = 'lr_after', 'scale', 'even'  # tried after pruning: a rate, the adapter's alpha / r, ranks that do not vary
LONGER = 3  # times as many passes, in the stage 'longer'
ALL = ('q', 'k', 'v', 'o', 'up', 'down')  # 'targets=all': adapters on the feed-forward layers as well


def tuning_grid():
    "Cells that try learning rates, no training of the pooler, and adapters on all layers"
    return [Cell(task, 'tune-lora', setting(lr=RATES['tune-lora'][0], **change))
            for change in (dict(pooler=0), dict(targets='all')) for task in TUNED] + [
        Cell(task, method, setting(lr=lr)) for method, rates in RATES.items() for lr, task in product(rates, TUNED)]


def longer_grid(tasks, seeds):
    "Cells of the comparison with three times as many steps, of every method alike; what decides first"
    pruned = [(method, dict(keep=keep)) for method in ('warm', 'random-warm') for keep in (36, 50, 24)]
    return [Cell(task, method, setting(**asked, times=LONGER), seed)
            for seed, (method, asked), task in product(seeds, [('lora', {}), *pruned, ('full', {})], tasks)]


def exploring_grid(seeds):
    "Cells that try procedures, on slices of the training rows like the learning rates; one of them on all rows too"
    ways = [dict(), dict(normalize='none'), dict(criterion='random'), dict(iterative_steps=3), dict(min_heads=3),
            dict(compensate='all'), dict(warm_up=0.3), dict(warm_up=0.1), dict(warm_up=0.8),
            dict(warm_up=0.8, compensate='all'), dict(adapter='kept'), dict(targets='all')]
    return [Cell(task, 'explore', setting(keep=keep, **way), seed)
            for seed, keep, way, task in product(seeds, (24, 36), ways, TUNED)] + [
        Cell(task, 'explore', setting(keep=72), seed) for seed, task in product(seeds, TUNED)] + [
        Cell('cola', 'kept', setting(keep=36), seed) for seed in seeds]


def schedule_grid(seeds):
    "Cells that try how the learning rate runs past the pruning, and when to prune, on slices of CoLA's training rows"
    whole = dict(schedule='whole')
    ways = [dict(), dict(warm_up=0.8, **whole), whole, dict(lr_after=5e-4), dict(adapter='kept', **whole)]
    return [Cell('cola', *cell, seed) for cell, seed in product([
        ('tune-lora', setting(lr=1e-3)), *(('explore', setting(keep=36, **way)) for way in ways)], seeds)]


def large_grid():
    "Cells that try procedures where there are rows enough to tell them apart; '' is LoRA"
    ways = ['', 'keep=36', 'keep=36,scale=2', 'keep=72', 'keep=36,lr_after=5e-04,scale=2', 'keep=36,even=1',
            'keep=36,warm_up=2e-01,scale=2']
    return [Cell(task, 'large', way) for way, task in product(ways, LARGE)]


def distill_tuning_grid():
    "Cells that try weights of distillation, on slices of the training rows; no teacher is wanted twice at a time"
    return [Cell(task, 'tune-distill', setting(keep=KEEP[0], teacher=teacher, weight=weight))
            for weight, teacher, task in product(WEIGHTS, TEACHERS.values(), TAUGHT)]


def distill_grid(tasks, seeds):
    "Cells that learn from a teacher; no teacher is wanted twice at a time"
    return [Cell(task, method, setting(keep=keep), seed)
            for seed, keep, method, task in product(seeds, (36, 50), TEACHERS, tasks)]


def grid(tasks, seeds, cold=True):
    "Cells of the comparison: those that decide first, warm-ups early so that others can use them"
    found = []
    for seed, task in product(seeds, tasks):
        found += [Cell(task, 'warm', setting(keep=KEEP[0]), seed), Cell(task, 'lora', seed=seed),
                  Cell(task, 'full', seed=seed)]
        found += [Cell(task, method, setting(keep=keep), seed) for keep in KEEP for method in ('warm', 'random-warm')]
    if cold:
        found += [Cell(task, method, setting(keep=keep), seed) for seed, task, keep, method in
                  product(seeds, tasks, KEEP[:2], ('cold', 'random-cold'))]
    return list(dict.fromkeys(found))


@lru_cache
def best_rate(method):
    "The learning rate with the best mean score on slices of the training rows"
    tried = [setting(lr=lr) for lr in RATES[f'tune-{method}']]
    return choices(best_setting(read_cells(FOLDER), f'tune-{method}', tried, TUNED))['lr']


@lru_cache
def best_weight(teacher):
    "The weight of distillation with the best mean score on slices of the training rows"
    tried = [setting(keep=KEEP[0], teacher=teacher, weight=weight) for weight in WEIGHTS]
    return choices(best_setting(read_cells(FOLDER), 'tune-distill', tried, TAUGHT, 'tune-distill'))['weight']


def recipe_of(cell):
    "What a cell asks for, as a `Recipe`"
    way, asked = cell.method.removeprefix('tune-'), choices(cell.setting)
    lr = asked.get('lr')
    epochs = LARGE_EPOCHS if way == 'large' else EPOCHS[cell.task] * asked.pop('times', 1)
    common = dict(epochs=epochs, seed=cell.seed, mixed_precision='bf16')
    if way == 'full':
        return Recipe(method='full', full_lr=lr or best_rate('full'), **common)
    common['lr'] = lr or best_rate('lora')
    common['train'] = ('norm', 'head', 'pooler') if asked.get('pooler', 1) else ('norm', 'head')
    if asked.pop('targets', '') == 'all':
        common['targets'] = ALL
    if way == 'lora' or (way == 'large' and 'keep' not in asked):
        return Recipe(method='lora', **common)
    if way in ('explore', 'large'):
        for name in ('adapter', 'schedule', *AFTER):
            asked.pop(name, '')
        norm = {'normalize': None} if asked.pop('normalize', '') == 'none' else {}
        return Recipe(**{'warm_up': WARM_UP, **asked, **norm, **common})
    return Recipe(warm_up=0 if way.endswith('cold') else WARM_UP, keep=asked['keep'],
                  criterion='random' if way.startswith('random') else 'importance', **common)


def pace(recipe, whole):
    "How the learning rate runs before pruning: on the line of plain LoRA's, as far as it gets, or constant"
    if not whole:
        return dict(lr_scheduler_type='constant_with_warmup')
    return dict(lr_scheduler_type='polynomial', lr_scheduler_kwargs={'lr_end': recipe.lr * (1 - recipe.warm_up)})


def rate_after(recipe, whole):
    "The learning rate right after pruning"
    return recipe.lr * (1 - recipe.warm_up) if whole else recipe.lr


def warmed(task, recipe, cache, whole=False):
    "A model after the recipe's warm-up; cells of one task and seed share it"
    def make():
        arch = Arch.from_pretrained('minilm', task, recipe.seed)
        return warm_up(arch, task, recipe.epochs * recipe.warm_up, recipe.r, recipe.lr, recipe.batch_size, recipe.seed,
                       recipe.train, recipe.targets, recipe.lora_alpha, mixed_precision=recipe.mixed_precision,
                       **pace(recipe, whole))
    key = (task.name, recipe.seed, recipe.lr, recipe.epochs, recipe.warm_up, recipe.r, *recipe.targets,
           *['whole'] * whole)
    return kept(Path(cache) / '-'.join(map(str, key)), make)


def taught(task, recipe, cache):
    "A LoRA model tuned on all steps; cells of one task and seed share it"
    def make():
        arch = Arch.from_pretrained('minilm', task, recipe.seed)
        return recipe_methods['lora'](arch, task, replace(recipe, method='lora'), False).arch
    return kept(Path(cache) / f'teacher-{task.name}-{recipe.seed}-{recipe.lr:g}-{recipe.epochs:g}-{recipe.r}', make)


def measured(arch, task, recipe):
    "Derivatives of the heads on training rows, and their scores"
    rows = task.calibration(min(recipe.calibration, len(task.train)), recipe.seed)
    derivatives = head_derivatives(arch, rows, recipe.batch_size)
    return derivatives, score_heads(derivatives, recipe.normalize)


def measured_and_pruned(arch, task, recipe):
    "Derivatives and scores of the heads before the recipe's go, and the scores that ranks are shared out by"
    derivatives, imp = measured(arch, task, recipe)
    prune_heads(arch, select_heads(imp, keep=recipe.keep))
    return derivatives, imp, score_heads(derivatives, None, minmax=False)


def prune_and_distill(arch, task, recipe, teacher, weight):
    "What the method 'prune-lora' does after its warm-up, with a teacher"
    derivatives, imp, blocks = measured_and_pruned(arch, task, recipe)
    add_lora(arch, blocks, budget=recipe.r, lora_alpha=recipe.lora_alpha, targets=recipe.targets, train=recipe.train,
             seed=recipe.seed)
    distill(arch, teacher, task, recipe.epochs, weight, lr=recipe.lr, batch_size=recipe.batch_size, seed=recipe.seed,
            mixed_precision=recipe.mixed_precision)
    return Outcome(merge_lora(arch), imp, ranking_stability(derivatives, recipe.normalize))


def prune_and_adapt(arch, task, recipe, lr_after=None, scale=None, even=0):
    "What the method 'prune-lora' does after its warm-up, with another adapter; of LoRA's scale if not given"
    derivatives, imp, blocks = measured_and_pruned(arch, task, recipe)
    ranks = [recipe.r] * len(arch.attns) if even else budget_ranks(arch, blocks, recipe.r, targets=recipe.targets)
    scale = scale or recipe.lora_alpha / recipe.r
    add_lora(arch, r=ranks, lora_alpha=scale * max(ranks), targets=recipe.targets, train=recipe.train, seed=recipe.seed)
    finetune(arch, task, recipe.epochs, lr_after or recipe.lr, recipe.batch_size, recipe.seed,
             mixed_precision=recipe.mixed_precision)
    return Outcome(merge_lora(arch), imp, ranking_stability(derivatives, recipe.normalize))


def prune_and_keep(arch, task, recipe, whole=False):
    "Prune-LoRA with one adapter that lives through the pruning, of the same rank in every layer"
    settings = dict(batch_size=recipe.batch_size, mixed_precision=recipe.mixed_precision)
    add_dsee(arch, recipe.r, 0, recipe.targets, lora_alpha=recipe.lora_alpha, train=recipe.train, seed=recipe.seed)
    finetune(arch, task, recipe.epochs * recipe.warm_up, recipe.lr, seed=recipe.seed, **pace(recipe, whole), **settings)
    derivatives, imp = measured(arch, task, recipe)
    prune_adapted_heads(arch, select_heads(imp, keep=recipe.keep))
    finetune(arch, task, recipe.epochs * (1 - recipe.warm_up), rate_after(recipe, whole), seed=recipe.seed + 1000,
             **settings)
    return Outcome(merge_dsee(arch), imp, ranking_stability(derivatives, recipe.normalize))


def run(cell, data_dir, cache):
    "Carry out one cell"
    torch.manual_seed(cell.seed)
    task = load_task(cell.task, data_dir=data_dir, partial=True)
    recipe, asked = recipe_of(cell), choices(cell.setting)
    part = cell.method in ('explore', 'large') or cell.method.startswith('tune')
    task, cache = slice_of(task) if part else task, Path(cache) / ('part' if part else 'whole')
    if cell.method == 'large':
        task = replace(at_most(task, ROWS), validation=task.validation.select(range(min(SCORED, len(task.validation)))))
    rest, teacher = recipe, TEACHERS.get(cell.method, asked.get('teacher'))
    keeps, whole = 'kept' in (cell.method, asked.get('adapter')), asked.get('schedule') == 'whole'
    if not keeps and recipe.method == 'prune-lora' and recipe.warm_up and recipe.iterative_steps == 1:
        arch = warmed(task, recipe, cache, whole)
        rest = replace(recipe, epochs=recipe.epochs * (1 - recipe.warm_up), warm_up=0, lr=rate_after(recipe, whole))
    else:
        arch = Arch.from_pretrained('minilm', task, recipe.seed)
    extra = {}
    if teacher:
        model = taught(task, recipe, cache) if teacher == 'lora' else arch.clone()
        extra = {'teacher': teacher, 'weight': asked.get('weight') or best_weight(teacher),
                 'teacher_steps': steps_of(model) if teacher == 'lora' else 0}
        outcome = prune_and_distill(arch, task, rest, model, extra['weight'])
    elif any(name in asked for name in AFTER):
        outcome = prune_and_adapt(arch, task, rest, **{name: asked[name] for name in AFTER if name in asked})
    elif keeps:
        outcome = prune_and_keep(arch, task, rest, whole)
    else:
        outcome = recipe_methods[rest.method](arch, task, rest, False)
    return {**answers(outcome.arch, task), 'recipe': asdict(recipe), 'steps': steps_of(outcome.arch), **extra,
            'stability': outcome.stability,
            'importance': None if outcome.importance is None else outcome.importance.nan_to_num(-1).tolist(),
            'kept': [a.n_heads for a in outcome.arch.attns], 'params': count_params(outcome.arch)['params'],
            'flops': count_flops(outcome.arch), 'rows': {'train': len(task.train), 'validation': len(task.validation)},
            'partial': task.partial, 'loss': [row['loss'] for h in outcome.arch.history for row in h.get('log', [])]}


@call_parse
@delegates(run_script, but='prepare')
def main(
    data_dir: str = '',                  # Folder with <task>/train.parquet and validation.parquet
    tasks: str = 'mrpc,rte,cola',        # Tasks, with commas
    seeds: int = 2,                      # Seeds 0, 1, ...
    stage: str = 'grid',                 # 'grid' (the comparison), 'tune', 'explore', 'schedule', 'large', 'longer' ...
    **kwargs,
):
    "Run the cells that are missing"
    need_data('prune_lora', data_dir, kwargs)
    asked = listed('prune_lora', 'tasks', tasks, EPOCHS), range(seeds)
    cells = cells_of('prune_lora', stage, {
        'grid': lambda: grid(*asked), 'tune': tuning_grid, 'explore': lambda: exploring_grid(range(seeds)),
        'schedule': lambda: schedule_grid(range(seeds)), 'large': large_grid, 'longer': lambda: longer_grid(*asked),
        'tune-distill': distill_tuning_grid, 'distill': lambda: distill_grid(*asked)})
    run_script(cells, partial(run, data_dir=data_dir), FOLDER, **kwargs)
