"""Time whole MoEfied T5 models, routers included, against the dense ones: Table 4 and Figure 1 of Tsai and Martin.

T5-small to T5-3B come from their configs with random weights. Every feed-forward layer becomes experts of `--expert_size`
neurons, of which `--share` runs for each token, chosen by an MLP router; a LoRA expert of 32 neurons is always on. Both
models run in turns on the same batch, encoder and decoder; a ratio is the median over neighbouring passes. The floor
counts FLOPs, routers and LoRA experts included.

    python benchmarks/whole_t5.py --device cuda --sizes small base large 3b --batch 64x128 --out FILE
    python benchmarks/whole_t5.py --sizes small base --batch 8x128 --threads 1 --clock cpu --out FILE
"""
import statistics

import torch
from common import CLOCKS, command_line, command_of, prepare_timing, shape, timing_options, write
from transformers import T5Config, T5ForConditionalGeneration

from tpa_nb.arch import Arch
from tpa_nb.bench import T5_SIZES
from tpa_nb.lora_expert import add_lora_expert, fold_lora_expert
from tpa_nb.moe import moefy, moes, set_router
from tpa_nb.profile import count_flops, count_params, latency_together, provenance
from tpa_nb.router import MLPRouter

ATTENTION = {'small': dict(num_heads=8), 'base': dict(num_heads=12), 'large': dict(num_heads=16),
             '3b': dict(num_heads=32, d_kv=128)}
SIZES = {name: dict(zip(('d_model', 'd_ff', 'num_layers'), T5_SIZES[name]), **heads) for name, heads in ATTENTION.items()}
PAPER = {'small': 1.348, 'base': 0.988, 'large': 0.858, '3b': 0.718}  # on an RTX 3090


def dense_t5(size, device, dtype):
    "A T5 with random weights"
    torch.manual_seed(0)
    config = T5Config(**SIZES[size], decoder_start_token_id=0)
    with torch.device(device):
        model = T5ForConditionalGeneration(config)
    return Arch(model.to(dtype).eval().requires_grad_(False))


def moefied(arch, share, expert_size):
    "A copy whose feed-forward layers are experts with routers and a LoRA expert"
    copy = arch.clone()
    n_experts = copy.ffns[0].d_ff // expert_size
    moefy(copy, n_experts, max(1, round(share * n_experts)), split='random', router=None)
    for row, moe in moes(copy).items():
        router = MLPRouter(moe.experts.d_model, n_experts)
        set_router(copy.ffns[row], router.to(moe.experts.up.device, moe.experts.up.dtype))
    add_lora_expert(copy, r=32)
    return fold_lora_expert(copy)


def measure(size, args):
    "One row"
    dense = dense_t5(size, args.device, getattr(torch, args.dtype))
    moe = moefied(dense, args.share, args.expert_size)
    batch_size, seq_len = args.batch
    models = {'dense': dense, 'moe': moe}
    times = latency_together(models, batch_size, seq_len, args.repeats, args.warmup, clock=CLOCKS[args.clock])
    ratios = [m / d for m, d in zip(times['moe'].times, times['dense'].times)]
    return {'model': f'T5-{size}', 'params': count_params(dense)['params'], 'dtype': args.dtype, 'device': args.device,
            'share': args.share, 'expert_size': args.expert_size, 'batch': batch_size, 'length': seq_len,
            'dense_ms': times['dense'].median, 'ms': times['moe'].median, 'iqr_ms': times['moe'].iqr,
            'ratio': statistics.median(ratios), 'paper': PAPER[size],
            'floor': count_flops(moe, batch_size, seq_len) / count_flops(dense, batch_size, seq_len)}


def parse(argv=None):
    "The options"
    p = command_line(__doc__)
    p.add_argument('--sizes', nargs='+', default=['small'], choices=list(SIZES))
    p.add_argument('--batch', type=shape, default=(8, 128), help='sequences x tokens, such as 64x128')
    p.add_argument('--share', type=float, default=0.2, help='share of the experts that run')
    p.add_argument('--expert_size', type=int, default=32, help="an expert's neurons")
    p.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
    p.add_argument('--device', default='cpu')
    timing_options(p, repeats=5, warmup=1)
    return p.parse_args(argv)


def main(argv=None):
    "Run, print and write"
    args = parse(argv)
    prepare_timing(args)
    found = {'command': command_of('whole_t5', argv, args.out), 'clock': args.clock, 'provenance': dict(provenance()),
             'rows': []}
    for size in args.sizes:
        found['rows'].append(measure(size, args))
        print('{model:>8} {dtype}, {batch} x {length}: dense {dense_ms:.1f} ms, {ratio:.3f} of it with experts, floor '
              '{floor:.3f}, paper {paper}'.format(**found['rows'][-1]), flush=True)
        write(found, args.out)


if __name__ == '__main__':
    main()
