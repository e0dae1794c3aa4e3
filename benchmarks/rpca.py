"""Time GreBsmo on a batch of matrices, and compare it with inexact ALM on time and support.

Three kinds of matrices: 'planted' (low rank, sparse entries and noise, all known), 'noise' (Gaussian, nothing to find:
all noise) and 'minilm' (the query and value weights of the embedded model). Inexact ALM needs an SVD in every step, so
it gets `--alm` of the planted matrices only. On a machine that others use too, read the CPU time with one thread: that
is what one core alone would take.

    python benchmarks/rpca.py --threads 2 --out benchmarks/results/rpca.json
"""
import statistics
import time

import torch
from common import command_line, command_of, output_option, write

from tpa_nb.arch import Arch
from tpa_nb.profile import provenance
from tpa_nb.rpca import grebsmo, inexact_alm, sparse_support


def planted(n, size, rank, density, noise, seed=0):
    "(sparse part, matrices)"
    draw = torch.Generator().manual_seed(seed)
    def normal(*shape): return torch.randn(*shape, generator=draw)
    low = normal(n, size, rank) @ normal(n, rank, size) / rank ** 0.5
    there = torch.rand(n, size, size, generator=draw) < density
    sparse = there * (1 + 2 * torch.rand(n, size, size, generator=draw)) * normal(n, size, size).sign()
    return sparse, low + sparse + noise * normal(n, size, size)


def minilm():
    "Query and value weights, (12, 384, 384)"
    return torch.stack([p.weight.detach() for a in Arch.from_pretrained('minilm').attns for p in (a.q, a.v)])


def timed(function, repeats):
    "The last result, and the seconds of every run: on the wall, and of this process's CPU time over all threads"
    wall, cpu = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        found = function()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return found, {'seconds': statistics.median(wall), 'cpu_seconds': statistics.median(cpu), 'all_seconds': wall,
                   'all_cpu_seconds': cpu}


def wrong(found, sparse):
    "Positions in which the support differs from the planted one"
    return int(((found != 0) != (sparse != 0)).sum())


def row(kind, algorithm, W, times, **more):
    "One line of the table"
    return {'matrices': kind, 'algorithm': algorithm, 'shape': list(W.shape), **times,
            'seconds_each': times['seconds'] / len(W), **more}


def parse(argv=None):
    "The command line"
    p = command_line(__doc__)
    p.add_argument('--matrices', type=int, default=24)
    p.add_argument('--size', type=int, default=768)
    p.add_argument('--rank', type=int, default=64)
    p.add_argument('--density', type=float, default=0.01, help='share of planted entries')
    p.add_argument('--noise', type=float, default=1e-3, help='standard deviation; planted entries are 1 to 3')
    p.add_argument('--n_sparse', type=int, default=16, help='positions to choose in each matrix')
    p.add_argument('--alm', type=int, default=1, help='planted matrices that inexact ALM gets')
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--no_minilm', action='store_true', help='leave the embedded model out')
    output_option(p)
    return p.parse_args(argv)


def measure(args):
    "All rows"
    rank, n = args.rank, args.n_sparse
    sparse, W = planted(args.matrices, args.size, rank, args.density, args.noise)
    parts, times = timed(lambda: grebsmo(W, rank), args.repeats)
    yield row('planted', 'grebsmo', W, times, rank=rank, iterations=parts.iterations.tolist(),
              debiasing=parts.debiasing.tolist(), converged=bool(parts.converged.all()),
              wrong_positions=wrong(parts.S, sparse), planted_entries=int((sparse != 0).sum()),
              largest_error=float((parts.S - sparse).abs().max()))
    few = W[:args.alm]
    (_, found, steps), times = timed(lambda: inexact_alm(few, tol=1e-5), 1)
    yield row('planted', 'inexact_alm', few, times, iterations=[steps],
              wrong_positions=wrong(found, sparse[:args.alm]),
              wrong_above_half=wrong(found * (found.abs() > 0.5), sparse[:args.alm]),
              largest_error=float((found - sparse[:args.alm]).abs().max()))
    gaussian = 0.04 * torch.randn(args.matrices, args.size, args.size, generator=torch.Generator().manual_seed(1))
    parts, times = timed(lambda: grebsmo(gaussian, rank, debias=0), args.repeats)
    yield row('noise', 'grebsmo', gaussian, times, rank=rank, iterations=parts.iterations.tolist(),
              converged=bool(parts.converged.all()))
    kinds = {'noise': gaussian} if args.no_minilm else {'noise': gaussian, 'minilm': minilm()}
    for kind, W in kinds.items():
        _, times = timed(lambda: sparse_support(W, n), args.repeats)
        yield row(kind, 'sparse_support', W, times, n_sparse=n)


def main(argv=None):
    "Run, print and write"
    args = parse(argv)
    torch.set_num_threads(args.threads)
    found = {'command': command_of('rpca', argv, args.out), 'density': args.density, 'noise': args.noise, 'threads': args.threads, 'provenance': dict(provenance()),
             'rows': []}
    for line in measure(args):
        found['rows'].append(line)
        wrong_ones = f", {line['wrong_positions']} positions wrong" if 'wrong_positions' in line else ''
        print('{matrices:>8} {algorithm:>15} {shape}: {seconds:6.2f} s, {cpu_seconds:6.2f} s of CPU time'.format(**line) + wrong_ones, flush=True)
        write(found, args.out)


if __name__ == '__main__':
    main()
