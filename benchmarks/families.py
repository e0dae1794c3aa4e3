"""Time pruned models of every family against the dense one and against their FLOP floor, and find where pruning pays.

Models come from their configs in base size (768 wide, 12 heads, d_ff 3072; four layers, since a layer more adds the
same to both sides) with random weights: time does not depend on what the weights are. Removed are half of the heads,
half of the neurons, or both. The models of a family run in turns on the same batch; a ratio is the median over
neighbouring passes. The break-even is the smallest batch, in sequences of `--seq_len` tokens, from which on the pruned
model is faster.

    python benchmarks/families.py --out benchmarks/results/families.json
"""
import statistics
from functools import partial

import torch
from common import CLOCKS, command_line, command_of, prepare_timing, timing_options, write
from transformers import AutoConfig, AutoModelForSequenceClassification

from tpa_nb.arch import Arch, families
from tpa_nb.families import tiny_arch
from tpa_nb.profile import count_flops, latency_together, provenance

_ENCODER = dict(hidden_size=768, num_hidden_layers=4, num_attention_heads=12, intermediate_size=3072)
_LLAMA = dict(**_ENCODER, num_key_value_heads=4, pad_token_id=0, vocab_size=32000)
BASE = {'bert': _ENCODER, 'roberta': _ENCODER, 'electra': dict(**_ENCODER, embedding_size=768),
        'distilbert': dict(dim=768, n_layers=4, n_heads=12, hidden_dim=3072),
        'opt': dict(hidden_size=768, num_hidden_layers=4, num_attention_heads=12, ffn_dim=3072, pad_token_id=1),
        'gpt2': dict(n_embd=768, n_layer=4, n_head=12, n_inner=3072, pad_token_id=0),
        't5': dict(d_model=768, num_layers=2, num_heads=12, d_kv=64, d_ff=3072, pad_token_id=0, eos_token_id=1,
                   decoder_start_token_id=0),  # two layers of each stack
        'llama': _LLAMA, 'mistral': _LLAMA, 'qwen2': _LLAMA, 'qwen3': dict(**_LLAMA, head_dim=64)}
DEPTHS = ('num_hidden_layers', 'n_layers', 'n_layer', 'num_layers')  # what the families call their number of layers


def base_size(family, seed=0, layers=None):
    "A model of `family` in base size, with random weights"
    torch.manual_seed(seed)
    sizes = BASE[family]
    depth = {name: layers for name in DEPTHS if layers and name in sizes}
    config = AutoConfig.for_model(family, **{**sizes, **depth})
    return Arch(AutoModelForSequenceClassification.from_config(config).eval())


def halved(arch, heads, neurons):
    "A copy without half of the heads, or of the neurons, or of both, in every layer"
    cut = arch.clone()
    for a in cut.attns if heads else ():
        groups = a.kv_heads[:len(a.kv_heads) // 2]
        a.keep_heads([h for h in a.heads if h // a.group_size in groups])
    for f in cut.ffns if neurons else ():
        f.keep_neurons(range(f.d_ff // 2))
    return cut


def measure(family, batch_sizes, seq_len, repeats, warmup, clock, make=base_size):
    "Rows of the table for one family"
    dense = make(family)
    models = {'dense': dense, 'heads': halved(dense, True, False), 'neurons': halved(dense, False, True),
              'both': halved(dense, True, True)}
    rows = []
    for batch_size in batch_sizes:
        times = latency_together(models, batch_size, seq_len, repeats, warmup, clock=CLOCKS[clock])
        for name in list(models)[1:]:
            ratios = [p / d for p, d in zip(times[name].times, times['dense'].times)]
            floor = count_flops(models[name], batch_size, seq_len) / count_flops(dense, batch_size, seq_len)
            rows.append({'family': family, 'removed': name, 'batch_size': batch_size, 'seq_len': seq_len,
                         'dense_ms': times['dense'].median, 'ms': times[name].median, 'iqr_ms': times[name].iqr,
                         'ratio': statistics.median(ratios), 'floor': floor})
    return rows


def break_even(rows):
    "The smallest batch from which on the pruned model is faster; None if it never is"
    slow = [r['batch_size'] for r in rows if r['ratio'] >= 1]
    fast = [r['batch_size'] for r in rows if r['batch_size'] > max(slow, default=0)]
    return min(fast, default=None)


def parse(argv=None):
    "The command line"
    p = command_line(__doc__)
    p.add_argument('--families', nargs='+', default=sorted(BASE), choices=sorted(BASE))
    p.add_argument('--batch_sizes', nargs='+', type=int, default=[1, 4, 16])
    p.add_argument('--seq_len', type=int, default=128)
    p.add_argument('--layers', type=int, default=None, help='layers of each stack (default: 4 in all)')
    p.add_argument('--tiny', action='store_true', help='the tiny models of the tests: tries the script out')
    timing_options(p, repeats=7, warmup=2)
    return p.parse_args(argv)


def main(argv=None):
    "Run, print and write"
    args = parse(argv)
    prepare_timing(args)
    assert set(BASE) <= set(families), 'a family without a record'
    found = {'command': command_of('families', argv, args.out), 'clock': args.clock, 'provenance': dict(provenance()),
             'rows': []}
    rows = found['rows']
    for family in args.families:
        rows += measure(family, args.batch_sizes, args.seq_len, args.repeats, args.warmup, args.clock,
                        tiny_arch if args.tiny else partial(base_size, layers=args.layers))
        for row in rows[-3 * len(args.batch_sizes):]:
            print('{family:>10} {removed:>8} {batch_size:>3} x {seq_len}: {ms:8.1f} ms, {ratio:.3f} of dense, '
                  'floor {floor:.3f}'.format(**row), flush=True)
        write(found, args.out)


if __name__ == '__main__':
    main()
