"""Time every plan for running experts against the dense layer that they were cut from.

One feed-forward layer with random weights; each token chooses its experts at random, which is the worst case for plans
that want many tokens per expert. Dense layer and plans run in turns on the same input; a ratio is the median over the
turns of the plan's time by the dense layer's. What a router costs is not included; sorting the pairs of token and
expert is.
"""
import statistics

import torch
import torch.nn.functional as F
from common import CLOCKS, command_line, command_of, in_turns, prepare_timing, timing_options, write

from tpa_nb.bench import _case, _dense_call, _layer
from tpa_nb.experts import choose_plan, plans
from tpa_nb.profile import provenance
from tpa_nb.split import _kmeans, _within

TARGETS = {(torch.float32, True, 128): {1: 0.25, 8: 0.5, 64: 0.5, 512: 0.3, 2048: 0.3},  # what the project set itself
           (torch.float32, True, 32): {1: 0.25, 8: 0.7, 64: 0.7, 512: 0.6, 2048: 0.6}}


@torch.no_grad()
def measure(experts, tokens, share, repeats, warmup, clock, seed):
    "One row: the dense layer and every plan that can run"
    k = max(1, round(share * experts.n_experts))
    case, dense = _case(experts, tokens, k, torch.Generator().manual_seed(seed)), _dense_call(experts)
    x, chosen = case.x, case.chosen
    able = [n for n, p in plans.items() if not p.why_not(experts, x) and not (n == 'token' and tokens > 1)]
    calls = {'dense': lambda: dense(case)}
    calls |= {name: lambda plan=plans[name]: plan.run(experts, x, chosen) for name in able}
    want = plans['masked'].run(experts, x, chosen).float()
    errors = {n: ((plans[n].run(experts, x, chosen).float() - want).norm() / want.norm()).item() for n in able}
    times = in_turns(calls, repeats, warmup, clock, inner=max(1, 64 // tokens))
    ratios = {n: round(statistics.median(p / d for p, d in zip(times[n], times['dense'])), 4) for n in able}
    torch_only = {n: r for n, r in ratios.items() if n != 'compiled'}
    return {'tokens': tokens, 'n_experts': experts.n_experts, 'expert_size': experts.expert_size, 'k': k,
            'gated': experts.gate is not None, 'dtype': str(experts.up.dtype).removeprefix('torch.'),
            'ratios': ratios, 'errors': errors, 'auto': choose_plan(experts, x, chosen),
            'best': min(ratios, key=ratios.get), 'best_without_compiler': min(torch_only, key=torch_only.get),
            'target': TARGETS.get((experts.up.dtype, experts.gate is None, experts.expert_size), {}).get(tokens),
            'median_ms': {n: round(1e3 * statistics.median(t), 4) for n, t in times.items()},
            'iqr_ms': {n: round(1e3 * spread(t), 4) for n, t in times.items()}}


def spread(times):
    "Interquartile range"
    low, _, high = statistics.quantiles(times, n=4)
    return high - low


def split_rows(d_model, d_ff, n_experts, clock, seeds=2):
    "Balanced k-means on rows whose spectrum falls as a power law, and on rows in overlapping clusters"
    rows = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        data = {'power law': torch.randn(d_ff, d_model) * torch.arange(1, d_model + 1) ** -0.5,
                'clusters': 0.75 * torch.randn(150, d_model)[torch.randint(150, (d_ff,))] + torch.randn(d_ff, d_model)}
        for name, x in data.items():
            x = F.normalize(x)
            start = clock()
            labels = _kmeans(x, n_experts, seed)
            seconds = clock() - start
            rows.append({'data': name, 'seed': seed, 'seconds': round(seconds, 3),
                         'within': round(_within(x, labels, n_experts), 4),
                         'random': round(_within(x, torch.randperm(d_ff) % n_experts, n_experts), 4)})
    return rows


def parse(argv=None):
    "The command line"
    p = command_line(__doc__)
    p.add_argument('--d_model', type=int, default=768)
    p.add_argument('--d_ff', type=int, default=3072)
    p.add_argument('--experts', nargs='+', type=int, default=[24, 96], help='numbers of experts; divide d_ff')
    p.add_argument('--tokens', nargs='+', type=int, default=[1, 8, 64, 512, 2048])
    p.add_argument('--share', type=float, default=0.2, help='share of the experts that runs')
    p.add_argument('--dtypes', nargs='+', default=['float32'], choices=['float32', 'bfloat16', 'float16'])
    p.add_argument('--gated', action='store_true', help='time gated layers too')
    p.add_argument('--split', action='store_true', help='time balanced k-means too')
    p.add_argument('--seed', type=int, default=0)
    timing_options(p, repeats=9, warmup=2)
    return p.parse_args(argv)


def report(row):
    "One line of the table"
    ratios = ' '.join(f"{row['ratios'].get(name, float('nan')):8.3f}" for name in plans)
    target = '' if row['target'] is None else f"  target {row['target']:.2f}"
    return (f"{row['dtype']:9} {'gated' if row['gated'] else 'plain':6} {row['n_experts']:4} x {row['expert_size']:4} "
            f"{row['tokens']:7} {row['median_ms']['dense']:9.3f} {ratios}  auto {row['auto']}{target}")


def main(argv=None):
    "Run, print and write"
    args = parse(argv)
    prepare_timing(args)
    rows, clock = [], CLOCKS[args.clock]
    print(f"{'dtype':9} {'':6} {'experts':>11} {'tokens':>7} {'dense ms':>9} {' '.join(f'{n:>8}' for n in plans)}")
    for dtype in args.dtypes:
        for gated in (False, True)[:1 + args.gated]:
            for n in args.experts:
                experts = _layer(args.d_model, args.d_ff, n, gated, True, getattr(torch, dtype), 'cpu')
                for tokens in args.tokens:
                    rows.append(measure(experts, tokens, args.share, args.repeats, args.warmup, clock, args.seed))
                    print(report(rows[-1]), flush=True)
    split = split_rows(args.d_model, args.d_ff, max(args.experts), clock) if args.split else []
    for row in split:
        print(f"balanced k-means, {row['data']}: {row['seconds']:.2f} s, {row['within']:.4f} (random {row['random']:.4f})")
    record = provenance()
    print('ratios to the dense layer, medians over turns')
    print(record)
    write({'benchmark': 'experts', 'd_model': args.d_model, 'd_ff': args.d_ff, 'share': args.share, 'seed': args.seed,
           'clock': args.clock, 'repeats': args.repeats, 'command': command_of('experts', argv, args.out),
           'provenance': record, 'rows': rows, 'split': split}, args.out)


if __name__ == '__main__':
    main()
