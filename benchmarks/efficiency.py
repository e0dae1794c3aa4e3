"""Measure what the Pruning-Adapter's tables 2, 3 and 4 report, on BERT-base from its config with random weights.

Full fine-tuning, LoRA (rank 4) and Prune-LoRA (101 of 144 heads, the pattern that the paper's code publishes for RTE,
ranks 8 and 4): parameters, memory of the weights, forward passes against their FLOP floor, training steps against
theirs, peak memory, operators and the roofline. Times do not depend on what the weights are. Whatever is timed against
each other runs in turns, and ratios are taken within a turn, so a machine that others use too shifts the seconds more
than the ratios.

    python benchmarks/efficiency.py --out benchmarks/results/efficiency_cpu.json
    python benchmarks/efficiency.py --device cuda --shapes 32x128 256x128 --repeats 20 --warmup 5 --dtypes float32
        bfloat16 --out benchmarks/results/efficiency_gpu.json
"""
import json
import time

import torch
from common import CLOCKS, command_line, command_of, prepare_timing, shape, timing_options, write
from transformers import BertConfig, BertForSequenceClassification

from tpa_nb.arch import Arch
from tpa_nb.hardware import machine_peak, memory_use, op_times, roofline, training_cost
from tpa_nb.lora import add_lora, n_trainable
from tpa_nb.profile import count_flops, count_params, flops_by_part, latency_together, provenance

KEPT_ON_RTE = (7, 10, 11, 10, 8, 8, 8, 8, 5, 10, 7, 9)
TOP_BLOCKS = (2, 11, 3, 1)         # the four most important blocks of RTE
AS_CODED = (1, 2, 3, 10, 11)       # what the paper's code gives rank 8, because 'layer.1' is also found in 'layer.10'
TINY = dict(vocab_size=99, hidden_size=48, intermediate_size=96, max_position_embeddings=64)
DTYPES = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def plain(config, device, kept=None):
    "BERT with random weights, with the first `kept[i]` heads in layer i"
    torch.manual_seed(0)
    with torch.device(device):
        arch = Arch(BertForSequenceClassification(BertConfig(num_labels=2, **config)).eval())
    for attn, n in zip(arch.attns, kept or ()):
        attn.keep_heads(list(range(n)))
    return arch


def ranks(top):
    "Rank 8 in the blocks `top`, 4 in the others"
    return [8 if row in top else 4 for row in range(len(KEPT_ON_RTE))]


def adapted(config, device, kept=None, r=4, train=('norm', 'head')):
    "The same with LoRA on queries, keys and values, and LayerNorm trained"
    return add_lora(plain(config, device, kept), r=r, targets=('q', 'k', 'v'), train=train)


def trio(config, device):
    "The three models of the paper's tables; norms, adapters and the task head train"
    return {'full fine-tuning': plain(config, device), 'LoRA': adapted(config, device),
            'Prune-LoRA': adapted(config, device, KEPT_ON_RTE, ranks(TOP_BLOCKS))}


def counts(config):
    "Parameters and bytes: as the paper's code has them (the head frozen), as the paper says, and with the head trained"
    models = {'full fine-tuning': lambda: plain(config, 'meta'),
              'LoRA, as coded': lambda: adapted(config, 'meta', train=('norm',)),
              'Prune-LoRA, as coded': lambda: adapted(config, 'meta', KEPT_ON_RTE, ranks(AS_CODED), ('norm',)),
              'Prune-LoRA, as meant': lambda: adapted(config, 'meta', KEPT_ON_RTE, ranks(TOP_BLOCKS), ('norm',)),
              'LoRA, head trained': lambda: adapted(config, 'meta'),
              'Prune-LoRA, head trained': lambda: adapted(config, 'meta', KEPT_ON_RTE, ranks(TOP_BLOCKS)),
              'Prune-LoRA, merged': lambda: plain(config, 'meta', KEPT_ON_RTE)}
    found = {}
    for name, build in models.items():
        arch = build()
        live, trained = count_params(arch), 0 if name.endswith('merged') else n_trainable(arch)
        found[name] = {'params': live['params'], 'trainable': trained, 'weight_bytes': live['weight_bytes']}
    return found


def latencies(config, args, shape):
    "Forward passes: dense, with an adapter that is not merged, and pruned and merged"
    models = trio(config, args.device)
    models['Prune-LoRA, merged'] = plain(config, args.device, KEPT_ON_RTE)
    times = latency_together(models, *shape, repeats=max(args.repeats), warmup=args.warmup, clock=CLOCKS[args.clock])
    first = times['full fine-tuning']
    dense = count_flops(models['full fine-tuning'], *shape)
    return {name: {'ms': lat.median, 'spread_ms': lat.iqr, 'flops': count_flops(models[name], *shape),
                   'floor': count_flops(models[name], *shape) / dense,
                   'ratio': torch.tensor([a / b for a, b in zip(lat.times, first.times)]).median().item(),
                   'times_ms': [round(t, 3) for t in lat.times]} for name, lat in times.items()}


def step_flops(arch, shape):
    "FLOPs that a training step cannot do without: forward, gradients of activations, of the weights that train"
    parts, total = flops_by_part(arch, *shape), count_flops(arch, *shape)
    if not arch.is_adapted:
        return 3 * total
    with arch.model.disable_adapter():
        adapters = total - count_flops(arch, *shape)
    return 2 * total + parts['attention scores'] + adapters  # scores have two derivatives, frozen weights none


def training(models, args, shape, repeats, dtype):
    "Training steps in turns, and the memory of each"
    memory = {name: memory_use(arch, *shape, autocast=DTYPES[dtype]).as_dict() for name, arch in models.items()}
    table = training_cost(models, *shape, repeats=repeats, warmup=args.warmup, autocast=DTYPES[dtype], memory=False,
                          clock=CLOCKS[args.clock])
    full = models['full fine-tuning']
    peak = memory['full fine-tuning']['peak']
    rows = {name: {**table.loc[name].to_dict(), 'trainable': int(table.loc[name, 'trainable']),
                   'floor': step_flops(arch, shape) / step_flops(full, shape),
                   'peak_bytes': memory[name]['peak'], 'peak x': memory[name]['peak'] / peak,
                   'times': [round(t, 4) for t in table.attrs['times'][name]]} for name, arch in models.items()}
    return {'batch_size': shape[0], 'seq_len': shape[1], 'dtype': dtype, 'repeats': repeats, 'rows': rows,
            'memory': memory}


def records(table):
    "A DataFrame as JSON holds it"
    return json.loads(table.to_json(orient='index'))


def where_time_goes(config, models, args, shape):
    "Operators of a training step, and the roofline of the forward pass, dense and pruned"
    seconds = 0.05 if args.quick else 1.0
    clock = CLOCKS[args.clock]
    machine = machine_peak(args.device, seconds=seconds, clock=clock)
    bare = {'dense': plain(config, args.device), 'pruned': plain(config, args.device, KEPT_ON_RTE)}
    return {'machine': vars(machine), 'batch_size': shape[0], 'seq_len': shape[1],
            'operators': {n: records(op_times(a, *shape, training=True, repeats=1)) for n, a in models.items()},
            'provenance': dict(provenance()),
            'roofline': {n: records(roofline(a, machine, *shape, seconds, clock)) for n, a in bare.items()}}


def parse(argv=None):
    "The command line"
    p = command_line(__doc__)
    p.add_argument('--shapes', nargs='+', type=shape, default=[(8, 128), (32, 128)], help='batch x length, e.g. 8x128')
    p.add_argument('--dtypes', nargs='+', default=['float32'], choices=list(DTYPES),
                   help='precision of training: the second and later ones by autocast, on the first shape only')
    p.add_argument('--repeats', nargs='+', type=int, default=[5, 3],
                   help='turns that are timed: one number, or one for each shape')
    p.add_argument('--device', default='cpu', help='cpu, cuda, ...')
    p.add_argument('--sections', nargs='+', default=list(SECTIONS), choices=list(SECTIONS),
                   help='what to measure; some of them replace those parts of the file that --out names')
    p.add_argument('--quick', action='store_true', help='a tiny model on tiny batches: does everything run?')
    timing_options(p, repeats=None, warmup=1)
    args = p.parse_args(argv)
    if args.quick:
        args.shapes, args.repeats = [(2, 16)], [2]
    if len(args.repeats) not in (1, len(args.shapes)):
        p.error(f'--repeats needs one number, or one for each of the {len(args.shapes)} shapes')
    args.repeats = (args.repeats * len(args.shapes))[:len(args.shapes)]
    return args


def show(one):
    "Print a training section"
    print(f"training step, {one['batch_size']} x {one['seq_len']} tokens, {one['dtype']}")
    for name, row in one['rows'].items():
        print(f"  {name:18} {row['seconds']:8.3f} s ± {row['spread']:5.3f}  x {row['step x']:.3f} (floor "
              f"{row['floor']:.3f})  peak {row['peak_bytes'] / 2 ** 20:9,.1f} MiB  x {row['peak x']:.3f}", flush=True)


def start(args, argv):
    "The record: a new one, or where only some sections are asked for, the one that is there"
    if args.sections != list(SECTIONS):
        if not args.out or not args.out.exists():
            raise SystemExit('--sections replaces parts of an existing file; name it with --out, or run them all')
        return json.loads(args.out.read_text())
    model = 'tiny BERT' if args.quick else 'BERT-base from its config, random weights'
    return {'benchmark': 'efficiency', 'model': model, 'kept_heads': KEPT_ON_RTE, 'top_blocks': TOP_BLOCKS,
            'device': args.device, 'clock': args.clock,
            'command': command_of('efficiency', argv, args.out), 'provenance': dict(provenance())}


def count_section(found, config, models, args):
    "Parameters and bytes"
    found['counts'] = counts(config)
    for name, row in found['counts'].items():
        print(f"{name:26} {row['params']:12,} parameters {row['trainable']:12,} train "
              f"{row['weight_bytes'] / 2 ** 20:7.1f} MiB", flush=True)


def training_section(found, config, models, args):
    "Steps and memory of every shape and precision"
    found['training'] = []
    for size, repeats in zip(args.shapes, args.repeats):
        for dtype in args.dtypes if size == args.shapes[0] else args.dtypes[:1]:
            found['training'].append(training(models, args, size, repeats, dtype))
            show(found['training'][-1])
            write(found, args.out)


def latency_section(found, config, models, args):
    "Forward passes on the first shape"
    size = args.shapes[0]
    found['latency'] = {'batch_size': size[0], 'seq_len': size[1], 'rows': latencies(config, args, size)}
    for name, row in found['latency']['rows'].items():
        print(f"forward, {name:18} {row['ms']:9.1f} ms ± {row['spread_ms']:5.1f}  x {row['ratio']:.3f} "
              f"(floor {row['floor']:.3f})", flush=True)


def where_section(found, config, models, args):
    "Operators and roofline on the first shape"
    found['where'] = where_time_goes(config, models, args, args.shapes[0])
    for name, row in found['where']['roofline']['pruned'].items():
        print(f"roofline, pruned, {name:20} {row['GFLOP/s']:8.1f} GFLOP/s, {row['utilisation']:.0%} of the attainable",
              flush=True)


SECTIONS = {'counts': count_section, 'training': training_section, 'latency': latency_section, 'where': where_section}


def main(argv=None):
    "Run, print, and write after each section"
    args = parse(argv)
    prepare_timing(args)
    config, began = (TINY if args.quick else {}), time.perf_counter()
    found = start(args, argv)
    models = trio(config, args.device)
    for name in args.sections:
        SECTIONS[name](found, config, models, args)
        write(found, args.out)
    found['seconds'] = {**found.get('seconds', {}), ' '.join(args.sections): round(time.perf_counter() - began, 1)}
    write(found, args.out)
    print(provenance())


if __name__ == '__main__':
    main()
