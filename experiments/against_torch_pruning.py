"""Heads and neurons removed by tpa_nb and by Torch-Pruning, at equal measured latency.

    pip install torch-pruning
    python experiments/against_torch_pruning.py --data_dir DATA

Every system prunes the same MiniLM, which was warmed up by LoRA, until a forward pass takes the same share of the
unpruned model's CPU time: measured, the two models in turns on one batch. Then all its weights are fine-tuned, for as
many steps. First, for each system alike, its ways to choose (by the loss right after pruning) and learning rates (by
the score after recovery) are tried on a held-out slice of MRPC's training rows.

Torch-Pruning (VainF/Torch-Pruning, 1.6) is used as its own example for BERT uses it: heads and channels in one global
ranking. `tp-width` is that example, which cuts the width of the residual stream too; `tp-taylor` and `tp-magnitude`
leave the width alone, so that heads and neurons go as they do here. The script does not bear the package's name,
which it imports. Each cell leaves a file in experiments/results/torch_pruning; nbs/results/torch_pruning.ipynb draws
what exists.
"""
import copy
import statistics
import time
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from prune_lora import EPOCHS, WARM_UP, best_rate, warmed
from shared import answers, known_words, listed, need_data, slice_of

from tpa_nb.arch import Arch
from tpa_nb.budget import prune_within, select_within, structure_importance
from tpa_nb.compress import Recipe
from tpa_nb.profile import count_flops, count_params, latency_together
from tpa_nb.runner import Cell, missing_cells, read_cells, run_script
from tpa_nb.tasks import load_task
from tpa_nb.train import evaluate_model, finetune

FOLDER = Path(__file__).parent / 'results' / 'torch_pruning'
RATES = (1e-4, 3e-4)
RECOVERY = {'rte': 2, 'mrpc': 1.5}  # passes over the training rows, all systems
LATENCIES = (50, 75)        # per cent of the unpruned model's time
BATCH, LENGTH = 8, 128      # what a forward pass is timed on
CALIBRATION, TOLERANCE, ROUND_TO = 512, 0.02, 64
_SHARES = [{'head_share': s} for s in (1.0, 0.5)]  # ratio of heads that go, by the ratio of channels that go
_TAYLOR = [{**share, 'multivariable': m} for share in _SHARES for m in (False, True)]
SYSTEMS = {'tpa': [{'add': 'squares'}, {'add': 'absolute'}], 'tp-taylor': _TAYLOR, 'tp-width': _TAYLOR,
           'tp-magnitude': _SHARES}


def tuning_grid(systems):
    "Cells that try ways to choose, and learning rates"
    return [Cell('mrpc', f'tune-{system}', f'latency={LATENCIES[0]}') for system in systems]


def grid(systems, tasks, seeds, latencies):
    "Cells of the comparison, what decides first"
    return [Cell(task, system, f'latency={latency}', seed)
            for latency, seed, task, system in product(latencies, seeds, tasks, systems)]


def load_torch_pruning():
    "The package, or one clear error"
    try:
        import torch_pruning
        return torch_pruning
    except ImportError as e:
        raise SystemExit('against_torch_pruning.py: Torch-Pruning is missing; pip install torch-pruning') from e


def start_of(task, seed, cache, epochs):
    "The model that all systems prune: MiniLM after `epochs` passes as LoRA, merged"
    recipe = Recipe(warm_up=WARM_UP, epochs=epochs / WARM_UP, lr=best_rate('lora'), seed=seed,
                    train=('norm', 'head', 'pooler'), mixed_precision='bf16')
    return warmed(task, recipe, cache)


def measure(arch, system, task, seed):
    "Scores for tpa_nb, the mean gradient of the same rows for Torch-Pruning's Taylor scores, nothing for magnitudes"
    rows = task.calibration(CALIBRATION, seed)
    if system == 'tpa':
        return structure_importance(arch, rows)
    if system != 'tp-magnitude':
        arch.model.eval().zero_grad()
        for batch in rows.batches(arch.tokenizer, 32):
            (arch.model(**batch).loss * len(batch['labels']) / len(rows)).backward()
    return None


def attentions(model):
    "Modules that remember their number of heads"
    return [m for m in model.modules() if hasattr(m, 'num_attention_heads') and hasattr(m, 'query')]


def cut_by_torch_pruning(arch, system, ratio, head_share=1.0, multivariable=False):
    "A copy without `ratio` of the channels and `ratio * head_share` of the heads"
    tp, model = load_torch_pruning(), copy.deepcopy(arch.model).eval()
    for p, q in zip(arch.model.parameters(), model.parameters()):
        q.grad = None if p.grad is None else p.grad.clone()  # a copy of a model has no gradients
    heads = {p: m.num_attention_heads for m in attentions(model) for p in (m.query, m.key, m.value)}
    fixed = [model.classifier, model.bert.pooler]
    if system != 'tp-width':  # what writes to the residual stream stays as wide as it is
        fixed += [m for layer in model.bert.encoder.layer for m in (layer.attention.output.dense, layer.output.dense)]
    importance = tp.importance.GroupMagnitudeImportance(p=2) if system == 'tp-magnitude' else \
        tp.importance.GroupTaylorImportance(multivariable=multivariable)
    inputs = {k: torch.ones(2, 16, dtype=torch.long) for k in ('input_ids', 'attention_mask')}
    pruner = tp.pruner.BasePruner(
        model, {**inputs, 'token_type_ids': 0 * inputs['input_ids']}, importance=importance, global_pruning=True,
        pruning_ratio=ratio, num_heads=heads, prune_num_heads=True, prune_head_dims=False, round_to=ROUND_TO,
        head_pruning_ratio=ratio * head_share, ignored_layers=fixed, output_transform=lambda out: out.logits.sum())
    for group in pruner.step(interactive=True):
        group.prune()
    for m in attentions(model):  # what the user has to mend
        m.num_attention_heads, m.all_head_size = pruner.num_heads[m.query], m.query.out_features
        if m.num_attention_heads < 1:
            raise ValueError('an attention has lost all heads')
        m.attention_head_size = m.all_head_size // m.num_attention_heads
    model.zero_grad()
    return Arch(model, arch.tokenizer)


def at_flops(arch, system, scores, share, **way):
    "A copy of `arch` that costs `share` of its FLOPs"
    whole = count_flops(arch, BATCH, LENGTH)
    if system == 'tpa':
        work = arch.clone()
        return prune_within(work, select_within(work, *scores, flops=share * whole, batch_size=BATCH, seq_len=LENGTH,
                                                round_to=ROUND_TO, **way))
    ratio, best = 1 - share, None
    for _ in range(4):  # nearly a straight line through (0, 1)
        found = cut_by_torch_pruning(arch, system, ratio, **way)
        left = count_flops(found, BATCH, LENGTH) / whole
        best = min((best or (abs(left - share), found)), (abs(left - share), found), key=lambda pair: pair[0])
        if best[0] < TOLERANCE / 4:
            break
        ratio = min(0.95, ratio * (1 - share) / (1 - left)) if left < 1 else 2 * ratio
    return best[1]


def timed(arch, pruned, repeats):
    "Median ratio of CPU times of neighbouring passes"
    times = latency_together({'dense': arch, 'pruned': pruned}, BATCH, LENGTH, repeats, 1, clock=time.process_time)
    return statistics.median(p / d for p, d in zip(times['pruned'].times, times['dense'].times))


def at_latency(arch, system, scores, goal, **way):
    "A copy of `arch` that takes `goal` of its time, and what was tried on the way: shares of FLOPs and of time"
    share, tried, best = goal, [], None
    for _ in range(4):
        pruned = at_flops(arch, system, scores, share, **way)
        ratio = timed(arch, pruned, 7)
        tried.append((share, ratio))
        best = min((best or (abs(ratio - goal), pruned)), (abs(ratio - goal), pruned), key=lambda pair: pair[0])
        if best[0] <= TOLERANCE:
            break
        share = min(0.98, max(0.1, share + goal - ratio))
    return best[1], tried


def at_latency_any(arch, system, scores, goal, ways):
    "`at_latency` by the first of `ways` that leaves every attention a head"
    for way in ways:
        try:
            return (*at_latency(arch, system, scores, goal, **way), way)
        except ValueError as e:
            if 'lost all heads' not in str(e):
                raise
    raise ValueError(f'no way of {system} leaves every attention a head')


def rank_ways(arch, system, scores, goal, task):
    "Ways to choose, the best right after pruning first, with the score and the loss of each; without those that fail"
    found = []
    for way in SYSTEMS[system]:
        try:
            said = evaluate_model(at_flops(arch, system, scores, goal, **way), task)
        except ValueError as e:
            if 'lost all heads' not in str(e):
                raise
            continue
        found.append({'way': way, 'loss': said['loss'], 'score': said[task.main_metric]})
    return sorted(found, key=lambda f: f['loss'])


def recover(pruned, task, lr, seed):
    "Fine-tune all weights"
    return finetune(pruned, task, RECOVERY[task.name], lr, seed=seed, mixed_precision='bf16', progress=False)


def tune(system, goal, task, cache):
    "Try ways to choose by the loss after pruning, and learning rates by the score after recovery, on a slice"
    task = slice_of(task)
    arch = start_of(task, 0, Path(cache) / 'part', 1)
    scores = measure(arch, system, task, 0)
    ways = rank_ways(arch, system, scores, goal, task)
    pruned, tried, way = at_latency_any(arch, system, scores, goal, [w['way'] for w in ways])
    found = {}
    for lr in RATES:
        said = evaluate_model(recover(pruned.clone(), task, lr, 0), task)
        found[f'{lr:.0e}'] = {'score': said[task.main_metric], 'loss': said['loss']}
    return {'ways': ways, 'way': way, 'rates': found, 'tried': tried, 'metric': task.main_metric}


@lru_cache
def tuned(system):
    "Ways to choose, best first, and the learning rate with the best score on the slice"
    found = [c['result'] for c in read_cells(FOLDER) if c['method'] == f'tune-{system}']
    if not found:
        raise ValueError(f'{system} has not been tuned; run --stage tune first')
    rates = found[0]['rates']
    best = max(rates, key=lambda lr: (rates[lr]['score'], -rates[lr]['loss']))
    return [w['way'] for w in found[0]['ways']], float(best)


def run(cell, data_dir, cache):
    "Carry out one cell"
    torch.manual_seed(cell.seed)
    task, goal = load_task(cell.task, data_dir=data_dir), int(cell.setting.removeprefix('latency=')) / 100
    if cell.method.startswith('tune-'):
        return tune(cell.method.removeprefix('tune-'), goal, task, cache)
    ways, lr = tuned(cell.method)
    arch = start_of(task, cell.seed, Path(cache) / 'whole', EPOCHS[cell.task] * WARM_UP)
    pruned, tried, way = at_latency_any(arch, cell.method, measure(arch, cell.method, task, cell.seed), goal, ways)
    cut = answers(pruned, task)
    found = {'start': evaluate_model(arch, task)[task.main_metric], 'dense_flops': count_flops(arch, BATCH, LENGTH),
             'pruned': cut[task.main_metric], 'pruned_answers': cut['answers'], 'tried': tried, 'way': way,
             'heads': [a.n_heads for a in pruned.attns], 'neurons': [f.d_ff for f in pruned.ffns],
             'width': pruned.attns[0].q.in_features, 'flops': count_flops(pruned, BATCH, LENGTH),
             'params': count_params(pruned)['params'], 'dense_params': count_params(arch)['params']}
    recover(pruned, task, lr, cell.seed)
    return {**answers(pruned, task), **found, 'latency': timed(arch, pruned, 15), 'lr': lr,
            'epochs': RECOVERY[task.name], 'warm_up': EPOCHS[task.name] * WARM_UP, 'batch': [BATCH, LENGTH],
            'steps': pruned.history[-1]['steps'],
            'rows': {'train': len(task.train), 'validation': len(task.validation)},
            'torch_pruning': None if cell.method == 'tpa' else version('torch-pruning')}


@call_parse
@delegates(run_script, but=['prepare', 'threads'])
def main(
    data_dir: str = '',                  # Folder with <task>/train.parquet and validation.parquet
    systems: str = 'tpa,tp-taylor',      # Of tpa, tp-taylor, tp-width, tp-magnitude, with commas
    tasks: str = 'mrpc,rte',             # Tasks, with commas
    seeds: str = '0,1',                  # Seeds, with commas
    latencies: str = '50',               # Per cent of the unpruned model's time, with commas
    stage: str = 'all',                  # 'tune' (ways to choose and learning rates), 'grid' (the comparison) or 'all'
    **kwargs,
):
    "Run the cells that are missing"
    names = listed('against_torch_pruning', 'systems', systems, SYSTEMS)
    known_words('against_torch_pruning', 'stage', [stage], ('tune', 'grid', 'all'))
    need_data('against_torch_pruning', data_dir, kwargs)
    cells = tuning_grid(names) if stage in ('tune', 'all') else []
    if stage in ('grid', 'all'):
        cells += grid(names, tasks.split(','), list(map(int, seeds.split(','))), list(map(int, latencies.split(','))))
    if kwargs.get('jobs', 1) > 1 and stage == 'all' and missing_cells(tuning_grid(names), FOLDER):
        raise SystemExit('against_torch_pruning.py: the comparison waits for what tuning finds; run --stage tune first')
    if not kwargs.get('dry_run') and any(name != 'tpa' for name in names):
        load_torch_pruning()
    # one thread each: CPU time of several holds what they wait for each other
    run_script(cells, partial(run, data_dir=data_dir), FOLDER, threads=1, **kwargs)
