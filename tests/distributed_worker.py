"""Trains tiny models and writes down what happened; `test_distributed.py` runs it alone and as two processes.

`distributed_worker.py FOLDER CASE ...` writes `FOLDER/CASE-PROCESSES-RANK.safetensors` and `.json`.
"""
import contextlib
import importlib
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, Value
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tpa_nb.distill import Distillation
from tpa_nb.families import tiny_arch
from tpa_nb.lora import add_lora, merge_lora
from tpa_nb.save import load_model, save_model
from tpa_nb.tasks import Correlation, toy_pairs
from tpa_nb.train import evaluate_model, finetune, make_trainer, predict, zero_config

RANK, PROCESSES = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
BATCH = 8  # rows of a step, all processes together


def model(family='bert', **config):
    "A tiny model without dropout"
    return tiny_arch(family, **{'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0, **config})


def pairs(n_train=40, n_validation=30, max_length=40):
    return toy_pairs(n_train=n_train, n_validation=n_validation).with_max_length(max_length)


def numbers():
    "The labels as a number to predict"
    task = pairs()
    train, validation = (d.cast_column('label', Value('float32')) for d in (task.train, task.validation))
    return replace(task, train=train, validation=validation, label_names=None, metric=Correlation(),
                   main_metric='pearson')


def uneven(n=240):
    "Rows, all different, of 5 to 90 letters: training groups them by length"
    task = pairs(n, max_length=100)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 86, (n,), generator=draw).tolist()
    rows = task.train.remove_columns(['sentence1', 'sentence2']).add_column('sentence1', [f'{i:03}' for i in range(n)])
    return replace(task, train=rows.add_column('sentence2', ['x' * k for k in lengths]))


@contextlib.contextmanager
def watched(arch, found):
    "Note the gradients of the first step, and the tokens of the rows that every training batch of this process holds"
    names = {id(p): n for n, p in arch.model.named_parameters()}
    rows = found.setdefault('rows', [])

    def look(optimizer, args, kwargs):
        params = [p for group in optimizer.param_groups for p in group['params'] if id(p) in names]
        found.setdefault('gradients', {names[id(p)]: p.grad.clone() for p in params if p.grad is not None})

    def read(module, args, kwargs):
        if module.training:
            rows.append([ids[mask.bool()].tolist() for ids, mask in zip(kwargs['input_ids'], kwargs['attention_mask'])])

    hooks = [register_optimizer_step_pre_hook(look), arch.model.register_forward_pre_hook(read, with_kwargs=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train(arch, task, accumulate=1, **kwargs):
    "Fine-tune in steps of `BATCH` rows, without clipping; gradients, rows, losses, weights"
    found = {}
    settings = dict(epochs=2, batch_size=BATCH // PROCESSES // accumulate, max_grad_norm=0.0, lr=1e-3,
                    gradient_accumulation_steps=accumulate)
    with watched(arch, found):
        finetune(arch, task, **{**settings, **kwargs})
    weights = {n: p.detach().clone() for n, p in arch.model.named_parameters() if p.requires_grad}
    history = {k: v for k, v in arch.history[-1].items() if k != 'seconds'}
    return {**found, 'weights': weights, 'history': history, 'validation': evaluate_model(arch, task)}


def texts(kind, n=32):
    "Rows of random tokens, as unlike in length as in number of labels"
    draw, rows = torch.Generator().manual_seed(0), []
    for length in torch.randint(4, 30, (n,), generator=draw).tolist():
        ids = torch.randint(5, 261, (length,), generator=draw).tolist()
        rows.append({'input_ids': ids, 'attention_mask': [1] * length,
                     'labels': [i % 2 for i in ids] if kind == 'token_cls' else ids})
    return Dataset.from_list(rows)


def padded(rows):
    "A batch of `texts`"
    n = max(len(row['input_ids']) for row in rows)
    fill = {'input_ids': 0, 'attention_mask': 0, 'labels': -100}
    return {k: torch.tensor([row[k] + [v] * (n - len(row[k])) for row in rows]) for k, v in fill.items()}


def tokens(family, kind, accumulate=1, **config):
    "Train on a label for every token, with `make_trainer` alone"
    arch, task, found = tiny_arch(family, task_type=kind, **config), pairs(), {}
    object.__setattr__(task, 'task_type', kind)  # its rows are exchanged for `texts` below
    trainer = make_trainer(arch, task, batch_size=BATCH // PROCESSES // accumulate, max_grad_norm=0.0, max_steps=2,
                           gradient_accumulation_steps=accumulate, train_sampling_strategy='sequential')
    trainer.train_dataset, trainer.data_collator = texts(kind), padded
    with watched(arch, found):
        trainer.train()
    return found


def stopped(folder):
    "Early stopping without an `output_dir`; the best epoch comes back in every process"
    task, arch = pairs(64), model()
    found = train(arch, task, epochs=8, lr=0.05, early_stopping=2, holdout=0.25)
    return {**found, 'best': evaluate_model(arch, task, task.split(0.25, 0)[1])['accuracy']}


def scores(folder):
    "Logits and scores of sets that two processes cannot share evenly, for a class and for a number"
    found, arch = {}, model()
    for n in (5, 30):
        task = pairs(8, n)
        found |= {f'logits of {n}': predict(arch, task, batch_size=4), f'scores of {n}': evaluate_model(arch, task)}
    return found


def written(folder):
    "Checkpoints, a bar and a saved model, all from the first process"
    folder.mkdir(exist_ok=True)
    arch, shown = add_lora(model(), r=2), io.StringIO()
    with contextlib.redirect_stderr(shown):
        train(arch, pairs(), output_dir=folder/'checkpoints', progress=True, title='training the tiny model')
    if PartialState().is_main_process:
        save_model(arch, folder/'model')
    PartialState().wait_for_everyone()
    loaded = load_model(folder/'model')
    weights = {n: p.detach().clone() for n, p in arch.model.named_parameters()}
    same = all(torch.equal(p, weights[n]) for n, p in loaded.model.named_parameters())
    return {'bar': 'training the tiny model' in shown.getvalue(), 'same': same, 'weights': weights}


def zero(stage, arch, **kwargs):
    "Train under ZeRO, then go on with the model that came back"
    backend = importlib.import_module('deepspeed.comm.torch')
    backend.build_shm_op = lambda: None  # a faster way to talk, which a C++ compiler would take a minute to build
    found = train(arch, pairs(), deepspeed=zero_config(stage), **kwargs)
    found['plain'] = all(type(p) is torch.nn.Parameter and not hasattr(p, 'ds_id') for p in arch.model.parameters())
    if arch.is_adapted:
        merge_lora(arch)
    again = evaluate_model(finetune(arch.clone(), pairs(), epochs=1, batch_size=4), pairs())
    return {**found, 'merged': evaluate_model(arch, pairs()), 'again': again}


def distilled(student, **kwargs):
    "Learn from a teacher as well"
    loss = Distillation(student, model(seed=1), pairs(), **kwargs)
    found = train(student, pairs(), added=[loss], **SGD)
    return {**found, 'maps': [p.tolist() for p in loss.parameters()]}


SGD = dict(optim='sgd', lr=0.05)  # Adam turns gradients that are zero but for rounding into whole steps
CASES = {
    'full': lambda folder: train(model(), pairs(), **SGD),
    'lora': lambda folder: train(add_lora(model(), r=2), pairs()),
    'accumulated': lambda folder: train(model(), pairs(), accumulate=2, **SGD),
    'checkpointing': lambda folder: train(add_lora(model(), r=2), pairs(), gradient_checkpointing=True),
    'decoder': lambda folder: train(add_lora(tiny_arch('llama'), r=2), pairs()),
    'number': lambda folder: train(model(num_labels=1, problem_type='regression'), numbers(), optim='sgd', lr=0.01),
    'causal_lm': lambda folder: tokens('llama', 'causal_lm'),
    'seq_2_seq_lm': lambda folder: tokens('t5', 'seq_2_seq_lm', dropout_rate=0.0),
    'token_cls': lambda folder: tokens('llama', 'token_cls', classifier_dropout=0.0),
    'causal_lm in halves': lambda folder: tokens('llama', 'causal_lm', accumulate=2),
    'token_cls in halves': lambda folder: tokens('llama', 'token_cls', accumulate=2, classifier_dropout=0.0),
    'distilled': lambda folder: distilled(model(), cache_dir=folder),
    'narrow': lambda folder: distilled(model(hidden_size=16), distill_weight=0.1),
    'grouped': lambda folder: train(tiny_arch('bert'), uneven()),
    'stopped': stopped,
    'scores': scores,
    'written': written,
    'zero 2': lambda folder: zero(2, model(), **SGD),
    'zero 3': lambda folder: zero(3, add_lora(model(), r=2)),
}


def write(found, stem):
    "Tensors to a safetensors file, the rest to JSON"
    tensors = {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}
    for part in ('gradients', 'weights'):
        tensors |= {f'{part}/{n}': p for n, p in found.pop(part, {}).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, f'{stem}.safetensors')
    Path(f'{stem}.json').write_text(json.dumps({k: v for k, v in found.items() if k not in tensors}))


if __name__ == '__main__':
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for case in sys.argv[2:]:
        write(CASES[case](out/f'{case}-{PROCESSES}'), out/f'{case}-{PROCESSES}-{RANK}')
