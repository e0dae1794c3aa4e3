"Run notebooks and store their outputs; cells flagged cuda, online or slow run only when asked for."
import argparse
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FLAGS = ('cuda', 'online', 'slow')
# Stored outputs are read on the site: no progress bars in them, nothing fetched unless asked for.
QUIET = {'TQDM_DISABLE': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'TOKENIZERS_PARALLELISM': 'false',
         'PYTHONWARNINGS': 'ignore:IProgress not found,ignore:`is_gradient_checkpointing` is deprecated'}


def leading_flags(source: str) -> set[str]:
    "Names of the `#|` lines at the top of a cell"
    lines = []
    for line in source.splitlines():
        if not line.startswith('#|'): break
        lines.append(line)
    return {name for line in lines for name in re.findall(r'\w+', line)}


def skipped(cell, flags) -> bool:
    "Is `cell` flagged with something that was not asked for, or an install cell?"
    found = leading_flags(cell.source)
    return bool((found & set(FLAGS)) - set(flags)) or {'eval', 'false'} <= found


def environment(flags) -> dict[str, str]:
    "Environment of the kernel: quiet, and offline unless online cells were asked for"
    asked = {} if 'online' in flags else {'HF_HUB_OFFLINE': '1'}
    if 'cuda' not in flags: asked['DS_ACCELERATOR'] = 'cpu'  # or DeepSpeed prints that it found no GPU
    return {**os.environ, **QUIET, **asked}


def run(path: Path, flags=(), timeout=1800):
    "Execute `path` in a fresh kernel and write the outputs back; skipped cells keep what they have"
    nb = nbformat.read(path, as_version=4)
    kept = {}
    for cell in nb.cells:
        if cell.cell_type == 'code' and skipped(cell, flags):
            kept[cell.id] = (cell.outputs, cell.execution_count)
            cell.metadata['tags'] = ['skip-run']
    client = NotebookClient(nb, timeout=timeout, kernel_name='python3', skip_cells_with_tag='skip-run',
                            resources={'metadata': {'path': str(path.parent)}})
    client.execute(env=environment(flags))
    for cell in nb.cells:
        cell.metadata.pop('tags', None)
        cell.metadata.pop('execution', None)
        if cell.id in kept: cell.outputs, cell.execution_count = kept[cell.id]
    nbformat.write(nb, path)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('notebooks', nargs='+', type=Path, help='notebooks to run')
    p.add_argument('--flags', default='', help="which flagged cells to run too, e.g. 'cuda slow'")
    p.add_argument('--timeout', type=int, default=1800, help='seconds that one cell may take')
    args = p.parse_args()
    for nb_path in args.notebooks:
        run(nb_path, args.flags.split(), args.timeout)
        print(f'ran {nb_path}')
