"""Execute one notebook with nbdev's tester and count the assertions that it executed.

What counts: `assert` statements and calls of the functions in `CHECKS`, in code cells that are not exported. Exported
cells are not looked at, so a check inside the library never counts. `sites` are the places in the notebook that were
reached, each one once; `executions` counts a place again each time a loop comes by.
"""
import ast
import json
import os
import sys
from collections import Counter
from pathlib import Path

import nbdev.test
from execnb.shell import CaptureShell
from nbdev.config import get_config

EXPORT = {'export', 'exports', 'exporti'}
TALLY = '__tally__'
CHECKS = {'test_eq', 'test_ne', 'test_close', 'test_is', 'test_fail', 'test_eq_type', 'test_shuffled', 'test_stdout',
          'test_warns', 'expect_fail', 'raises', 'assert_close', 'assert_equal', 'assert_allclose',
          'assert_array_equal'}


class CountAssertions(ast.NodeTransformer):
    "Let every assertion of a cell report to `TALLY` before it is evaluated"
    def __init__(self, cell_id: str): self.cell_id = cell_id

    def tally(self, node: ast.AST, *args: ast.expr) -> ast.Call:
        "A call that reports the place of `node`"
        site = ast.Constant(f'{self.cell_id}:{node.lineno}:{node.col_offset}')
        return ast.Call(ast.Name(TALLY, ast.Load()), [site, *args], [])

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        self.generic_visit(node)
        report = ast.Expr(self.tally(node))
        return [ast.fix_missing_locations(ast.copy_location(o, node)) for o in (report, node)]

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        name = getattr(node.func, 'attr', getattr(node.func, 'id', None))
        if name in CHECKS: node.func = ast.fix_missing_locations(ast.copy_location(self.tally(node, node.func), node))
        return node


class CountingShell(CaptureShell):
    "nbdev's shell, which also counts assertions and remembers the cell it is in"
    hits: Counter = Counter()
    current = None

    def cell(self, cell, **kwargs):
        "Run `cell`, with its assertions counted unless it is exported"
        if cell.cell_type != 'code': return
        CountingShell.current = cell
        own = not EXPORT & set(cell.directives_)
        self.user_ns[TALLY] = self.report
        self.ast_transformers[:] = [CountAssertions(cell.id)] if own else []
        super().cell(cell, **kwargs)

    @classmethod
    def report(cls, site, func=None):
        "Note that `site` was reached; hand back the function that is called there"
        cls.hits[site] += 1
        return func


def run(path: Path, flags: list[str]) -> dict:
    "Test the notebook at `path` as `nbdev_test` does, with the cells of `flags` switched on"
    cfg = get_config()
    nbdev.test.CaptureShell = CountingShell
    passed, seconds = nbdev.test.test_nb(path, skip_flags=cfg.tst_flags.split(), force_flags=flags,
                                         basepath=cfg.config_path)
    cell, hits = CountingShell.current, CountingShell.hits
    failed = None if passed or cell is None else dict(id=cell.id, source=cell.source)
    return dict(passed=passed, seconds=seconds, sites=len(hits), executions=hits.total(), failed_cell=failed)


if __name__ == '__main__':
    notebook, report = (Path(o).absolute() for o in sys.argv[1:3])
    os.chdir(notebook.parent)
    result = run(notebook, sys.argv[3:])
    report.write_text(json.dumps(result), encoding='utf-8')
    sys.exit(0 if result['passed'] else 1)
