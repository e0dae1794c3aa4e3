"The benchmark behind the page on efficiency: its quick mode writes everything that the page reads."
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def efficiency(benchmark): return benchmark('efficiency')


def test_quick_run_writes_what_the_page_reads(efficiency, tmp_path, capsys):
    path, threads = tmp_path/'sub'/'efficiency.json', torch.get_num_threads()
    efficiency.main(['--quick', '--out', str(path), '--dtypes', 'float32', 'bfloat16', '--threads', '1'])
    first = json.loads(path.read_text())
    efficiency.main(['--quick', '--out', str(path), '--sections', 'latency', '--threads', '1'])
    torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    assert str(tmp_path) not in path.read_text()
    assert list(path.parent.iterdir()) == [path], 'no half-written file is left'
    assert {'counts', 'training', 'latency', 'where', 'provenance', 'command', 'seconds'} <= set(found)
    assert (found['training'], found['where']) == (first['training'], first['where']), 'only one part was asked for'
    assert found['latency']['rows']['LoRA']['times_ms'] != first['latency']['rows']['LoRA']['times_ms']
    assert [one['dtype'] for one in found['training']] == ['float32', 'bfloat16']
    rows = found['training'][0]['rows']
    assert list(rows) == ['full fine-tuning', 'LoRA', 'Prune-LoRA']
    assert rows['full fine-tuning']['step x'] == rows['full fine-tuning']['peak x'] == 1
    assert rows['Prune-LoRA']['floor'] < rows['LoRA']['floor'] < 1
    assert rows['Prune-LoRA']['peak x'] < rows['LoRA']['peak x'] < 1
    assert set(found['where']['roofline']) == {'dense', 'pruned'}
    assert 'training step, 2 x 16 tokens, bfloat16' in capsys.readouterr().out


def test_counts_of_bert_base_are_the_papers(efficiency):
    found = efficiency.counts({})
    assert found['full fine-tuning']['params'] == 109_483_778
    assert found['LoRA, as coded'] == {'params': 109_704_962, 'trainable': 259_584, 'weight_bytes': 4 * 109_704_962}
    assert found['Prune-LoRA, as coded']['params'] == 101_291_714
    assert found['Prune-LoRA, as coded']['trainable'] == 308_736
    assert found['Prune-LoRA, as meant']['trainable'] == 294_144
    assert found['Prune-LoRA, head trained']['trainable'] == 295_682
    assert found['Prune-LoRA, merged']['params'] == 101_021_378


def test_wrong_options_are_refused(efficiency, capsys):
    with pytest.raises(SystemExit, match='replaces parts of an existing file'):
        efficiency.main(['--quick', '--sections', 'where'])
    for argv, text in ((['--shapes', '8by128'], 'is not a batch x length'),
                       (['--repeats', '1', '2', '3'], '--repeats needs one number')):
        with pytest.raises(SystemExit):
            efficiency.parse(argv)
        assert text in capsys.readouterr().err


def test_the_clock_of_the_process_is_refused_on_a_gpu(efficiency):
    with pytest.raises(SystemExit, match='--clock cpu counts the time of this process, which waits while cuda works'):
        efficiency.main(['--quick', '--device', 'cuda', '--clock', 'cpu'])
