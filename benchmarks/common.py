"What the benchmarks share: clocks, options, calls in turns, and the file that holds the figures"
import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

from tpa_nb.hardware import _in_turns
from tpa_nb.profile import _write_json

CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def command_line(doc):
    "A parser that shows the script's own words"
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def timing_options(parser, repeats, warmup):
    "How often, on how many threads and by which clock; `repeats` None where the script has its own option"
    if repeats is not None:
        parser.add_argument('--repeats', type=int, default=repeats, help='timed turns')
    parser.add_argument('--warmup', type=int, default=warmup, help='turns before the clock counts')
    parser.add_argument('--threads', type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument('--clock', default='wall', choices=sorted(CLOCKS),
                        help='cpu: time of this process only, for a machine that others use too; take one thread then')
    output_option(parser)


def output_option(parser):
    "Where the figures go"
    parser.add_argument('--out', type=Path, default=None, help='write the figures to this JSON file')


def shape(text):
    "'8x128' as (8, 128)"
    try:
        batch_size, seq_len = (int(part) for part in text.lower().split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a batch x length, such as 8x128") from None
    return batch_size, seq_len


def prepare_timing(args):
    "Refuse a clock that sees nothing of the device, and take the threads that were asked for"
    if args.clock == 'cpu' and getattr(args, 'device', 'cpu') != 'cpu':
        raise SystemExit(f'--clock cpu counts the time of this process, which waits while {args.device} works; leave it '
                         'out')
    if args.threads:
        torch.set_num_threads(args.threads)


def command_of(script, argv, out=None):
    "The command that makes these figures, without the name of their file"
    words = sys.argv[1:] if argv is None else argv
    return shlex.join(['python', f'benchmarks/{script}.py', *(w for w in words if w not in ('--out', str(out)))])


def in_turns(calls, repeats, warmup, clock, inner=1, sync=lambda: None):
    "Seconds of each of `calls`, forwards and backwards through the list; each is the mean of `inner` runs in a row"
    several = {name: lambda call=call: [call() for _ in range(inner)] for name, call in calls.items()}
    times = _in_turns(several, sync, repeats, warmup, clock)
    return {name: [t / inner for t in found] for name, found in times.items()}


def write(found, path):
    "Write the figures; nothing where no file was asked for"
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, found)
