"""Time the forward pass of a head-pruned BERT-base against the dense one and against its FLOP floor.

Both models come from the config with random weights: time does not depend on what the weights are. The heads kept
are those that Pruning-Adapter publishes for RTE, 101 of 144. The two run in turns on the same batch.
"""
import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from tpa_nb.arch import Arch
from tpa_nb.profile import count_flops, count_params, latency_together, provenance

CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
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


def shape(text):
    "'8x128' as (8, 128)"
    try:
        batch_size, seq_len = (int(part) for part in text.lower().split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a batch x length, such as 8x128") from None
    return batch_size, seq_len


def parse(argv=None):
    "The command line"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--shapes', nargs='+', type=shape, default=[(8, 128), (32, 128)], help='batch x length, e.g. 8x128')
    p.add_argument('--dtypes', nargs='+', default=['float32'], choices=['float32', 'bfloat16', 'float16'])
    p.add_argument('--attention', nargs='+', default=['eager', 'sdpa'], choices=['eager', 'sdpa'])
    p.add_argument('--repeats', type=int, default=7, help='timed passes of each model')
    p.add_argument('--warmup', type=int, default=2, help='passes of each model before the clock starts')
    p.add_argument('--threads', type=int, default=None, help="CPU threads (default: torch's)")
    p.add_argument('--clock', default='wall', choices=sorted(CLOCKS),
                   help='cpu: time of this process only, for a machine that others use too; take one thread then')
    p.add_argument('--device', default='cpu', help='cpu, cuda, ...')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=None, help='write the figures to this JSON file')
    return p.parse_args(argv)


def main(argv=None):
    "Run, print and write"
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
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
    if args.out:
        given = [part for part in (argv or sys.argv[1:]) if part not in ('--out', str(args.out))]
        command = shlex.join(['python', 'benchmarks/pruned_forward.py', *given])
        params = {name: count_params(arch)['params'] for name, arch in models.items()}
        result = {'benchmark': 'pruned_forward',
                  'model': 'BERT-base from its config, random weights',
                  'kept_heads': KEPT_ON_RTE, 'params': params, 'seed': args.seed, 'device': args.device,
                  'clock': args.clock, 'command': command, 'provenance': record, 'rows': rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
