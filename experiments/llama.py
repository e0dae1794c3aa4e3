"""Heads and neurons of a real Llama: perplexity after pruning, and after recovery by LoRA.

    python experiments/llama.py --model_dir MODEL --stage tune
    python experiments/llama.py --model_dir MODEL --jobs 2

MODEL is a Llama checkpoint with its tokenizer; the stored results are those of stories260K, a model of 260,032
parameters trained on short stories. The text is of its own kind: stories that the unpruned model writes, sampled at
temperature 1. Training stories serve importance, compensation and recovery; the validation stories are read for the
scores alone.
Each cell leaves a file in experiments/results/llama; nbs/results/llama.ipynb draws what exists.
"""
import json
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from shared import cells_of, choices, need, steps_of

from tpa_nb.arch import Arch
from tpa_nb.compensate import compensate
from tpa_nb.importance import head_importance, neuron_importance
from tpa_nb.lora import add_lora, merge_lora
from tpa_nb.profile import count_flops, count_params
from tpa_nb.prune import prune_heads, prune_neurons, select_heads, select_neurons
from tpa_nb.runner import Cell, read_cells, run_script
from tpa_nb.text import text_task
from tpa_nb.train import evaluate_model, finetune

FOLDER = Path(__file__).parent / 'results' / 'llama'
RATIOS = (10, 30, 50, 20, 40)  # per cent of heads, of neurons, or of each
KINDS = ('heads', 'heads-within', 'neurons', 'both')
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
N_TRAIN, N_VALIDATION, LENGTH, EPOCHS, BATCH, RANK = 1500, 300, 160, 4, 16, 8
TARGETS = ('q', 'k', 'v', 'o', 'up', 'gate', 'down')


def tuning_grid():
    "Learning rates of the recovery, scored on held-out training stories"
    return [Cell('stories', 'tune', f'ratio=30,lr={lr:.0e}') for lr in RATES]


def grid(seeds):
    "What goes, how much of it, chosen how"
    found = [Cell('stories', 'none', seed=seed) for seed in seeds]
    for seed, ratio, kind in product(seeds, RATIOS, KINDS):
        found += [Cell('stories', kind, f'ratio={ratio}', seed)]
        if kind != 'heads-within':
            found += [Cell('stories', f'{kind}-random', f'ratio={ratio}', seed)]
        found += [Cell('stories', f'{kind}-compensated', f'ratio={ratio}', seed)]
    return found


def write_stories(arch, n, seed):
    "`n` texts that the model writes, with the tokens that begin and end them left out"
    torch.manual_seed(seed)
    start, texts = torch.full((50, 1), arch.tokenizer.bos_token_id), []
    while len(texts) < n:
        ids = arch.model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=LENGTH, do_sample=True,
                                  top_k=0, top_p=1.0, temperature=1.0)
        texts += [t.strip() for t in arch.tokenizer.batch_decode(ids, skip_special_tokens=True) if len(t.split()) > 20]
    return texts[:n]


@lru_cache
def stories(model_dir, cache):
    "The task; its stories are written once"
    file = Path(cache) / 'stories.json'
    if not file.exists():
        arch = Arch.from_pretrained(model_dir)
        texts = write_stories(arch, N_TRAIN + N_VALIDATION, seed=0)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(texts))
    texts = json.loads(file.read_text())
    return text_task('stories', texts[:N_TRAIN], texts[N_TRAIN:], max_length=LENGTH, source='written by the model')


def cut(arch, task, kind, ratio, how, seed):
    "Remove a share of heads, neurons or both, by importance or at random; what stays may take over"
    few = task.calibration(256, seed)
    heads, neurons = head_importance(arch, few), neuron_importance(arch, few)
    if how == 'random':
        gen = torch.Generator().manual_seed(seed)
        heads, neurons = torch.rand(heads.shape, generator=gen), [torch.rand(len(n), generator=gen) for n in neurons]
    if kind in ('heads', 'heads-within', 'both'):
        gone = select_heads(heads, pruning_ratio=ratio, group_size=arch.group_size,
                            within_groups=kind == 'heads-within')
        prune_heads(compensate(arch, few, heads=gone) if how == 'compensated' else arch, gone)
    if kind in ('neurons', 'both'):
        gone = select_neurons(neurons, pruning_ratio=ratio, round_to=4)
        prune_neurons(compensate(arch, few, neurons=gone) if how == 'compensated' else arch, gone)


def recover(arch, task, lr, seed):
    "Train LoRA on every projection and merge it"
    add_lora(arch, r=RANK, targets=TARGETS, seed=seed)
    return merge_lora(finetune(arch, task, EPOCHS, lr, BATCH, seed))


@lru_cache
def best_rate():
    "The learning rate with the lowest perplexity on held-out training stories"
    done = {c['setting']: c['result']['recovered'] for c in read_cells(FOLDER) if c['method'] == 'tune'}
    found = {lr: done.get(f'ratio=30,lr={lr:.0e}') for lr in RATES}
    if None in found.values():
        raise ValueError('learning rates have not been tried; run --stage tune first')
    return min(found, key=found.get)


def run(cell, model_dir, cache):
    "Carry out one cell"
    task, arch = stories(model_dir, cache), Arch.from_pretrained(model_dir)
    asked = choices(cell.setting)
    ratio, score = asked.get('ratio', 0) / 100, lambda: evaluate_model(arch, task)['perplexity']
    if cell.method == 'tune':
        train, held = task.split(0.2, 0)
        task = text_task('stories', train.rows['text'][:], held.rows['text'][:], max_length=LENGTH)
    how = next((how for how in ('random', 'compensated') if cell.method.endswith(f'-{how}')), 'importance')
    kind = cell.method.removesuffix(f'-{how}')
    found = {'unpruned': score(), 'dense_params': count_params(arch)['params'],
             'dense_flops': count_flops(arch, 1, LENGTH)}
    if kind != 'none':
        cut(arch, task, 'both' if kind == 'tune' else kind, ratio, how, cell.seed)
    found |= {'pruned': score(), 'params': count_params(arch)['params'], 'flops': count_flops(arch, 1, LENGTH),
              'heads': [a.n_heads for a in arch.attns], 'kv_heads': [a.n_kv_heads for a in arch.attns],
              'd_ff': [f.d_ff for f in arch.ffns]}
    recover(arch, task, asked['lr'] if kind == 'tune' else best_rate(), cell.seed)
    start = torch.tensor([[arch.tokenizer.bos_token_id]])
    text = arch.model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=60, do_sample=False)
    return {**found, 'recovered': score(), 'greedy': arch.tokenizer.decode(text[0], skip_special_tokens=True),
            'recipe': dict(rank=RANK, targets=TARGETS, epochs=EPOCHS, batch_size=BATCH, calibration=256,
                           lr=asked['lr'] if kind == 'tune' else best_rate(), max_length=LENGTH),
            'rows': {'train': len(task.train), 'validation': len(task.validation)},
            'steps': steps_of(arch)}


@call_parse
@delegates(run_script, but='prepare')
def main(
    model_dir: str = '',                 # Folder of a Llama with its tokenizer
    seeds: int = 2,                      # Seeds 0, 1, ...
    stage: str = 'grid',                 # 'tune' (learning rates) or 'grid'
    **kwargs,
):
    "Run the cells that are missing"
    need('llama', 'model_dir', model_dir, 'a folder with a Llama checkpoint and its tokenizer', kwargs)
    cells = cells_of('llama', stage, {'tune': tuning_grid, 'grid': lambda: grid(range(seeds))})
    run_script(cells, partial(run, model_dir=model_dir), FOLDER, partial(stories, model_dir), **kwargs)
