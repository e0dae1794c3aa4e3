"""Time the forward pass of a head-pruned BERT-base against the dense one and against its FLOP floor.

Both models come from the config with random weights: time does not depend on what the weights are. The heads kept
are those that Pruning-Adapter publishes for RTE, 101 of 144. The two run in turns on the same batch.
"""
import statistics

import torch
from common import CLOCKS, command_line, command_of, prepare_timing, shape, timing_options, write
from transformers import BertConfig, BertForSequenceClassification

from tpa_nb.arch import Arch
from tpa_nb.profile import count_flops, count_params, latency_together, provenance

KEPT_ON_RTE = (7, 10, 11, 10, 8, 8, 8, 8, 5, 10, 7, 9)


def bert_base(seed, device, dtype, kept=None):
    "BERT-base with random weights, with the first `kept[i]` heads in layer i"
    torch.manual_seed(seed)
    arch = Arch(BertForSequenceClassification(BertConfig(num_labels=2)).eval())
    for attn, n in zip(arch.attns, kept or ()):
        attn.keep_heads(list(range(n)))
    arch.model.to(device=device, dtype=getattr(torch, dtype))
    return arch


def measure(models, attention, batch_size, seq_len, repeats, warmup, clock):
    "One row of the table: medians, spreads, and the median of the ratios of neighbouring passes"
    for arch in models.values():
        arch.base.set_attn_implementation(attention)
    times = latency_together(models, batch_size, seq_len, repeats, warmup, clock=CLOCKS[clock])
    dense, pruned = times['dense'], times['pruned']
    ratio = statistics.median(p / d for p, d in zip(pruned.times, dense.times))
    floor = count_flops(models['pruned'], batch_size, seq_len) / count_flops(models['dense'], batch_size, seq_len)
    return {'attention': attention, 'batch_size': batch_size, 'seq_len': seq_len, 'repeats': repeats,
            'dense_ms': dense.median, 'dense_iqr_ms': dense.iqr, 'pruned_ms': pruned.median,
            'pruned_iqr_ms': pruned.iqr, 'ratio': ratio, 'ratio_of_medians': pruned.median / dense.median,
            'ratio_of_minima': min(pruned.times) / min(dense.times), 'floor': floor, 'over_floor': ratio / floor - 1,
            'times_ms': {name: [round(t, 3) for t in lat.times] for name, lat in times.items()}}


def parse(argv=None):
    "The command line"
    p = command_line(__doc__)
    p.add_argument('--shapes', nargs='+', type=shape, default=[(8, 128), (32, 128)], help='batch x length, e.g. 8x128')
    p.add_argument('--dtypes', nargs='+', default=['float32'], choices=['float32', 'bfloat16', 'float16'])
    p.add_argument('--attention', nargs='+', default=['eager', 'sdpa'], choices=['eager', 'sdpa'])
    p.add_argument('--device', default='cpu', help='cpu, cuda, ...')
    p.add_argument('--seed', type=int, default=0)
    timing_options(p, repeats=7, warmup=2)
    return p.parse_args(argv)


def main(argv=None):
    "Run, print and write"
    args = parse(argv)
    prepare_timing(args)
    rows, models = [], {}
    print(f"{'dtype':9} {'attention':9} {'batch':>9} {'dense ms':>16} {'pruned ms':>16} {'ratio':>6} {'floor':>6} over")
    for dtype in args.dtypes:
        models = {'dense': bert_base(args.seed, args.device, dtype),
                  'pruned': bert_base(args.seed, args.device, dtype, KEPT_ON_RTE)}
        for attention in args.attention:
            for batch_size, seq_len in args.shapes:
                row = measure(models, attention, batch_size, seq_len, args.repeats, args.warmup,
                              args.clock)
                rows.append({'dtype': dtype, **row})
                print(f"{dtype:9} {attention:9} {f'{batch_size} x {seq_len}':>9} "
                      f"{row['dense_ms']:9.1f} ± {row['dense_iqr_ms']:4.1f} {row['pruned_ms']:9.1f} ± "
                      f"{row['pruned_iqr_ms']:4.1f} {row['ratio']:6.3f} {row['floor']:6.3f} {row['over_floor']:+.1%}",
                      flush=True)
    record = provenance()
    print(f'times are medians ± interquartile range of {args.repeats} passes; ratio: median over neighbouring passes')
    print(record)
    params = {name: count_params(arch)['params'] for name, arch in models.items()}
    write({'benchmark': 'pruned_forward', 'model': 'BERT-base from its config, random weights',
           'kept_heads': KEPT_ON_RTE, 'params': params, 'seed': args.seed, 'device': args.device, 'clock': args.clock,
           'command': command_of('pruned_forward', argv, args.out), 'provenance': record, 'rows': rows}, args.out)


if __name__ == '__main__':
    main()
