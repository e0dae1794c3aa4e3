"Options and the closing count of the test run"


def pytest_addoption(parser):
    parser.addoption('--nb_flags', default='', help="flagged cells to run too, e.g. 'cuda slow online'")


def pytest_terminal_summary(terminalreporter):
    "Say how many notebooks ran and how many assertions they executed, just before pytest's own last line"
    reports = terminalreporter.stats.get('passed', [])
    counts = [value for r in reports for name, value in r.user_properties if name == 'nb_assertions']
    if not counts: return
    sites, executions = (sum(o) for o in zip(*counts))
    terminalreporter.write_line(f'{len(counts)} notebooks executed {sites} assertions ({executions} counting loops)')
