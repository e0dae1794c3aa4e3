"Run notebooks and store their outputs; cells flagged cuda, online or slow run only when asked for."
import argparse
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FLAGS = ('cuda', 'online', 'slow')


def skipped(cell, flags):
    "Is `cell` flagged with something that was not asked for?"
    found = set(re.findall(r'^#\|\s*(\w+)\s*$', cell.source, re.M)) & set(FLAGS)
    return bool(found - set(flags))


def run(path: Path, flags=(), timeout=1800):
    "Execute `path` in a fresh kernel and write the outputs back; flagged cells keep what they have"
    nb = nbformat.read(path, as_version=4)
    kept = {}
    for cell in nb.cells:
        if cell.cell_type == 'code' and skipped(cell, flags):
            kept[cell.id] = (cell.outputs, cell.execution_count)
            cell.metadata['tags'] = ['skip-run']
    client = NotebookClient(nb, timeout=timeout, kernel_name='python3', skip_cells_with_tag='skip-run',
                            resources={'metadata': {'path': str(path.parent)}})
    client.execute()
    for cell in nb.cells:
        cell.metadata.pop('tags', None)
        cell.metadata.pop('execution', None)
        if cell.id in kept:
            cell.outputs, cell.execution_count = kept[cell.id]
    nbformat.write(nb, path)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('notebooks', nargs='+', type=Path, help='notebooks to run')
    p.add_argument('--flags', default='', help="which flagged cells to run too, e.g. 'cuda slow'")
    args = p.parse_args()
    for nb_path in args.notebooks:
        run(nb_path, args.flags.split())
        print(f'ran {nb_path}')
