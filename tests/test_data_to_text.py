"The experiment on E2E: every way on generated records, from nothing to zeros"
from pathlib import Path

import pytest
from conftest import opened

from tpa_nb.generation import toy_records
from tpa_nb.runner import Cell


@pytest.fixture
def script(monkeypatch):
    "The script on generated records, with a tiny model"
    pytest.importorskip('sacrebleu')
    module = opened('experiments', 'data_to_text', monkeypatch)
    changes = dict(load_data_to_text=lambda name, data_dir, n_train: toy_records(), best_rate=lambda kind: 1e-3, HELD=1 / 8,
                   SIZES=dict(n_positions=128, n_embd=32, n_layer=2, n_head=2), VOCABULARY=300, RANK=4, SPARSE=8)
    for name, value in changes.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, 'score_texts', lambda arch, task, **kwargs: {'bleu': float(len(task.grouped()))})
    return module


def test_every_way_gets_the_same_steps(script, tmp_path):
    found = {cell.method: script.run(cell, data_dir='', cache=tmp_path) for cell in script.grid(['e2e'], [0])}
    assert set(found) == set(script.WAYS)
    assert len({r['steps'] for r in found.values()}) == 1
    assert found['lora']['trainable'] < found['dsee']['trainable'] == found['zeros']['trainable'] < found['full']['trainable']
    assert found['zeros']['zeros'] == pytest.approx(0.5, abs=0.01) and found['dsee']['zeros'] < 0.01
    assert len({r['params'] for r in found.values()}) == 1, 'all is merged'
    assert [p.name for p in Path(tmp_path, 'whole').iterdir() if p.is_dir()] == ['language-e2e-0']


def test_rates_are_chosen_on_training_records(script, tmp_path):
    tuned = script.run(Cell('e2e', 'tune-adapter', 'lr=1e-03'), data_dir='', cache=tmp_path)
    assert tuned['rows']['validation'] == 10 == tuned['bleu']
    part = script.slice_of(script.load_data_to_text('e2e', '', 0), script.HELD)
    assert not set(part.train['source'][:]) & set(part.validation['source'][:])
    assert not (tmp_path / 'whole').exists()
