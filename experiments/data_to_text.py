"""DSEE on a model that writes: E2E by a small GPT-2, from nothing to a model with half of its weights at zero.

    python experiments/data_to_text.py --data_dir DATA --stage tune --jobs 2
    python experiments/data_to_text.py --data_dir DATA --jobs 2

There is no GPT-2 to be had offline, so a small one and its tokenizer are made here: it learns the language from the texts
of 12,000 of E2E's training rows, without the records. From there it learns to put records in words, for the same number
of steps in every way: by all weights, by LoRA, by low rank and a sparse residual, and by the latter with half of the
weights set to zero half-way. Every way trains in two halves, each with its own order and rise of the learning rate, so
that setting weights to zero between them is all that differs. The first command tries learning rates on held-out training
records. Scores are BLEU, NIST and TER on the validation records with all their references, by the LoRA paper's beam
search. This shows the path from end to end; it says nothing about a GPT-2 that has read the web.
"""
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from shared import cells_of, choices, kept, need_data, setting, slice_of, steps_of, zeros_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tpa_nb.arch import Arch
from tpa_nb.dsee import add_dsee, merge_dsee
from tpa_nb.generation import load_data_to_text, score_texts
from tpa_nb.lora import n_trainable
from tpa_nb.masks import mask_from_update
from tpa_nb.profile import count_params
from tpa_nb.runner import Cell, best_setting, read_cells, run_script
from tpa_nb.text import text_task
from tpa_nb.train import evaluate_model, finetune

FOLDER = Path(__file__).parent / 'results' / 'data_to_text'
SIZES = dict(n_positions=256, n_embd=192, n_layer=4, n_head=4)
VOCABULARY, LANGUAGE_LR, LANGUAGE_EPOCHS, EPOCHS, BATCH = 2000, 1e-3, 1, 2, 16
ROWS = 12_000  # training rows at most
RATES = {'full': (1e-3, 3e-3), 'adapter': (3e-3, 1e-2)}
RANK, SPARSE, TARGETS = 16, 64, ('q', 'v', 'o', 'up', 'down')
WAYS = ('full', 'lora', 'dsee', 'zeros')
HELD = 0.05    # share of the training records that learning rates are chosen on


def tuning_grid():
    "Cells that try learning rates"
    return [Cell('e2e', f'tune-{kind}', setting(lr=lr)) for kind, rates in RATES.items() for lr in rates]


def grid(tasks, seeds):
    "Cells of the comparison"
    return [Cell(task, way, seed=seed) for seed, task, way in product(seeds, tasks, WAYS)]


@lru_cache
def best_rate(kind):
    "The learning rate with the best BLEU on held-out training records"
    tried = [setting(lr=lr) for lr in RATES[kind]]
    return choices(best_setting(read_cells(FOLDER), f'tune-{kind}', tried, ('e2e',)))['lr']


def trained_tokenizer(texts):
    "Byte pairs as GPT-2's, learnt from `texts`"
    end = '<|endoftext|>'
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[end], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=end)


def language_model(task, seed):
    "A small GPT-2 that has read the training texts, without their records"
    texts, records = task.train['target'][:], task.train['source'][:]
    tokenizer = trained_tokenizer(texts + records)
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end, **SIZES)
    arch = Arch(GPT2LMHeadModel(config).eval(), tokenizer)
    n = len(texts) // 50
    language = text_task('texts', texts[n:], texts[:n], max_length=task.max_length, source=task.source)
    return finetune(arch, language, LANGUAGE_EPOCHS, LANGUAGE_LR, seed=seed, batch_size=BATCH, mixed_precision='bf16')


def learn(arch, task, way, lr, seed):
    "Learn to put records in words; how many parameters train"
    train = partial(finetune, arch, task, lr=lr, batch_size=BATCH, mixed_precision='bf16')
    if way != 'full':
        add_dsee(arch, RANK, 0 if way == 'lora' else SPARSE, TARGETS, train=('norm',), seed=seed)
    trainable = n_trainable(arch)
    train(epochs=EPOCHS / 2, seed=seed)
    if way == 'zeros':
        mask_from_update(arch, 0.5)
    train(epochs=EPOCHS / 2, seed=seed + 1000)
    if way != 'full':
        merge_dsee(arch)
    return trainable


def run(cell, data_dir, cache):
    "Carry out one cell"
    torch.manual_seed(cell.seed)
    task = load_data_to_text(cell.task, data_dir, n_train=ROWS)
    tuning = cell.method.startswith('tune-')
    task, cache = slice_of(task, HELD) if tuning else task, Path(cache) / ('part' if tuning else 'whole')
    arch = kept(cache / f'language-{cell.task}-{cell.seed}', partial(language_model, task, cell.seed))
    way = {'tune-full': 'full', 'tune-adapter': 'dsee'}.get(cell.method, cell.method)
    lr = choices(cell.setting).get('lr') or best_rate('full' if way == 'full' else 'adapter')
    trainable = learn(arch, task, way, lr, cell.seed)
    beams = dict(num_beams=1) if tuning else {}
    return {'metric': 'bleu', 'majority': 0.0, **score_texts(arch, task, progress=False, **beams),
            **evaluate_model(arch, task), 'lr': lr, 'trainable': trainable, 'zeros': zeros_of(arch),
            'params': count_params(arch)['params'], 'steps': steps_of(arch),
            'rows': {'train': len(task.train), 'validation': len(task.grouped())}}


@call_parse
@delegates(run_script, but='prepare')
def main(
    data_dir: str = '',                  # Folder with e2e_nlg/train.parquet and validation.parquet
    tasks: str = 'e2e',                  # 'e2e', 'webnlg', with commas
    seeds: int = 1,                      # Seeds 0, 1, ...
    stage: str = 'grid',                 # 'tune' (learning rates) or 'grid' (the comparison)
    **kwargs,
):
    "Run the cells that are missing"
    need_data('data_to_text', data_dir, kwargs)
    cells = cells_of('data_to_text', stage, {'tune': tuning_grid, 'grid': lambda: grid(tasks.split(','), range(seeds))})
    run_script(cells, partial(run, data_dir=data_dir), FOLDER, **kwargs)
