"""Each notebook is one test: executed as `nbdev_test` does it, in a process of its own, on a CPU and offline.

A notebook that exports code and executes no assertion fails. `pytest --nb_flags "slow cuda"` switches flagged cells on.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import check_nbs
import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNNER = Path(__file__).with_name('run_notebook.py')
NOTEBOOKS = check_nbs.find_notebooks(ROOT)
SECONDS = 900
NEEDS = {'26_gpu_experts': 'triton'}  # there is no Triton for macOS and Windows


def environment(flags: list[str]) -> dict[str, str]:
    "Offline unless online cells were asked for, on few threads, without a display"
    threads = os.environ.get('OMP_NUM_THREADS', '1')  # conftest's
    quiet = {'TOKENIZERS_PARALLELISM': 'false', 'OMP_NUM_THREADS': threads, 'MPLBACKEND': 'agg', 'TQDM_DISABLE': '1',
             'OMP_WAIT_POLICY': 'passive'}  # threads that wait for a busy core do not burn another one
    return {**os.environ, **quiet} | ({} if 'online' in flags else {'HF_HUB_OFFLINE': '1'})


def execute(path: Path, report: Path, flags: list[str], cwd: Path = ROOT) -> tuple[dict, str]:
    "Run the notebook at `path`; what it counted, and what it printed"
    done = subprocess.run([sys.executable, RUNNER, path, report, *flags], cwd=cwd, env=environment(flags),
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    result = json.loads(report.read_text()) if report.exists() else dict(passed=False, failed_cell=None, sites=0)
    return result, done.stdout + done.stderr


def explain(result: dict, output: str) -> str:
    "The failing cell and its traceback"
    cell = result['failed_cell']
    shown = f"cell {cell['id']}:\n\n{cell['source']}\n\n" if cell else ''
    return shown + output


def complaint(path: Path, result: dict, output: str) -> str:
    "Why the notebook at `path` fails; empty if it passes"
    if not result['passed']: return explain(result, output)
    silent = not result['sites'] and check_nbs.read_notebook(path, path.parent).exported
    return f'{path.name} exports code and asserts nothing' if silent else ''


@pytest.mark.parametrize('path', NOTEBOOKS, ids=[str(p.relative_to(ROOT)) for p in NOTEBOOKS])
def test_notebook(path, tmp_path, request, record_property):
    if path.stem in NEEDS: pytest.importorskip(NEEDS[path.stem])
    result, output = execute(path, tmp_path/'report.json', request.config.getoption('nb_flags').split())
    wrong = complaint(path, result, output)
    if wrong: pytest.fail(wrong, pytrace=False)
    record_property('nb_assertions', (result['sites'], result['executions']))
