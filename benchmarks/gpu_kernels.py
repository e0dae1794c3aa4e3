"""What the compiler makes of the kernels for experts, for GPUs that need not be there.

    python benchmarks/gpu_kernels.py --out benchmarks/results/gpu_kernels.json

Triton compiles for a GPU that it is told about. For each kind of GPU, precision, number of tokens, size of an expert,
plain and gated: registers of a thread, bytes of them that do not fit and go to memory (spilled), memory that a program
shares, and which instructions form the products: tensor cores ('wgmma', 'mma') or none ('fma'). It says whether a kernel
can be built and fits; it says nothing about time.
"""
import os
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

os.environ['TRITON_INTERPRET'] = '0'  # before Triton is imported

from common import command_line, command_of, output_option, write

from tpa_nb import gpu_experts
from tpa_nb.profile import provenance

CHIPS = {'T4': (75, 64), 'A100': (80, 163), 'RTX 4090': (89, 99), 'H100': (90, 227)}  # capability, KiB a program may share
DTYPES = {'float32': ('fp32', 'tf32x3'), 'bfloat16': ('bf16', 'ieee'), 'float16': ('fp16', 'ieee')}
NUMBERS = {**dict.fromkeys(('N', 'D', 'E', 'n', 'r'), 'i32'), 'scale': 'fp32'}


def source(dtype, tiles, gated, act):
    "The kernel with the types of its arguments, as a call would give them"
    from triton.compiler import ASTSource
    kernel, (short, precision) = gpu_experts._experts_kernel, DTYPES[dtype]
    fixed = dict(SHARED=True, ACT=act, GATED=gated, UP_BIAS=True, GATE_BIAS=False, S_UP_BIAS=False, S_GATE_BIAS=False,
                 PRECISION=precision, **tiles)
    kinds = {'tokens': '*i32', 'counts': '*i32', 'out': '*fp32', **NUMBERS, **dict.fromkeys(fixed, 'constexpr')}
    types = {name: kinds.get(name, f'*{short}') for name in kernel.arg_names}
    place = kernel.arg_names.index
    even = [name for name, kind in types.items() if kind.startswith('*') or name in ('D', 'n', 'r')]
    return ASTSource(fn=kernel, signature=types, constexprs={(place(name),): value for name, value in fixed.items()},
                     attrs={(place(name),): [['tt.divisibility', 16]] for name in even})


def used(cubin):
    "Registers of a thread and bytes that did not fit, as NVIDIA's tool reads them from the binary"
    import triton
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, '--dump-resource-usage', file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r'(REG|STACK):(\d+)', said.stdout))
    return {'registers': int(found['REG']), 'spilled': int(found['STACK'])}


def compiled(chip, dtype, tokens, size, gated, act):
    "One row: the kernel that would run"
    import triton
    from triton.backends.compiler import GPUTarget
    capability, most = CHIPS[chip]
    tiles = gpu_experts._tiles(tokens, size, dtype == 'float32', capability >= 90)
    warps = tiles.pop('num_warps')
    made = triton.compile(source(dtype, tiles, gated, act), target=GPUTarget('cuda', capability, 32),
                          options={'num_warps': warps})
    products = next((word for word in ('wgmma', 'mma') if f'{word}.' in made.asm['ptx']), 'fma')
    return {'chip': chip, 'capability': capability / 10, 'dtype': dtype, 'tokens': tokens, 'expert_size': size,
            'gated': gated, 'act': act, **tiles, 'warps': warps, 'products': products, **used(made.asm['cubin']),
            'shared_bytes': made.metadata.shared, 'fits': made.metadata.shared <= most * 1024}


def parse(argv):
    "The options"
    parser = command_line(__doc__)
    parser.add_argument('--chips', nargs='+', default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument('--dtypes', nargs='+', default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument('--tokens', nargs='+', type=int, default=[1, 64, 8192])
    parser.add_argument('--sizes', nargs='+', type=int, default=[32, 128], help='neurons of an expert')
    output_option(parser)
    return parser.parse_args(argv)


def main(argv=None):
    "Compile, print and write"
    args = parse(argv)
    found = {'command': command_of('gpu_kernels', argv, args.out), 'provenance': dict(provenance()), 'rows': []}
    kinds = ((False, 'relu'), (True, 'silu'), (True, 'gelu'))
    for chip, dtype, tokens, size, kind in product(args.chips, args.dtypes, args.tokens, args.sizes, kinds):
        row = compiled(chip, dtype, tokens, size, *kind)
        found['rows'].append(row)
        print('{chip:>8} {dtype:>8} {tokens:>5} tokens, experts of {expert_size:>3}, {act}: {BM} x {BN} x {BD}, {products}, '
              '{registers} registers, {spilled} bytes spilled, {shared_bytes} shared'.format(**row), flush=True)
        write(found, args.out)


if __name__ == '__main__':
    main()
