"The mutation check (tools/mutate.py takes minutes): its table fits the code, and it tells red from green."
import mutate
import pytest
from test_check_nbs import DOUBLE, House


@pytest.mark.parametrize('mutant', mutate.MUTANTS, ids=lambda m: m.mistake)
def test_mistake_has_exactly_one_place(mutant): assert mutate.places(mutant, mutate.ROOT) == 1


@pytest.mark.parametrize('old, new, survives', [
    ('math.ldexp(x, 1)', 'math.ldexp(x, 2)', False), ('# A number', '# Any number', True)])
def test_red_and_green(tmp_path, old, new, survives):
    house = House(tmp_path)
    house['tests']['source'] = '#| hide\nfrom fastcore.test import *'
    house['show']['source'] = 'test_eq(double(2.), 4.)'
    house.module = DOUBLE
    house.write()
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nrepo = tpa_nb\nlib_name = tpa_nb\nuser = someone\n')
    (tmp_path/'tests').mkdir()
    runner = mutate.ROOT/'tests'/'run_notebook.py'
    (tmp_path/'tests'/'run_notebook.py').write_text(runner.read_text())
    survived, why = mutate.trial(mutate.Mutant('made', '00_thing', old, new), tmp_path)
    assert survived is survives
    assert survived or '8.0' in why
