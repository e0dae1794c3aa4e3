"""Hold the notebooks to the house style: one line per finding, exit code 1 if there is any.

Each rule is one function: it takes a `Notebook` (or the whole `Repo`) and yields what it finds. The docstring of the
function is the rule. `tests/test_check_nbs.py` proves for every rule that it can fail.
"""
import argparse
import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

EXPORT = {'export', 'exports', 'exporti'}
TIERS = {'slow', 'cuda', 'online'}
FLAGS = EXPORT | TIERS | {'hide', 'default_exp', 'eval'}
LAYOUT_OWNERS = {'arch', 'families'}
MAX_CELLS, MAX_SYMBOLS, MAX_EXPORT_LINES, MAX_LINE = 80, 12, 40, 120
MAX_TEXT, MAX_HTML, MAX_IMAGE, MAX_NOTEBOOK = 8_000, 40_000, 400_000, 2_000_000
SHOWN_WITHIN = 3

LAYOUT = re.compile(
    r'\b(?:[qkvo]_proj|out_proj|qkv_proj|in_proj|query_key_value|c_attn|c_proj|c_fc|gate_proj|up_proj|down_proj|fc[12]'
    r'|lin[12]|[qkv]_lin|out_lin|SelfAttention|EncDecAttention|DenseReluDense|wi_[01])\b'
    r'|intermediate\.dense|output\.dense|attention\.(?:self|output)\b|encoder\.layer\b')
# Not after a letter, digit or one of `.:/-`: those are relative paths and addresses.
ABSOLUTE = re.compile(
    r'(?<![\w.:/<-])(?:/(?:home|root|tmp|work|Users|mnt|opt|var|usr|srv|data|content|workspace)/[\w.-]+|[A-Z]:\\\w+)')
UNFINISHED = re.compile(r'\b(?:TODO|FIXME|XXX)\b')
NOT_SHIPPED = re.compile(r'\bNotImplementedError\b|\bplaceholder\b|\bexcept\s*:|\bpickle\b|\btorch\.load\(')
DEBRIS = re.compile(r'\r|\d+%\||[█▏▎▍▌▋▊▉]|\b\w*Warning: | at 0x[0-9a-f]{6,}')
MODULE_DUMP = re.compile(r'^\s+\(\w+\): \w+\(', re.M)
COLAB = re.compile(r'https://colab\.research\.google\.com/github/[^\s)"\'>]+')
BADGE = re.compile(r'<a href="https://colab\.research\.google\.com/github/[^"]+"><img [^>]*\balt="[^"]+"></a>')
GIT_INSTALL = re.compile(r'git\+(https://[^\s"\'@#]+)')
NAME = re.compile(r'(\d\d)_[a-z][a-z0-9_]*')

Hits = Iterator[tuple[str, str]]  # (cell id, what is wrong)


@dataclass(frozen=True)
class Cell:
    "One cell, with its nbdev flags taken apart"
    id: str
    kind: str
    source: str
    outputs: tuple = ()

    @cached_property
    def flags(self) -> dict[str, str]:
        "Leading `#|` lines as {name: rest of the line}"
        found = {}
        for line in self.source.splitlines():
            if not line.startswith('#|'): break
            name, _, rest = line[2:].strip().replace(':', ' ', 1).partition(' ')
            found[name] = rest.strip()
        return found

    @property
    def is_code(self) -> bool: return self.kind == 'code'

    @property
    def is_export(self) -> bool: return self.is_code and bool(EXPORT & set(self.flags))

    @property
    def is_visible(self) -> bool: return self.is_code and not (EXPORT | {'hide', 'default_exp'}) & set(self.flags)

    @property
    def runs(self) -> bool:
        "Does the plain tier run this cell?"
        return self.is_code and not TIERS & set(self.flags) and self.flags.get('eval') != 'false'

    @cached_property
    def tree(self) -> list[ast.stmt]:
        "Statements of a code cell, without magics; empty where it does not parse"
        try: return ast.parse(self.python).body
        except SyntaxError: return []

    @property
    def python(self) -> str:
        "The source without magics and shell lines"
        return '\n'.join(o for o in self.source.splitlines() if not re.match(r'\s*[%!]', o)) if self.is_code else ''

    @property
    def imports(self) -> list[ast.stmt]:
        "Import statements at any depth"
        return [n for s in self.tree for n in ast.walk(s) if isinstance(n, ast.Import | ast.ImportFrom)]


@dataclass(frozen=True)
class Notebook:
    "A notebook as the rules see it"
    path: Path
    root: Path
    cells: tuple[Cell, ...]
    size: int

    @property
    def label(self) -> str: return self.path.relative_to(self.root).as_posix()

    @property
    def number(self) -> int | None:
        "The leading number of a module notebook; None for the index, results and tutorials"
        m = NAME.fullmatch(self.path.stem)
        return int(m[1]) if m and self.path.parent.name == 'nbs' else None

    @cached_property
    def module(self) -> str | None:
        "Name of the exported module"
        return next((c.flags['default_exp'] for c in self.cells if 'default_exp' in c.flags), None)

    @property
    def exported(self) -> list[Cell]: return [c for c in self.cells if c.is_export]

    @property
    def code(self) -> list[Cell]: return [c for c in self.cells if c.is_code]


@dataclass(frozen=True)
class Repo:
    "All notebooks and the settings"
    root: Path
    notebooks: tuple[Notebook, ...]

    @cached_property
    def settings(self) -> dict[str, str]:
        "settings.ini"
        ini = ConfigParser(delimiters=['='])
        ini.read(self.root/'settings.ini', encoding='utf-8')
        return dict(ini['DEFAULT'])

    @cached_property
    def numbers(self) -> dict[str, int]:
        "Number of the notebook behind each module"
        return {nb.module: nb.number for nb in self.notebooks if nb.module and nb.number is not None}


@dataclass(frozen=True)
class Finding:
    "One line of the report"
    file: str
    cell: str
    rule: str
    text: str

    def __str__(self): return f"{self.file}{'#' + self.cell if self.cell else ''}: {self.rule}: {self.text}"


NOTEBOOK_RULES: list[Callable[[Notebook], Hits]] = []
REPO_RULES: list[Callable[[Repo], Iterator[tuple[str, str, str]]]] = []


def notebook_rule(f): NOTEBOOK_RULES.append(f); return f
def repo_rule(f): REPO_RULES.append(f); return f


# Form of a notebook

@notebook_rule
def cell_ids(nb: Notebook) -> Hits:
    "Every cell has an id of its own: ids are written into the modules, so the export check needs them stable"
    for i, c in enumerate(nb.cells):
        if not c.id: yield '', f'cell {i} has no id'
    for id_, n in Counter(c.id for c in nb.cells if c.id).items():
        if n > 1: yield id_, f'{n} cells share this id'


@notebook_rule
def title(nb: Notebook) -> Hits:
    "The first cell is an H1 and a one-line `>` blurb, nothing else: nbdev drops the rest from the page"
    first = nb.cells[0] if nb.cells else Cell('', 'none', '')
    lines = [o for o in first.source.splitlines() if o.strip()]
    if first.kind != 'markdown' or not lines or not lines[0].startswith('# '):
        yield first.id, 'the first cell must be markdown that starts with `# Title`'
    elif len(lines) < 2 or not lines[1].startswith('> '):
        yield first.id, 'a one-line `> blurb` must follow the title'
    elif len(lines) > 2:
        yield first.id, f'only title and blurb belong here, the site drops the rest: {lines[2][:40]!r}'


@notebook_rule
def head(nb: Notebook) -> Hits:
    "A module notebook goes on with `default_exp`, words on what goes in and out, and an export cell of imports only"
    if nb.module is None:
        if nb.exported: yield nb.exported[0].id, 'exports without `#| default_exp`'
        return
    code = [c for c in nb.code if c.flags.get('eval') != 'false']
    if 'default_exp' not in code[0].flags: yield code[0].id, '`#| default_exp` must be the first code cell'
    if not nb.exported: return
    start = nb.cells.index(nb.exported[0])
    if sum(c.kind == 'markdown' for c in nb.cells[:start]) < 2:
        yield nb.exported[0].id, 'before it, a markdown cell says what goes in, what comes out and who uses it'
    if not all(isinstance(s, ast.Import | ast.ImportFrom) for s in nb.exported[0].tree):
        yield nb.exported[0].id, 'the first export cell must hold imports only'


@notebook_rule
def tail(nb: Notebook) -> Hits:
    "A module notebook ends with a hidden `nbdev.nbdev_export()`"
    if nb.module is None: return
    last = nb.cells[-1]
    if 'hide' not in last.flags or 'nbdev_export()' not in last.source:
        yield last.id, 'the last cell must be `#| hide` and call `nbdev.nbdev_export()`'


@notebook_rule
def flags(nb: Notebook) -> Hits:
    "Flags come from a closed list, at the top of the cell; `eval: false` is for install cells"
    for c in nb.code:
        unknown = set(c.flags) - FLAGS
        if unknown: yield c.id, f"unknown flag {', '.join(sorted(unknown))}; known: {' '.join(sorted(FLAGS))}"
        late = [o for o in c.source.splitlines()[len(c.flags):] if o.lstrip().startswith('#|')]
        if late: yield c.id, f'flag below the top of the cell has no effect: {late[0]!r}'
        if 'eval' in c.flags and not (c.flags['eval'] == 'false' and 'pip install' in c.source):
            yield c.id, '`eval: false` is for install cells only; flag the cell slow, cuda or online'


@notebook_rule
def no_skip_exec(nb: Notebook) -> Hits:
    "No notebook switches its own execution off"
    for c in nb.cells:
        if 'skip_exec' in c.source or 'skip_showdoc' in c.source: yield c.id, 'a notebook may not skip its execution'


@notebook_rule
def notebook_size(nb: Notebook) -> Hits:
    "A notebook stays small enough to read: cells, public names and bytes"
    if len(nb.cells) > MAX_CELLS: yield '', f'{len(nb.cells)} cells, at most {MAX_CELLS}: split it'
    names = public_names(nb)
    if len(names) > MAX_SYMBOLS: yield '', f"{len(names)} public names, at most {MAX_SYMBOLS}: {', '.join(names)}"
    if nb.size > MAX_NOTEBOOK: yield '', f'{nb.size:,} bytes, at most {MAX_NOTEBOOK:,}'


# Exported code

def definitions(cell: Cell) -> list[ast.stmt]:
    "Public functions and classes that an export cell defines, patched methods included"
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [s for s in cell.tree if isinstance(s, kinds) and not s.name.startswith('_') and 'exporti' not in cell.flags]


def public_names(nb: Notebook) -> list[str]:
    "`__all__` of the exported module, read without importing it"
    if nb.module is None: return []
    path = nb.root/'tpa_nb'/f'{nb.module}.py'
    if not path.exists(): return []
    for s in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(s, ast.Assign) and getattr(s.targets[0], 'id', '') == '__all__': return ast.literal_eval(s.value)
    return []


@notebook_rule
def parses(nb: Notebook) -> Hits:
    "Code cells parse as Python, and exported ones hold no magics"
    for c in nb.code:
        try: ast.parse(c.python)
        except SyntaxError as e: yield c.id, f'does not parse: {e.msg}'
        if c.is_export and any(re.match(r'[%!]', o) for o in c.source.splitlines()):
            yield c.id, 'a magic in an exported cell'


@notebook_rule
def exported_module(nb: Notebook) -> Hits:
    "What a notebook exports is there as a module"
    if nb.module and nb.exported and not (nb.root/'tpa_nb'/f'{nb.module}.py').exists():
        yield '', f'tpa_nb/{nb.module}.py is missing: run nbdev_export'


@notebook_rule
def export_length(nb: Notebook) -> Hits:
    "An export cell has at most 40 lines"
    for c in nb.exported:
        n = len(c.source.splitlines()) - len(c.flags)
        if n > MAX_EXPORT_LINES: yield c.id, f'{n} lines, at most {MAX_EXPORT_LINES}'


@notebook_rule
def one_symbol(nb: Notebook) -> Hits:
    "One public function, class or patched method per export cell; constants, helpers, small properties may share one"
    for c in nb.exported:
        names = [d.name for d in definitions(c)]
        if len(names) > 1 and not all(map(is_property, definitions(c))):
            yield c.id, f"one public symbol per export cell, found {', '.join(names)}"


def is_property(d: ast.stmt) -> bool:
    "Is `d` a patched property?"
    return any('as_prop' in ast.unparse(o) or ast.unparse(o) == 'property' for o in d.decorator_list)


@notebook_rule
def used(nb: Notebook) -> Hits:
    "Every public name is used by a cell of its notebook that runs in the plain tier and is not exported itself"
    seen = {name for c in nb.code if c.runs and not c.is_export for s in c.tree for name in names_in(s)}
    for name in public_names(nb):
        if name not in seen: yield '', f'`{name}` is exported and never used in a cell of this notebook'


def names_in(tree: ast.AST) -> Iterator[str]:
    "Names and attributes that a statement reads"
    for n in ast.walk(tree):
        if isinstance(n, ast.Name): yield n.id
        if isinstance(n, ast.Attribute): yield n.attr


@notebook_rule
def shown_soon(nb: Notebook) -> Hits:
    "Each public symbol is followed, within three code cells, by a visible one that runs something"
    for i, c in enumerate(nb.code):
        if not c.is_export or not definitions(c): continue
        after = nb.code[i + 1:i + 1 + SHOWN_WITHIN]
        if not any(o.is_visible and o.tree for o in after):
            yield c.id, f'`{definitions(c)[0].name}` is not shown or tested within {SHOWN_WITHIN} code cells'


@notebook_rule
def documented(nb: Notebook) -> Hits:
    "A public function or class has a docstring, and types on its parameters"
    for c in nb.exported:
        for d in definitions(c):
            if not ast.get_docstring(d): yield c.id, f'`{d.name}` has no docstring'
            if isinstance(d, ast.ClassDef): continue
            args = [a for a in d.args.posonlyargs + d.args.args + d.args.kwonlyargs if a.arg not in ('self', 'cls')]
            bare = [a.arg for a in args if a.annotation is None]
            if bare: yield c.id, f"`{d.name}`: no type on {', '.join(bare)}"


@notebook_rule
def mutable_defaults(nb: Notebook) -> Hits:
    "No default argument is a list, dict, set or call, which is made once and shared"
    for c in nb.exported:
        for f in (n for s in c.tree for n in ast.walk(s) if isinstance(n, ast.FunctionDef)):
            for d in [*f.args.defaults, *filter(None, f.args.kw_defaults)]:
                frozen = isinstance(d, ast.Call) and getattr(d.func, 'id', '') in ('tuple', 'frozenset')
                if isinstance(d, ast.List | ast.Dict | ast.Set | ast.Call) and not frozen:
                    yield c.id, f'`{f.name}`: mutable or computed default `{ast.unparse(d)}`'


@notebook_rule
def unused_imports(nb: Notebook) -> Hits:
    "Exported imports are explicit and used"
    seen = {name for c in nb.exported for s in c.tree for name in names_in(s)}
    text = ' '.join(n.value for c in nb.exported for s in c.tree for n in ast.walk(s)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str))
    for c in nb.exported:
        for alias in (a for s in c.imports for a in s.names):
            name = (alias.asname or alias.name).split('.')[0]
            if name == '*': yield c.id, 'star import in an exported cell'
            elif name not in seen and not re.search(rf'\b{name}\b', text): yield c.id, f'`{name}` is imported, not used'


@notebook_rule
def layout_names(nb: Notebook) -> Hits:
    "Names of Hugging Face modules stand in `arch` and `families`, nowhere else in exported code"
    if nb.module in LAYOUT_OWNERS: return
    for c in nb.exported:
        found = LAYOUT.search(c.source)
        if found: yield c.id, f'`{found[0]}` is knowledge of a layout: ask `Arch` for it'


@notebook_rule
def unfinished(nb: Notebook) -> Hits:
    "Nothing is left for later, and exported code has no bare except, no stub and no pickle"
    for c in nb.cells:
        found = UNFINISHED.search(c.source) or (NOT_SHIPPED.search(c.source) if c.is_export else None)
        if found: yield c.id, f'`{found[0]}`'


# Cells and what they leave behind

@notebook_rule
def imports_alone(nb: Notebook) -> Hits:
    "Imports have cells of their own, outside cuda and online cells: a docs build runs every cell that imports"
    for c in nb.code:
        if not c.imports or c.is_export or 'nbdev_export()' in c.source: continue
        if TIERS & set(c.flags): yield c.id, f"an import in a cell flagged {', '.join(TIERS & set(c.flags))}"
        other = [s for s in c.tree if not isinstance(s, ast.Import | ast.ImportFrom) and not is_setup(s)]
        if other: yield c.id, f'imports need a cell of their own, found `{ast.unparse(other[0]).splitlines()[0]}`'


def is_setup(s: ast.stmt) -> bool:
    "A seed, a thread count, a log level: calls that may stand beside the imports of the tests"
    return isinstance(s, ast.Expr) and isinstance(s.value, ast.Call) and 'import' not in ast.unparse(s)


@notebook_rule
def line_length(nb: Notebook) -> Hits:
    "Lines of code have at most 120 characters"
    for c in nb.code:
        longest = max(map(len, c.source.splitlines()), default=0)
        if longest > MAX_LINE: yield c.id, f'a line of {longest} characters, at most {MAX_LINE}'


@notebook_rule
def absolute_paths(nb: Notebook) -> Hits:
    "No path of somebody's machine, in sources or outputs"
    for c in nb.cells:
        found = ABSOLUTE.search('\n'.join([c.source, *(t for _, t in texts(c))]))
        if found: yield c.id, f'`{found[0]}`'


def texts(cell: Cell) -> Iterator[tuple[str, str]]:
    "Stored outputs that are text, as (mime type or stream name, text)"
    for o in cell.outputs:
        if o['output_type'] == 'stream': yield o['name'], ''.join(o['text'])
        for mime, data in o.get('data', {}).items():
            if mime.startswith('text/'): yield mime, ''.join(data)


@notebook_rule
def stored_errors(nb: Notebook) -> Hits:
    "No stored output is an error"
    for c in nb.code:
        for o in c.outputs:
            if o['output_type'] == 'error': yield c.id, f"{o['ename']}: {o['evalue'][:60]}"


@notebook_rule
def output_size(nb: Notebook) -> Hits:
    "Outputs are small: a table or a figure"
    for c in nb.code:
        for mime, text in texts(c):
            limit = MAX_HTML if mime == 'text/html' else MAX_TEXT
            if len(text) > limit: yield c.id, f'{mime} output of {len(text):,} characters, at most {limit:,}'
        for mime, data in ((m, d) for o in c.outputs for m, d in o.get('data', {}).items() if m.startswith('image/')):
            n = len(''.join(data))
            if n > MAX_IMAGE: yield c.id, f'{mime} output of {n:,} characters, at most {MAX_IMAGE:,}'


@notebook_rule
def tidy_outputs(nb: Notebook) -> Hits:
    "No progress bars, warnings, addresses in memory, dumps of modules or widgets in stored outputs"
    for c in nb.code:
        for kind, text in texts(c):
            found = DEBRIS.search(text)
            if found: yield c.id, f'{kind} output holds {found[0]!r}'
            elif kind == 'stderr': yield c.id, f'output on stderr: {text.strip()[:60]!r}'
            if len(MODULE_DUMP.findall(text)) > 5: yield c.id, 'a printed model'
        if any('widget' in mime for o in c.outputs for mime in o.get('data', {})): yield c.id, 'a widget'


@notebook_rule
def has_outputs(nb: Notebook) -> Hits:
    "A notebook that exports shows something: at least one visible cell has a stored output"
    visible = [c for c in nb.code if c.is_visible and c.tree]
    if nb.exported and visible and not any(c.outputs for c in visible):
        yield '', 'no visible cell has a stored output: execute it with tools/run_nbs.py'


# The repository

@repo_rule
def file_names(repo: Repo):
    "`NN_name.ipynb` exports `name`, each number stands once, and no notebook is a copy or a leftover"
    for n, count in Counter(nb.number for nb in repo.notebooks if nb.number is not None).items():
        if count > 1:
            same = [nb for nb in repo.notebooks if nb.number == n]
            yield same[1].label, '', f"number {n:02} stands also in {same[0].label}"
    for nb in repo.notebooks:
        if nb.module and not (nb.number is not None and nb.path.stem == f'{nb.number:02}_{nb.module}'):
            yield nb.label, '', f'exports `{nb.module}`, so it must be nbs/NN_{nb.module}.ipynb'
        if re.search(r'[_-](old|copy\d*|new|v\d+|bak)$|\s', nb.path.stem): yield nb.label, '', 'looks like a leftover'


@repo_rule
def import_order(repo: Repo):
    "A module notebook imports only from notebooks with lower numbers"
    for nb in repo.notebooks:
        if nb.module is None or nb.number is None: continue
        for c in nb.code:
            for name in sorted({m for s in c.imports for m in package_modules(s)} - {nb.module}):
                if name not in repo.numbers: yield nb.label, c.id, f'imports tpa_nb.{name}, which is no lower notebook'
                elif repo.numbers[name] >= nb.number: yield nb.label, c.id, f'imports the later notebook of `{name}`'


def package_modules(s: ast.stmt) -> set[str]:
    "Modules of this package that an import statement names"
    names = [a.name for a in s.names]
    if isinstance(s, ast.ImportFrom):
        base = f'tpa_nb.{s.module}' if s.level and s.module else 'tpa_nb' if s.level else s.module
        names = [f'{base}.{n}' for n in names] if base == 'tpa_nb' else [base]
    return {n.split('.')[1] for n in names if n.startswith('tpa_nb.') and n != 'tpa_nb.__version__'}


@repo_rule
def sidebar(repo: Repo):
    "The sidebar lists every notebook once, and nothing that is not there"
    config = yaml.safe_load((repo.root/'_quarto.yml').read_text(encoding='utf-8'))
    listed = Counter(entries(config['website']['sidebar']['contents']))
    there = {nb.path.relative_to(repo.root/'nbs').as_posix() for nb in repo.notebooks}
    for name in sorted(there - set(listed)): yield '_quarto.yml', '', f'{name} is not in the sidebar'
    for name in sorted(set(listed) - there): yield '_quarto.yml', '', f'{name} is in the sidebar and not in nbs'
    for name, n in sorted(listed.items()):
        if n > 1: yield '_quarto.yml', '', f'{name} stands {n} times in the sidebar'


def entries(contents: list) -> Iterator[str]:
    "Files that a sidebar lists, in its sections too"
    for o in contents:
        if isinstance(o, str): yield o
        else:
            yield from (o[k] for k in ('href', 'file') if k in o)
            yield from entries(o.get('contents', []))


@repo_rule
def index(repo: Repo):
    "The index, where there is one, names every other notebook"
    named = {nb.path.relative_to(repo.root/'nbs').as_posix(): nb for nb in repo.notebooks}
    page = named.pop('index.ipynb', None)
    links = '' if page is None else '\n'.join(c.source for c in page.cells)
    for name in sorted(named):
        if page is not None and f']({name})' not in links: yield page.label, '', f'{name} is not named'


@repo_rule
def addresses(repo: Repo):
    "Colab and install links follow settings.ini: `python tools/set_address.py` writes them"
    s = repo.settings
    for nb in repo.notebooks:
        colab = f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/{nb.label}"
        for c in nb.cells:
            wrong = [u for u in COLAB.findall(c.source) if u != colab]
            wrong += [u for u in GIT_INSTALL.findall(c.source) if u != s['git_url'] and u != f"{s['git_url']}.git"]
            if wrong: yield nb.label, c.id, f'{wrong[0]} is not the address in settings.ini'


@repo_rule
def colab(repo: Repo):
    "A tutorial opens with a Colab badge, and a badge comes with one hidden cell that installs the package, in Colab only"
    s = repo.settings
    line = f'!test -e /content && pip install -q "{s["lib_name"]}[demo] @ git+{s["git_url"]}"'
    for nb in repo.notebooks:
        badges = [c for c in nb.cells if COLAB.search(c.source)]
        if not badges:
            if nb.path.parent.name == 'tutorials': yield nb.label, '', 'a tutorial has a Colab badge in its second cell'
            continue
        if badges != [nb.cells[1]] or not BADGE.search(badges[0].source):
            yield nb.label, badges[0].id, 'the badge stands once, in the second cell: <a href="..."><img ... alt="..."></a>'
        first = nb.code[0] if nb.code else badges[0]
        if not {'hide', 'eval'} <= set(first.flags) or line not in first.source.splitlines():
            yield nb.label, first.id, f'the first code cell must be hidden, with `eval: false` and the line {line}'


# The report

def read_notebook(path: Path, root: Path) -> Notebook:
    "Read a notebook as plain JSON, so that a missing id stays visible"
    text = path.read_text(encoding='utf-8')
    cells = (Cell(c.get('id', ''), c['cell_type'], ''.join(c['source']), tuple(c.get('outputs', ())))
             for c in json.loads(text)['cells'])
    return Notebook(path, root, tuple(cells), len(text.encode()))


def find_notebooks(root: Path) -> list[Path]:
    "Notebooks below `nbs`, without hidden and underscored ones"
    found = sorted((root/'nbs').rglob('*.ipynb'))
    return [p for p in found if not any(o.startswith(('_', '.')) for o in p.relative_to(root).parts)]


def check(root: Path) -> list[Finding]:
    "Apply every rule to the repository at `root`"
    repo = Repo(root, tuple(read_notebook(p, root) for p in find_notebooks(root)))
    found = [Finding(nb.label, cell, rule.__name__, text)
             for nb in repo.notebooks for rule in NOTEBOOK_RULES for cell, text in rule(nb)]
    return found + [Finding(file, cell, rule.__name__, text) for rule in REPO_RULES for file, cell, text in rule(repo)]


def main(argv: list[str] | None = None) -> int:
    "Print the findings; 1 if there are any"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[1], help='the repository')
    p.add_argument('--rules', action='store_true', help='list the rules and stop')
    args = p.parse_args(argv)
    if args.rules:
        for rule in [*NOTEBOOK_RULES, *REPO_RULES]: print(f'{rule.__name__:18}{rule.__doc__}')
        return 0
    root = args.root.resolve()
    found = check(root)
    for f in found: print(f)
    rules = len(NOTEBOOK_RULES) + len(REPO_RULES)
    print(f'{len(find_notebooks(root))} notebooks, {rules} rules, {len(found)} findings')
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())
