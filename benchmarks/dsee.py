"""Time training steps of DSEE against LoRA's at equal rank, and count what each keeps.

The models run in turns on the same batch, in an order that is turned round each time; a ratio is the median over
neighbouring steps. 'dsee' has the sparse residual; 'weight' has masks of the paper's form besides, 'merged' masks under
which a merge is exact; 'lora again' shows the noise of the measurement. Everything trains with the same optimiser.

    python benchmarks/dsee.py --threads 1 --clock cpu --out benchmarks/results/dsee.json
"""
import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from tpa_nb.arch import Arch
from tpa_nb.dsee import add_dsee
from tpa_nb.lora import add_lora, n_trainable
from tpa_nb.masks import mask_from_update
from tpa_nb.profile import provenance

CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
MODELS = ('lora', 'lora again', 'dsee', 'weight', 'merged')


def make(kind, args):
    "A BERT of the given size with the adapter `kind`, on the device"
    torch.manual_seed(0)
    config = AutoConfig.for_model('bert', hidden_size=args.width, num_hidden_layers=args.layers,
                                  num_attention_heads=args.width // 32, intermediate_size=4 * args.width, num_labels=2)
    arch = Arch(AutoModelForSequenceClassification.from_config(config).to(args.device))
    if kind.startswith('lora'):
        add_lora(arch, r=args.r, targets=('q', 'v'), lora_alpha=32)
    else:
        add_dsee(arch, r=args.r, n_sparse=args.n_sparse)
    if kind in ('weight', 'merged'):
        with torch.no_grad():
            for name, p in arch.model.named_parameters():
                if 'lora_B' in name or 'lora_S' in name:
                    p.normal_(std=0.01)
        mask_from_update(arch, 0.3, mask=kind)
    arch.model.train()
    return arch


def step(arch, optimizer, batch):
    "One training step"
    arch.model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed_steps(models, optimizers, batch, args):
    "Seconds of each step, by name"
    clock, times = CLOCKS[args.clock], {name: [] for name in models}
    sync = torch.cuda.synchronize if args.device == 'cuda' else lambda: None
    for i in range(-args.warmup, args.repeats):
        for name in (list(models) if i % 2 == 0 else reversed(models)):
            sync()
            start = clock()
            step(models[name], optimizers[name], batch)
            sync()
            if i >= 0:
                times[name].append(clock() - start)
    return times


def kept(arch, optimizer):
    "Numbers that train, numbers that the optimiser keeps for them, and bytes of the adapter on disk"
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.numel() > 1]
    adapter = [t for n, t in arch.model.state_dict().items() if '.lora_' in n]
    return {'trainable': n_trainable(arch), 'optimizer_numbers': sum(t.numel() for t in state),
            'adapter_bytes': sum(t.nbytes for t in adapter)}


def measure(args):
    "Rows of the table"
    models = {kind: make(kind, args) for kind in args.models}
    optimizers = {k: torch.optim.AdamW([p for p in a.model.parameters() if p.requires_grad], lr=1e-4)
                  for k, a in models.items()}
    ids = torch.randint(5, 3000, (args.batch_size, args.seq_len), generator=torch.Generator().manual_seed(0))
    batch = {'input_ids': ids.to(args.device), 'labels': (torch.arange(args.batch_size) % 2).to(args.device)}
    times = timed_steps(models, optimizers, batch, args)
    for name in models:
        ratios = [a / b for a, b in zip(times[name], times['lora'])]
        low, _, high = statistics.quantiles(ratios, n=4)
        yield {'model': name, 'ms': 1e3 * statistics.median(times[name]), 'ratio': statistics.median(ratios),
               'ratio_quartiles': [low, high], **kept(models[name], optimizers[name])}


def parse(argv=None):
    "The command line"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='+', default=list(MODELS), choices=MODELS, help="'lora' must be the first")
    p.add_argument('--width', type=int, default=768)
    p.add_argument('--layers', type=int, default=4, help='a layer more adds the same to every model')
    p.add_argument('--r', type=int, default=16)
    p.add_argument('--n_sparse', type=int, default=16)
    p.add_argument('--batch_size', type=int, default=8)
    p.add_argument('--seq_len', type=int, default=128)
    p.add_argument('--repeats', type=int, default=15, help='timed steps of each model')
    p.add_argument('--warmup', type=int, default=2, help='steps of each model before the clock starts')
    p.add_argument('--threads', type=int, default=None, help="CPU threads (default: torch's)")
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--clock', default='wall', choices=sorted(CLOCKS),
                   help='cpu: time of this process only, for a machine that others use too; take one thread then')
    p.add_argument('--out', type=Path, default=None, help='write the figures to this JSON file')
    return p.parse_args(argv)


def main(argv=None):
    "Run, print and write"
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {k: v for k, v in vars(args).items() if k != 'out'}
    found = {'command': shlex.join(['python', 'benchmarks/dsee.py', *(sys.argv[1:] if argv is None else argv)]),
             'settings': settings, 'provenance': dict(provenance()), 'rows': list(measure(args))}
    for row in found['rows']:
        print('{model:>10}: {ms:8.1f} ms, {ratio:.3f} of LoRA, {trainable:,} trainable, {adapter_bytes:,} bytes'.format(
            **row))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == '__main__':
    main()
