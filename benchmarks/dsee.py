"""Time training steps of DSEE against LoRA's at equal rank, and count what each keeps.

The models run in turns on the same batch, in an order that is turned round each time; a ratio is the median over
neighbouring steps. 'dsee' has the sparse residual; 'weight' has masks of the paper's form besides, 'merged' masks under
which a merge is exact; 'lora again' shows the noise of the measurement. Everything trains with the same optimiser.

    python benchmarks/dsee.py --threads 1 --clock cpu --out benchmarks/results/dsee.json
"""
import statistics
from functools import partial

import torch
from common import CLOCKS, command_line, command_of, in_turns, prepare_timing, timing_options, write
from transformers import AutoConfig, AutoModelForSequenceClassification

from tpa_nb.arch import Arch
from tpa_nb.dsee import add_dsee
from tpa_nb.lora import add_lora, n_trainable
from tpa_nb.masks import mask_from_update
from tpa_nb.profile import provenance

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
    sync = torch.cuda.synchronize if args.device == 'cuda' else lambda: None
    steps = {name: partial(step, models[name], optimizers[name], batch) for name in models}
    times = in_turns(steps, args.repeats, args.warmup, CLOCKS[args.clock], sync=sync)
    for name in models:
        ratios = [a / b for a, b in zip(times[name], times['lora'])]
        low, _, high = statistics.quantiles(ratios, n=4)
        yield {'model': name, 'ms': 1e3 * statistics.median(times[name]), 'ratio': statistics.median(ratios),
               'ratio_quartiles': [low, high], **kept(models[name], optimizers[name])}


def parse(argv=None):
    "The command line"
    p = command_line(__doc__)
    p.add_argument('--models', nargs='+', default=list(MODELS), choices=MODELS, help="'lora' must be the first")
    p.add_argument('--width', type=int, default=768)
    p.add_argument('--layers', type=int, default=4, help='a layer more adds the same to every model')
    p.add_argument('--r', type=int, default=16)
    p.add_argument('--n_sparse', type=int, default=16)
    p.add_argument('--batch_size', type=int, default=8)
    p.add_argument('--seq_len', type=int, default=128)
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    timing_options(p, repeats=15, warmup=2)
    return p.parse_args(argv)


def main(argv=None):
    "Run, print and write"
    args = parse(argv)
    prepare_timing(args)
    settings = {k: v for k, v in vars(args).items() if k != 'out'}
    found = {'command': command_of('dsee', argv, args.out), 'settings': settings, 'provenance': dict(provenance()), 'rows': list(measure(args))}
    for row in found['rows']:
        print('{model:>10}: {ms:8.1f} ms, {ratio:.3f} of LoRA, {trainable:,} trainable, {adapter_bytes:,} bytes'.format(
            **row))
    write(found, args.out)


if __name__ == '__main__':
    main()
