"""Write the repository's address, as settings.ini has it, to the places that need it in full.

These are the Colab badges and install lines in the notebooks, and README.md. Everything else derives the address when
it runs. Change `user`, `repo` or `branch` in settings.ini, then run this once.
"""
import sys
from pathlib import Path

from check_nbs import COLAB, GIT_INSTALL, find_notebooks
from execnb.nbio import read_nb, write_nb
from make_readme import ROOT, settings, write


def readdress(text: str, label: str, cfg: dict[str, str]) -> str:
    "The source of a cell with the package's own addresses replaced; `label` is the notebook's path in the repository"
    colab = f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{label}"
    return GIT_INSTALL.sub(f"git+{cfg['git_url']}", COLAB.sub(colab, text))


def rewrite(path: Path, label: str, cfg: dict[str, str]) -> bool:
    "Readdress the notebook at `path`; was there anything to do?"
    nb = read_nb(path)
    new = [readdress(c.source, label, cfg) for c in nb.cells]
    if new == [c.source for c in nb.cells]: return False
    for cell, source in zip(nb.cells, new): cell.source = source
    write_nb(nb, path)
    return True


def main(root: Path = ROOT) -> int:
    "Rewrite the notebooks and the README; print what changed"
    cfg = settings(root)
    for path in find_notebooks(root):
        label = path.relative_to(root).as_posix()
        if rewrite(path, label, cfg): print(f'changed {label}')
    write(root)
    return 0


if __name__ == '__main__':
    sys.exit(main())
