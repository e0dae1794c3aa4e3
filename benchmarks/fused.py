"""Measure the training step of PEFT's LoRA layers against the fused ones, with and without pruned heads.

BERT-base from its config with random weights; times do not depend on what the weights are. Full fine-tuning, LoRA (rank
4) and Prune-LoRA (101 of 144 heads, ranks 8 and 4), each adapter as PEFT computes it, fused layer by layer, and fused
with queries, keys and values together. All models run in turns, and ratios are taken within a turn.

    python benchmarks/fused.py --layers 4 --threads 1 --clock cpu --out benchmarks/results/fused_cpu.json
    python benchmarks/fused.py --device cuda --shapes 32x128 256x128 --targets q k v --dtypes float32 bfloat16
        --repeats 20 --warmup 5 --out benchmarks/results/fused_cuda.json
"""
import statistics

from common import CLOCKS, command_line, command_of, prepare_timing, shape, timing_options, write
from efficiency import DTYPES, KEPT_ON_RTE, TINY, TOP_BLOCKS, plain, ranks, step_flops

from tpa_nb.fused import fuse_lora
from tpa_nb.hardware import memory_use, training_cost
from tpa_nb.lora import add_lora
from tpa_nb.profile import provenance

FORMS = {'PEFT': lambda arch: arch, 'fused alone': lambda arch: fuse_lora(arch, together=False), 'fused': fuse_lora}


def models(config, device, targets):
    "Full fine-tuning, and both kinds of adapter in every form"
    layers = config.get('num_hidden_layers', len(KEPT_ON_RTE))
    found = {'full fine-tuning': plain(config, device)}
    for name, kept, r in (('LoRA', None, [4] * layers),
                          ('Prune-LoRA', KEPT_ON_RTE[:layers], ranks(TOP_BLOCKS)[:layers])):
        for form, fuse in FORMS.items():
            found[f'{name}, {form}'] = fuse(add_lora(plain(config, device, kept), r=r, targets=targets))
    return found


def against_peft(times):
    "For each adapted model: median over the turns of its time by that of PEFT's form"
    of = {name: name.split(',')[0] + ', PEFT' for name in times if ',' in name}
    return {name: statistics.median(a / b for a, b in zip(times[name], times[peft])) for name, peft in of.items()}


def training(trained, args, size, dtype):
    "Steps in turns, the work that they cannot do without, and memory"
    cost = training_cost(trained, *size, repeats=args.repeats, warmup=args.warmup, autocast=DTYPES[dtype],
                         memory=False, clock=CLOCKS[args.clock])
    times, full = cost.attrs['times'], trained['full fine-tuning']
    ratios = against_peft(times)
    rows = {}
    for name, arch in trained.items():
        use = memory_use(arch, *size, autocast=DTYPES[dtype])
        rows[name] = {'seconds': cost.loc[name, 'seconds'], 'spread': cost.loc[name, 'spread'],
                      'step x': cost.loc[name, 'step x'], 'floor': step_flops(arch, size) / step_flops(full, size),
                      'by PEFT': ratios.get(name), 'activation_bytes': use.activations, 'peak_bytes': use.peak,
                      'times': [round(t, 5) for t in times[name]]}
    return {'batch_size': size[0], 'seq_len': size[1], 'dtype': dtype, 'rows': rows}


def show(one):
    "Print one setting"
    print(f"training step, {one['batch_size']} x {one['seq_len']} tokens, {one['dtype']}")
    for name, row in one['rows'].items():
        by_peft = '' if row['by PEFT'] is None else f"  by PEFT {row['by PEFT']:.3f}"
        print(f"  {name:24} {row['seconds']:8.4f} s ± {row['spread']:6.4f}  x {row['step x']:.3f} (floor "
              f"{row['floor']:.3f})  peak {row['peak_bytes'] / 2 ** 20:9,.1f} MiB{by_peft}", flush=True)


def parse(argv=None):
    "The command line"
    p = command_line(__doc__)
    p.add_argument('--shapes', nargs='+', type=shape, default=[(8, 128)], help='batch x length, e.g. 8x128')
    p.add_argument('--dtypes', nargs='+', default=['float32'], choices=list(DTYPES),
                   help='precision of training; other than float32 by autocast')
    p.add_argument('--layers', type=int, default=12, help='layers of the model, 1 to 12')
    p.add_argument('--targets', nargs='+', default=['q', 'k', 'v', 'o'], help="adapted projections")
    p.add_argument('--device', default='cpu', help='cpu, cuda, ...')
    p.add_argument('--quick', action='store_true', help='a tiny model on tiny batches: does everything run?')
    timing_options(p, repeats=7, warmup=1)
    args = p.parse_args(argv)
    if not 1 <= args.layers <= len(KEPT_ON_RTE):
        p.error(f'--layers must be 1 to {len(KEPT_ON_RTE)}, got {args.layers}')
    if args.quick:
        args.shapes, args.repeats, args.layers = [(2, 16)], 2, 2
    return args


def main(argv=None):
    args = parse(argv)
    prepare_timing(args)
    config = {**(TINY if args.quick else {}), 'num_hidden_layers': args.layers}
    found = {'benchmark': 'fused', 'model': 'tiny BERT' if args.quick else 'BERT-base from its config, random weights',
             'layers': args.layers, 'targets': args.targets, 'device': args.device, 'clock': args.clock,
             'command': command_of('fused', argv, args.out), 'provenance': dict(provenance()), 'training': []}
    trained = models(config, args.device, args.targets)
    for size in args.shapes:
        for dtype in args.dtypes:
            found['training'].append(training(trained, args, size, dtype))
            show(found['training'][-1])
            write(found, args.out)
    return found


if __name__ == '__main__':
    main()
