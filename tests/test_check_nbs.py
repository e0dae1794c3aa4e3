"Every rule of tools/check_nbs.py can fail: a sound notebook passes them all, one broken on purpose fails its rule."
import copy
import json
from pathlib import Path

import check_nbs
import pytest

SETTINGS = """[DEFAULT]
user = someone
repo = tpa_nb
lib_name = tpa_nb
branch = main
git_url = https://github.com/%(user)s/%(repo)s
"""
MODULE = '''__all__ = ['double']
'''
DOUBLE = '''#| export
def double(
    x: float,  # A number
) -> float:    # Twice the number
    "Double `x`"
    return math.ldexp(x, 1)'''


def md(id_, source): return dict(id=id_, cell_type='markdown', metadata={}, source=source)


def code(id_, source, *outputs):
    return dict(id=id_, cell_type='code', metadata={}, execution_count=None, source=source, outputs=list(outputs))


def shown(text, mime='text/plain'):
    return dict(output_type='execute_result', execution_count=None, metadata={}, data={mime: text})


def stream(text, name='stdout'): return dict(output_type='stream', name=name, text=text)


def sound_notebook():
    "A notebook that breaks no rule"
    return dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[
        md('title', '# thing\n\n> Doubles numbers'),
        code('exp', '#| default_exp thing'),
        md('intro', 'In: a number. Out: its double.'),
        code('imports', '#| export\nimport math'),
        code('tests', '#| hide\nfrom fastcore.test import *\nrandom.seed(0)'),
        code('double', DOUBLE),
        code('show', 'double(2.)', shown('4.0')),
        code('tail', '#| hide\nimport nbdev; nbdev.nbdev_export()')])


class House:
    "A repository with one sound notebook, to be broken"
    def __init__(self, root: Path):
        self.root = root
        self.nb = sound_notebook()
        self.cells = self.nb['cells']
        self.extra = {}  # other notebooks by path below nbs
        self.listed = ['00_thing.ipynb']
        self.module = MODULE

    def __getitem__(self, id_): return next(c for c in self.cells if c['id'] == id_)

    def insert(self, before, cell): self.cells.insert(self.cells.index(self[before]), cell)

    def write(self):
        "Write the files and return the findings"
        (self.root/'nbs').mkdir(exist_ok=True)
        (self.root/'tpa_nb').mkdir(exist_ok=True)
        (self.root/'settings.ini').write_text(SETTINGS)
        sidebar = {'contents': [{'section': 'All', 'contents': self.listed}]}
        (self.root/'_quarto.yml').write_text(json.dumps({'website': {'sidebar': sidebar}}))
        if self.module: (self.root/'tpa_nb'/'thing.py').write_text(self.module)
        for name, nb in {'00_thing.ipynb': self.nb, **self.extra}.items():
            path = self.root/'nbs'/name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(nb))
        return check_nbs.check(self.root)


@pytest.fixture
def house(tmp_path): return House(tmp_path)


def second_notebook(house, name='01_other.ipynb', **replaced):
    "Add a copy of the sound notebook that exports `other`, with some sources replaced"
    nb = copy.deepcopy(house.nb)
    for c in nb['cells']:
        c['source'] = replaced.get(c['id'], c['source'].replace('default_exp thing', 'default_exp other'))
    house.extra[name] = nb
    house.listed.append(name)
    (house.root/'tpa_nb').mkdir(exist_ok=True)


COLAB = 'https://colab.research.google.com/github/someone/tpa_nb/blob/main/nbs'
INSTALL = '!test -e /content && pip install -q "tpa_nb[demo] @ git+https://github.com/someone/tpa_nb"'


def badge(path, address=COLAB):
    "A Colab badge for the notebook at `path` below nbs"
    return f'<a href="{address}/{path}"><img src="https://example.org/badge.svg" alt="Open in Colab"></a>'


def tutorial(house, badge=badge('tutorials/first.ipynb'), install=INSTALL, flags='#| hide\n#| eval: false\n'):
    "Add a tutorial, sound unless something is given"
    cells = [md('t', '# first\n\n> Blurb'), md('b', f'{badge}\n\nWords.'), code('i', flags + install), code('c', '1 + 1')]
    house.extra['tutorials/first.ipynb'] = dict(house.nb, cells=cells)
    house.listed.append('tutorials/first.ipynb')
    return cells


BREAKS = {}


def breaks(rule, *more):
    "Register a way to break `rule`; `more` are rules that cannot help failing with it"
    def add(f): BREAKS.setdefault(rule, []).append((f, {rule, *more})); return f
    return add


@breaks('cell_ids')
def id_missing(h): h['intro'].pop('id')


@breaks('cell_ids')
def id_twice(h): h['intro']['id'] = 'title'


@breaks('title')
def no_blurb(h): h['title']['source'] = '# thing'


@breaks('title', 'head')
def no_title(h): del h.cells[0]


@breaks('title')
def lost_words(h): h['title']['source'] += '\n\nWords that the site would drop.'


@breaks('head')
def no_intro(h): h.cells.remove(h['intro'])


@breaks('head')
def late_default_exp(h): h.insert('exp', code('early', 'print(1)', stream('1\n')))


@breaks('head')
def first_export_works(h): h['imports']['source'] += '\nE = math.e'


@breaks('head', 'used')
def no_default_exp(h): h.cells.remove(h['exp']); h.cells.remove(h['tail'])


@breaks('tail')
def no_tail(h): h.cells.remove(h['tail'])


@breaks('tail')
def shown_tail(h): h['tail']['source'] = 'import nbdev; nbdev.nbdev_export()'


@breaks('flags')
def unknown_flag(h): h['show']['source'] = '#| notest\ndouble(2.)'


@breaks('flags')
def late_flag(h): h['show']['source'] = 'double(2.)\n#| hide'


@breaks('flags')
def eval_false(h): h.insert('tail', code('rot', '#| eval: false\ndouble(3.)'))


@breaks('no_skip_exec')
def skipped(h): h.insert('intro', dict(id='fm', cell_type='raw', metadata={}, source='---\nskip_exec: true\n---'))


@breaks('notebook_size')
def many_cells(h):
    for i in range(check_nbs.MAX_CELLS): h.insert('tail', md(f'more{i}', 'More words.'))


@breaks('notebook_size')
def many_names(h):
    names = [f'n{i}' for i in range(check_nbs.MAX_SYMBOLS + 1)]
    h.module = f'__all__ = {names}\n'
    h['show']['source'] = f"[{', '.join(names)}]"


@breaks('parses', 'used', 'shown_soon')
def syntax_error(h): h['show']['source'] = 'double(2.'


@breaks('parses')
def exported_magic(h): h['imports']['source'] += '\n%matplotlib inline'


@breaks('exported_module')
def not_exported(h): h.module = ''


@breaks('export_length')
def long_cell(h): h['double']['source'] += '\n' + '\n'.join(f'A{i} = {i}' for i in range(check_nbs.MAX_EXPORT_LINES))


@breaks('one_symbol')
def two_symbols(h): h['double']['source'] += '\n\n' + DOUBLE.removeprefix('#| export\n').replace('double', 'twice')


@breaks('used')
def unused_symbol(h): h.module = "__all__ = ['double', 'triple']\n"


@breaks('used')
def used_on_a_gpu_only(h):
    h['show']['source'] = '#| cuda\ndouble(2.)'
    h.insert('show', code('plain', '1 + 1', shown('2')))


@breaks('shown_soon', 'has_outputs')
def hidden_tests_only(h): h['show']['source'] = '#| hide\ndouble(2.)'


@breaks('documented')
def no_docstring(h): h['double']['source'] = DOUBLE.replace('    "Double `x`"\n', '')


@breaks('documented')
def no_type(h): h['double']['source'] = DOUBLE.replace('x: float', 'x')


@breaks('mutable_defaults')
def shared_list(h): h['double']['source'] = DOUBLE.replace('x: float,', 'x: float, y: list = [],')


@breaks('unused_imports')
def unused(h): h['imports']['source'] += '\nimport json'


@breaks('unused_imports')
def star(h): h['imports']['source'] += '\nfrom json import *'


@breaks('layout_names')
def layout(h): h['double']['source'] += "\nQUERY = 'q_proj'"


@breaks('unfinished')
def todo(h): h['intro']['source'] += ' ' + 'TO' + 'DO: more.'


@breaks('unfinished')
def stub(h): h['double']['source'] = DOUBLE.replace('return math.ldexp(x, 1)', 'raise NotImplementedError(math)')


@breaks('imports_alone')
def mixed_import(h): h.insert('show', code('mixed', 'import json\nn = json.loads("1")'))


@breaks('imports_alone')
def cuda_import(h): h.insert('tail', code('gpu', '#| cuda\nimport json'))


@breaks('line_length')
def long_line(h): h['show']['source'] += ' # ' + 'x' * check_nbs.MAX_LINE


@breaks('absolute_paths')
def path_in_source(h): h['show']['source'] += "\nopen('/home/someone/x')"


@breaks('absolute_paths')
def path_in_output(h): h['show']['outputs'] = [stream('read /home/me/x.csv\n')]


@breaks('stored_errors')
def stored_error(h):
    h['show']['outputs'] = [dict(output_type='error', ename='ValueError', evalue='no', traceback=[])]


@breaks('output_size')
def long_output(h): h['show']['outputs'] = [stream('x' * (check_nbs.MAX_TEXT + 1))]


@breaks('output_size')
def large_image(h): h['show']['outputs'] = [shown('A' * (check_nbs.MAX_IMAGE + 1), 'image/png')]


@breaks('tidy_outputs')
def progress_bar(h): h['show']['outputs'] = [stream('100%|##########| 3/3')]


@breaks('tidy_outputs')
def warning(h): h['show']['outputs'] = [stream('careful\n', 'stderr')]


@breaks('tidy_outputs')
def dump(h): h['show']['outputs'] = [shown('\n'.join(f'  ({i}): Linear(in_features=1)' for i in range(9)))]


@breaks('has_outputs')
def no_outputs(h): h['show']['outputs'] = []


@breaks('file_names')
def same_number(h):
    second_notebook(h, '00_other.ipynb')
    (h.root/'tpa_nb'/'other.py').write_text(MODULE)


@breaks('file_names')
def other_name(h):
    second_notebook(h, '01_another.ipynb')
    (h.root/'tpa_nb'/'other.py').write_text(MODULE)


@breaks('import_order', 'unused_imports')
def imports_later(h):
    second_notebook(h)
    (h.root/'tpa_nb'/'other.py').write_text(MODULE)
    h['imports']['source'] += '\nfrom tpa_nb.other import twice'


@breaks('import_order')
def imports_all(h): h['tests']['source'] = '#| hide\nfrom tpa_nb.all import *'


@breaks('sidebar')
def not_listed(h): h.listed.clear()


@breaks('sidebar')
def not_there(h): h.listed.append('02_gone.ipynb')


@breaks('sidebar')
def listed_twice(h): h.listed.append('00_thing.ipynb')


@breaks('index')
def not_in_index(h):
    h.extra['index.ipynb'] = dict(h.nb, cells=[md('t', '# first\n\n> Blurb'), md('l', 'No [link](01_other.ipynb).')])
    h.listed.append('index.ipynb')


@breaks('addresses')
def other_owner(h): tutorial(h, badge('tutorials/first.ipynb', COLAB.replace('someone', 'other')))


@breaks('addresses')
def other_branch(h): tutorial(h, badge('tutorials/first.ipynb', COLAB.replace('main', 'dev')))


@breaks('addresses')
def other_notebook(h): tutorial(h, badge('tutorials/second.ipynb'))


@breaks('addresses', 'colab')
def install_from_elsewhere(h): tutorial(h, install=INSTALL.replace('someone', 'other'))


@breaks('colab')
def tutorial_without_badge(h): tutorial(h, badge='')


@breaks('colab')
def badge_as_markdown(h): tutorial(h, f'[![Open in Colab](badge.svg)]({COLAB}/tutorials/first.ipynb)')


@breaks('colab')
def badge_without_words(h): tutorial(h, badge('tutorials/first.ipynb').replace('alt="Open in Colab"', ''))


@breaks('colab')
def badge_twice(h): tutorial(h)[3]['source'] = f'# {COLAB}/tutorials/first.ipynb'


@breaks('colab')
def badge_without_install(h): h['intro']['source'] += badge('00_thing.ipynb')


@breaks('colab')
def install_without_demo(h): tutorial(h, install=INSTALL.replace('[demo]', ''))


@breaks('colab')
def install_everywhere(h): tutorial(h, install=INSTALL.replace('!test -e /content && ', '!'))


@breaks('colab')
def install_shown(h): tutorial(h, flags='#| eval: false\n')


@breaks('addresses')
def other_install(h):
    h.insert('tail', code('pip', '#| eval: false\n%pip install git+https://github.com/other/tpa_nb'))


def test_sound_notebook_passes(house): assert [str(f) for f in house.write()] == []


def test_sound_tutorial_passes(house):
    tutorial(house)
    assert [str(f) for f in house.write()] == []


def test_each_rule_has_a_breaking_case():
    assert set(BREAKS) == {r.__name__ for r in check_nbs.NOTEBOOK_RULES + check_nbs.REPO_RULES}


CASES = [pytest.param(rule, f, expected, id=f'{rule}-{f.__name__}')
         for rule, cases in BREAKS.items() for f, expected in cases]


@pytest.mark.parametrize('rule, break_it, expected', CASES)
def test_rule_can_fail(house, rule, break_it, expected):
    "The broken notebook fails the rule it breaks, and no rule besides those named with it"
    break_it(house)
    found = {f.rule for f in house.write()}
    assert rule in found
    assert found <= expected


def test_finding_names_file_and_cell(house):
    house['show']['source'] += ' # ' + 'x' * check_nbs.MAX_LINE
    assert str(house.write()[0]).startswith('nbs/00_thing.ipynb#show: line_length: ')


def test_exit_code(house, capsys):
    house.write()
    assert check_nbs.main(['--root', str(house.root)]) == 0
    (house.root/'_quarto.yml').write_text('{"website": {"sidebar": {"contents": []}}}')
    assert check_nbs.main(['--root', str(house.root)]) == 1
    assert '1 findings' in capsys.readouterr().out


def test_this_repository():
    found = check_nbs.check(Path(check_nbs.__file__).resolve().parents[1])
    if found: pytest.fail('\n'.join(map(str, found)), pytrace=False)
