"""Check the docs without Quarto: nbdev's own processing, nbconvert to HTML, and every link and anchor inside the site.

The pages are written to a temporary folder, or to `--out` for reading. Quarto itself, which makes the real site, is not
needed and never called. Links to other sites are not followed.
"""
import argparse
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import nbformat
import yaml
from check_nbs import find_notebooks
from make_readme import settings
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r'(?<!\\)\]\(<?([^)\s>]+)>?(?:\s+"[^"]*")?\)|(?:href|src)="([^"]+)"')
HEADING = re.compile(r'^#{1,6}\s+(.*?)\s*#*\s*$', re.M)
IDS = re.compile(r'\{#([\w.-]+)|\bid="([\w.-]+)"')
CODE = re.compile(r'^(```+|~~~+).*?^\1[`~]*\s*$|(`+)(?!`).+?(?<!`)\2(?!`)', re.M | re.S)


@dataclass(frozen=True)
class Page:
    "One page of the site"
    source: str     # path of the notebook below nbs
    name: str       # path of the page below the site's root
    text: str       # its markdown: cells, and outputs that are markdown
    html: str       # the page as nbconvert renders it

    @property
    def anchors(self) -> set[str]:
        "Places on this page that a link can point to"
        plain = CODE.sub(lambda m: m[0].strip('`') if m[2] else '', self.text)
        return {slug(h) for h in HEADING.findall(plain)} | {a or b for a, b in IDS.findall(self.text)}

    @property
    def links(self) -> list[str]:
        "Targets of the links on this page, without those inside code"
        return [a or b for a, b in LINK.findall(CODE.sub('', self.text))]


def slug(heading: str) -> str:
    "The identifier that Pandoc makes of a heading"
    explicit = re.search(r'\{#([\w.-]+)', heading)
    if explicit: return explicit[1]
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading.lower())
    text = re.sub(r'\s', '-', re.sub(r'[^\w\s.-]', '', text))
    return re.sub(r'^[^a-z]+', '', text)


def process(path: Path):
    "The notebook at `path` after nbdev's processing for the docs, which runs exported cells and cells that import"
    from execnb.nbio import nb2str, read_nb
    from nbdev.processors import FilterDefaults
    nb = read_nb(path)
    FilterDefaults()(nb)
    return nbformat.reads(nb2str(nb), as_version=4)


def markdown(nb) -> str:
    "All markdown of a processed notebook"
    parts = []
    for cell in nb.cells:
        if cell.cell_type == 'markdown': parts.append(cell.source)
        for out in cell.get('outputs', []): parts.append(out.get('data', {}).get('text/markdown', ''))
    return '\n\n'.join(parts)


def page_name(source: str) -> str:
    "Where the notebook at `source` ends up on the site: without its number"
    from nbdev.doclinks import _nbpath2html
    return _nbpath2html(PurePosixPath(source)).as_posix()


def make_page(path: Path, nbs: Path) -> Page:
    "Process and render one notebook"
    source = path.relative_to(nbs).as_posix()
    nb = process(path)
    text = markdown(nb)
    nb.cells = [c for c in nb.cells if c.cell_type != 'raw']
    return Page(source, page_name(source), text, HTMLExporter().from_notebook_node(nb)[0])


def resolve(link: str, page: Page, site: str) -> tuple[str, str] | None:
    "Page and anchor that a link means, as paths of the site; None for a link that leaves it"
    folder = PurePosixPath('.') if link.startswith(f'{site}/') else PurePosixPath(page.name).parent
    link = link.removeprefix(f'{site}/')
    if re.match(r'[a-z][a-z+.-]*:', link): return None
    target, _, anchor = link.partition('#')
    if not target: return page.name, anchor
    path = os.path.normpath(folder/target)
    return (page_name(path) if path.endswith('.ipynb') else path), anchor


def broken_links(pages: list[Page], cfg: dict[str, str], root: Path) -> Iterator[str]:
    "Links into the site or the repository that lead nowhere"
    by_name = {p.name: p for p in pages}
    blob = f"{cfg['git_url']}/blob/{cfg['branch']}/"
    for page in pages:
        for link in page.links:
            if link.startswith(blob):
                if not (root/link.removeprefix(blob).partition('#')[0]).exists(): yield f'{page.source}: no file {link}'
                continue
            goal = resolve(link, page, cfg['doc_host'] + cfg['doc_baseurl'])
            if goal is None: continue
            name, anchor = goal
            if name not in by_name:
                if not (root/'nbs'/name).exists(): yield f'{page.source}: no page or file {link}'
            elif anchor and anchor not in by_name[name].anchors: yield f'{page.source}: no anchor {link}'


def config_problems(root: Path) -> Iterator[str]:
    "The stub includes the docs configuration, and the files that this one names are there"
    stub = yaml.safe_load((root/'nbs'/'_quarto.yml').read_text(encoding='utf-8'))
    if stub != {'metadata-files': ['../_quarto.yml', 'nbdev.yml']}:
        yield 'nbs/_quarto.yml must be the one line `metadata-files: [../_quarto.yml, nbdev.yml]`'
    top = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    css = top['format']['html']['css']
    if not (root/'nbs'/css).exists(): yield f'_quarto.yml: no stylesheet nbs/{css}'


def build(root: Path) -> tuple[list[Page], list[str]]:
    "All pages that could be made, and what went wrong"
    os.environ['IN_TEST'] = '1'  # nbdev's own mark: no export while notebooks are processed
    warnings.filterwarnings('ignore', 'Found cells containing imports')  # check_nbs judges these
    pages, problems = [], list(config_problems(root))
    for path in find_notebooks(root):
        try: pages.append(make_page(path, root/'nbs'))
        except Exception as e: problems.append(f'{path.name}: {e}')  # whatever a cell raises is the finding
    return pages, problems + list(broken_links(pages, settings(root), root))


def write(pages: list[Page], folder: Path) -> None:
    "Write the pages with links between notebooks turned into links between pages"
    for page in pages:
        path = folder/page.name
        path.parent.mkdir(parents=True, exist_ok=True)
        html = re.sub(r'href="([\w./-]+\.ipynb)', lambda m: f'href="{page_name(m[1])}', page.html)
        path.write_text(html, encoding='utf-8')


def main(argv: list[str] | None = None) -> int:
    "Build, check, print; 1 if anything is wrong"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--root', type=Path, default=ROOT, help='the repository')
    p.add_argument('--out', type=Path, help='folder for the pages; a temporary one if not given')
    args = p.parse_args(argv)
    os.chdir(args.root)  # nbdev finds settings.ini from here
    pages, problems = build(args.root.resolve())
    with tempfile.TemporaryDirectory() as tmp: write(pages, args.out or Path(tmp))
    for o in problems: print(o)
    print(f'{len(pages)} pages, {sum(len(o.links) for o in pages)} links, {len(problems)} problems')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
