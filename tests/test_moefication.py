"The experiment on MoEfication: shared models, equal steps, and every method from routing to folding on a toy task"

import pytest

from tpa_nb.runner import Cell


@pytest.fixture
def script(experiment):
    "The script on a toy"
    return experiment('moefication', best_rate=lambda way: 1e-3, EPOCHS={'mrpc': 2}, EXPERTS=8)


def test_methods_share_models_and_get_equal_steps(script, tmp_path):
    found = {method: script.run(Cell('mrpc', method, 'experts=8,k=2'), data_dir='', cache=tmp_path)
             for method in script.GRID}
    assert {r['steps'] for m, r in found.items() if '+' not in m} == {4}
    assert {r['steps'] for m, r in found.items() if '+' in m} == {6}
    assert {p.name for p in (tmp_path / 'whole').iterdir()} == {'dense-mrpc-0', 'mlp-8-2-mrpc-0', 'paper-8-2-mrpc-0'}
    assert found['mlp']['router']['contribution'] == 'distance' != found['paper']['router']['contribution']
    assert found['dynamic']['mean_k'] != found['mlp']['mean_k'] == [2, 2]
    assert all(0 < z < 1 for z in found['dense']['zeros'])
    grown = 2 * 32 * 32  # neurons of a layer's LoRA expert: up and down
    for way in ('mlp', 'dense'):
        assert found[f'{way}+expert']['params'] - found[way]['params'] - 2 * grown in (0, 2 * 32)  # biases in dense layers
        assert found[f'{way}+expert']['trainable'] == 2 * grown + 2 * 33
    assert found['mlp+attention']['params'] == found['mlp']['params']
    assert found['mlp']['flops'] < found['mlp+expert']['flops'] < found['dense']['flops'] < found['dense+expert']['flops']


def test_rates_are_chosen_on_training_rows(script, tmp_path):
    tuned = script.run(Cell('mrpc', 'tune-expert', 'lr=1e-03'), data_dir='', cache=tmp_path)
    assert sum(tuned['rows'].values()) == 64
    assert not (tmp_path / 'whole').exists()
