"The notebook tester is tested itself: what it counts, what it skips, and what it shows when a cell fails."
import json

import pytest
from test_notebooks import complaint, execute, explain

SETTINGS = '[DEFAULT]\nrepo = made\nlib_name = made\nuser = someone\ntst_flags = cuda online slow\n'


def write(root, *sources):
    "A project with one notebook made of code cells"
    cells = [dict(id=f'c{i}', cell_type='code', metadata={}, execution_count=None, outputs=[], source=s)
             for i, s in enumerate(sources)]
    (root/'settings.ini').write_text(SETTINGS)
    (root/'nbs').mkdir()
    path = root/'nbs'/'00_made.ipynb'
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)))
    return path


@pytest.fixture
def run(tmp_path):
    "Write and execute a notebook of code cells"
    def f(*sources, flags=()):
        return execute(write(tmp_path, *sources), tmp_path/'report.json', list(flags), cwd=tmp_path)
    return f


def test_counts_places_and_executions(run):
    result, _ = run('from fastcore.test import *',
                    'for i in range(3): assert i < 3',
                    'test_eq(1, 1)\ntest_fail(lambda: 1/0)\nwith expect_fail(ZeroDivisionError): 1/0',
                    'def check(x):\n    assert x\n\ncheck(1)\ncheck(2)')
    assert (result['passed'], result['sites'], result['executions']) == (True, 5, 8)


def test_unreached_assertions_do_not_count(run):
    result, _ = run('if False: assert 1\ndef never(): assert 0')
    assert (result['passed'], result['sites']) == (True, 0)


def test_assertions_inside_exported_code_do_not_count(run):
    result, _ = run('#| export\ndef f(x):\n    assert x\n    return x', 'f(1)')
    assert (result['passed'], result['sites']) == (True, 0)


def test_a_notebook_that_exports_and_asserts_nothing_fails(run, tmp_path):
    result, output = run('#| export\ndef f(x): return x', 'f(1)')
    assert complaint(tmp_path/'nbs'/'00_made.ipynb', result, output) == '00_made.ipynb exports code and asserts nothing'


def test_flagged_cells_wait_for_their_flag(run, tmp_path):
    cells = ['#| cuda\nassert False', '#| slow\nassert 1']
    result, _ = run(*cells)
    assert (result['passed'], result['sites']) == (True, 0)
    result, _ = execute(tmp_path/'nbs'/'00_made.ipynb', tmp_path/'report.json', ['slow'], cwd=tmp_path)
    assert (result['passed'], result['sites']) == (True, 1)
    result, _ = execute(tmp_path/'nbs'/'00_made.ipynb', tmp_path/'report.json', ['slow', 'cuda'], cwd=tmp_path)
    assert not result['passed']


def test_a_failing_cell_is_shown(run):
    result, output = run('x = 1', 'y = 2\nassert x == y, f"{x} is not {y}"', 'raise SystemError("not reached")')
    text = explain(result, output)
    assert not result['passed']
    assert 'cell c1' in text and 'assert x == y' in text and 'AssertionError: 1 is not 2' in text
    assert 'not reached' not in text


def test_an_assertion_keeps_its_meaning(run):
    result, output = run('from fastcore.test import *', 'test_eq([1, 2], [1, 3])')
    assert not result['passed'] and '[1, 2]' in output


def test_a_notebook_that_cannot_be_read_fails(tmp_path):
    path = write(tmp_path)
    path.write_text('{')
    result, output = execute(path, tmp_path/'report.json', [], cwd=tmp_path)
    assert not result['passed'] and 'Error' in explain(result, output)


def test_notebooks_run_offline(run):
    result, _ = run("import os\nassert os.environ['HF_HUB_OFFLINE'] == '1'")
    assert result['passed']
