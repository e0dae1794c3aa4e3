"The package: one source for every fact, light to import, complete when built, and a README that follows the index."
import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import check_nbs
import make_readme
import pytest
import set_address
from packaging.requirements import Requirement
from test_check_nbs import House, badge, code, md, shown, stream

ROOT = Path(__file__).resolve().parents[1]
CFG = make_readme.settings(ROOT)


def python(*args, cwd=ROOT):
    "Output of a fresh Python process"
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Folder with an sdist of the repository, and a wheel built from that sdist"
    copy = tmp_path_factory.mktemp('build')/'repo'
    names = ['settings.ini', 'setup.py', 'MANIFEST.in', 'LICENSE', 'README.md', 'CHANGELOG.md', 'CONTRIBUTING.md']
    shutil.copytree(ROOT/CFG['lib_path'], copy/CFG['lib_path'], ignore=shutil.ignore_patterns('__pycache__'))
    for name in names: shutil.copy(ROOT/name, copy)
    python('setup.py', '-q', 'sdist', cwd=copy)
    with tarfile.open(next((copy/'dist').glob('*.tar.gz'))) as tar: tar.extractall(copy/'unpacked', filter='data')
    source = next((copy/'unpacked').iterdir())
    python('setup.py', '-q', 'bdist_wheel', cwd=source)
    return source, zipfile.ZipFile(next((source/'dist').glob('*.whl')))


def read(wheel, ending):
    "Text of the one file in `wheel` whose name ends so"
    return wheel.read(next(n for n in wheel.namelist() if n.endswith(ending))).decode()


def requirement(text):
    "Comparable form of a requirement: name, versions, extra"
    r = Requirement(text)
    extra = re.search(r'extra == "(\w+)"', str(r.marker)) if r.marker else None
    return r.name.lower().replace('_', '-'), str(r.specifier), extra[1] if extra else ''


def test_metadata_follows_settings(built):
    meta = message_from_string(read(built[1], 'METADATA'))
    assert (meta['Name'], meta['Version']) == (CFG['lib_name'].replace('-', '_'), CFG['version'])
    assert meta['Requires-Python'] == f">={CFG['min_python']}"
    wanted = {requirement(o) for o in CFG['requirements'].split()}
    for extra in ('dev', 'demo', 'deepspeed', 'generation'):
        wanted |= {(*requirement(o)[:2], extra) for o in CFG[f'{extra}_requirements'].split()}
    assert {requirement(o) for o in meta.get_all('Requires-Dist')} == wanted


def test_wheel_holds_the_package_and_nothing_else(built):
    top = {n.split('/')[0] for n in built[1].namelist()}
    assert top == {'tpa_nb', f"tpa_nb-{CFG['version']}.dist-info"}
    inside = {n.removeprefix('tpa_nb/') for n in built[1].namelist() if n.startswith('tpa_nb/')}
    there = {p.relative_to(ROOT/'tpa_nb').as_posix() for p in (ROOT/'tpa_nb').rglob('*.py')}
    assert inside == there


def test_entry_points(built):
    text = read(built[1], 'entry_points.txt')
    for line in CFG['console_scripts'].split(): assert line.replace('=', ' = ') in text
    assert 'tpa_nb = tpa_nb._modidx:d' in text


def test_console_scripts_exist():
    for line in CFG['console_scripts'].split():
        module, function = line.split('=')[1].split(':')
        assert function in module_names(ROOT/(module.replace('.', '/') + '.py'))


def module_names(path):
    "`__all__` of a module, without importing it"
    return next(ast.literal_eval(s.value) for s in ast.parse(path.read_text()).body
                if isinstance(s, ast.Assign) and s.targets[0].id == '__all__')


def test_sdist_can_be_built_from(built):
    for name in ('settings.ini', 'LICENSE', 'README.md'): assert (built[0]/name).exists()


def test_one_version():
    assert python('-c', 'import tpa_nb; print(tpa_nb.__version__)').strip() == CFG['version']
    assert f"## {CFG['version']}" in (ROOT/'CHANGELOG.md').read_text()


def test_importing_the_package_is_light():
    "Nothing heavy, nothing printed"
    probe = "import sys, tpa_nb; print([m for m in ('torch', 'transformers', 'numpy', 'fastcore') if m in sys.modules])"
    assert python('-c', probe) == '[]\n'


def test_no_module_imports_deepspeed_before_it_is_used():
    probe = "import sys; from tpa_nb.all import *; print('deepspeed' in sys.modules)"
    assert python('-c', probe).splitlines() == ['False']


def test_all_holds_every_module_and_public_names_only():
    "All modules but the command line's, in the order of their notebooks"
    notebooks = [check_nbs.read_notebook(p, ROOT) for p in check_nbs.find_notebooks(ROOT)]
    modules = [nb.module for nb in notebooks if nb.module and nb.module != 'cli']
    tree = ast.parse((ROOT/'tpa_nb'/'all.py').read_text()).body
    assert [s.module for s in tree if isinstance(s, ast.ImportFrom)] == modules
    names = python('-c', "import tpa_nb.all as a; print(*(n for n in vars(a) if not n.startswith('__')))").split()
    public = [n for m in modules for n in module_names(ROOT/'tpa_nb'/f'{m}.py')]
    assert sorted(names) == sorted(public), 'each public name once, nothing private'


def test_readme_follows_the_index(): assert make_readme.stale(ROOT) == []


def test_readme_prints_the_two_commands():
    lines = (ROOT/'README.md').read_text().splitlines()
    for command in ('pip install -e ".[demo]" && tpa_compress', 'pip install -e ".[dev]" && pytest'):
        assert lines.count(command) == 1


def test_readme_rendering(tmp_path):
    "Hidden cells and flags stay out, outputs come along, links point from the root"
    house = House(tmp_path)
    house.nb['cells'] = [
        md('t', '# tpa_nb\n\n> Blurb'), md('m', 'See [arch](00_arch.ipynb), [site](https://example.org), [up](#top).'),
        code('h', '#| hide\nsecret = 1'), code('s', '#| slow\nprint(2)', stream('2\n')),
        code('p', 'plot()', shown('aGVsbG8=', 'image/png')), code('d', 'x', shown('a ```b```'))]
    house.extra['index.ipynb'] = house.nb
    house.write()
    (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text())
    make_readme.write(tmp_path)
    text = (tmp_path/'README.md').read_text()
    assert text.startswith(make_readme.BANNER) and text.count('# tpa_nb') == 1
    assert '[arch](nbs/00_arch.ipynb), [site](https://example.org), [up](#top)' in text
    assert 'secret' not in text and '#|' not in text
    assert '```python\nprint(2)\n```\n\n```text\n2\n```' in text
    assert '````text\na ```b```\n````' in text
    assert (tmp_path/'README_files/p-0.png').read_bytes() == b'hello'
    assert make_readme.stale(tmp_path) == []
    (tmp_path/'README_files/p-0.png').write_bytes(b'other')
    assert make_readme.main(['--root', str(tmp_path), '--check']) == 1


def test_a_new_address_is_written_everywhere(tmp_path):
    house = House(tmp_path)
    old = badge('00_gone.ipynb', 'https://colab.research.google.com/github/old/old/blob/dev/nbs')
    house['intro']['source'] = f'{old}\n\nWords.'
    install = '!test -e /content && pip install -q "tpa_nb[demo] @ git+https://github.com/old/old"'
    house.insert('exp', code('pip', f'#| hide\n#| eval: false\n{install}'))
    house.cells.insert(1, house.cells.pop(house.cells.index(house['intro'])))
    index = dict(house.nb, cells=[md('t', '# tpa_nb\n\n> Blurb'), md('l', '[thing](00_thing.ipynb)')])
    house.extra['index.ipynb'] = index
    house.listed.append('index.ipynb')
    assert [f.rule for f in house.write()] == ['addresses', 'addresses', 'colab']
    (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text().replace('user = ', 'user = new'))
    set_address.main(tmp_path)
    assert [str(f) for f in check_nbs.check(tmp_path)] == []
    assert f"github/new{CFG['user']}/tpa_nb/blob/main/nbs/00_thing.ipynb" in (tmp_path/'nbs/00_thing.ipynb').read_text()
    assert f"new{CFG['user']}" in (tmp_path/'README.md').read_text()
