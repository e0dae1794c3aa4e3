"""Time exact head importance against one backward pass per example.

Three ways to the same numbers, on the same examples, in turns: a loop over examples that also computes weight
gradients (as the older scripts do), the same loop with frozen weights, and `head_derivatives`.

    python benchmarks/importance.py --model minilm --task toy_pairs --n 256 --out benchmarks/results/importance_cpu.json
"""
import statistics
import time

import torch
from common import command_line, output_option, write

from tpa_nb.arch import Arch
from tpa_nb.importance import head_derivatives, head_gates
from tpa_nb.profile import provenance
from tpa_nb.tasks import load_task


def loop(arch, batches, frozen):
    "Absolute derivatives summed over examples, one backward pass for each; (attentions, heads)"
    arch.model.requires_grad_(not frozen)
    total = torch.zeros(len(arch.attns), arch.attns[0].n_heads)
    for batch in batches:
        gates = torch.ones_like(total, requires_grad=True)
        with head_gates(arch, gates):
            arch.model(**batch).loss.backward()
        total += gates.grad.abs()
        arch.model.zero_grad()
    arch.model.requires_grad_(True)
    return total


def forward(arch, examples, batch_size):
    "A bare forward pass over the same batches: what no way can go below"
    with torch.no_grad():
        for batch in examples.batches(arch.tokenizer, batch_size, arch.device):
            arch.model(**batch)


def timed(run):
    "Seconds and result of `run()`"
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def main():
    p = command_line(__doc__)
    p.add_argument('--model', default='minilm')
    p.add_argument('--task', default='toy_pairs')
    p.add_argument('--data_dir')
    p.add_argument('--n', type=int, default=256, help='examples')
    p.add_argument('--batch_size', type=int, default=32, help='examples per backward pass of head_derivatives')
    p.add_argument('--rounds', type=int, default=3, help='times that each way is run')
    output_option(p)
    args = p.parse_args()
    task = load_task(args.task, data_dir=args.data_dir)
    arch = Arch.from_pretrained(args.model, task)
    examples = task.calibration(args.n)
    singles = list(examples.batches(arch.tokenizer, 1))
    ways = {'loop with weight gradients': lambda: loop(arch, singles, False),
            'loop with frozen weights': lambda: loop(arch, singles, True),
            'head_derivatives': lambda: head_derivatives(arch, examples, args.batch_size).values.abs().sum(0),
            'forward pass alone': lambda: forward(arch, examples, args.batch_size)}
    seconds, values = {name: [] for name in ways}, {}
    for _ in range(args.rounds):
        for name, run in ways.items():
            took, values[name] = timed(run)
            seconds[name].append(took)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    fast = medians['head_derivatives']
    largest = values['head_derivatives'].max().item() / args.n
    worst = max(((v - values['head_derivatives']).abs() / args.n).max().item() for v in values.values() if v is not None)
    tokens = sum(b['attention_mask'].sum().item() for b in singles) / args.n
    print(f'{args.model}, {args.task}: {args.n} examples of {tokens:.1f} tokens on average')
    for name, s in medians.items():
        print(f'{name:28} {s:7.2f} s   {s / fast:5.1f} x')
    print(f'largest difference of the mean absolute derivatives: {worst:.1e} (the largest is {largest:.1e})')
    print(provenance())
    write(dict(model=args.model, task=args.task, examples=args.n, mean_tokens=tokens, batch_size=args.batch_size,
               seconds=seconds, medians=medians, ratio={k: v / fast for k, v in medians.items()},
               largest_difference=worst, provenance=dict(provenance())), args.out)


if __name__ == '__main__':
    main()
