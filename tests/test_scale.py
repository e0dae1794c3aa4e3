"Large models: structure on the meta device, and surgery and importance without a second copy of the weights"
import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoModelForCausalLM, LlamaConfig

from tpa_nb.arch import Arch
from tpa_nb.importance import n_columns
from tpa_nb.profile import count_flops, count_params
from tpa_nb.prune import prune_heads, prune_neurons, select_heads, select_neurons
from tpa_nb.save import _compare, _plain_state, _recipe, _skeleton, save_model

DENSE = 6_738_415_616  # parameters of Llama 7B


@pytest.fixture(scope='module')
def llama():
    "Llama 7B without weights, a third of its heads and half of its neurons removed"
    with torch.device('meta'):
        arch = Arch(AutoModelForCausalLM.from_config(LlamaConfig(dtype=torch.bfloat16)))
    assert count_params(arch)['params'] == DENSE
    gen = torch.Generator().manual_seed(0)
    heads = torch.rand(len(arch.attns), n_columns(arch), generator=gen)
    neurons = [torch.rand(f.d_ff, generator=gen) for f in arch.ffns]
    prune_heads(arch, select_heads(heads, pruning_ratio=1 / 3, group_size=arch.group_size))
    return prune_neurons(arch, select_neurons(neurons, pruning_ratio=0.5, round_to=64))


def test_counts(llama):
    "Closed forms: a head holds 4 x 128 x 4096 weights, a neuron 3 x 4096"
    heads, neurons = sum(a.n_heads for a in llama.attns), sum(f.d_ff for f in llama.ffns)
    assert (heads, {f.d_ff % 64 for f in llama.ffns}) == (1024 - 341, {0})
    gone = (1024 - heads) * 4 * 128 * 4096 + (32 * 11008 - neurons) * 3 * 4096
    assert count_params(llama)['params'] == DENSE - gone
    dense = 2 * (DENSE - 32000 * 4096 - 65 * 4096) + 32 * 4 * 4096  # products and scores of one token; no table, no norms
    assert count_flops(llama, 1, 1) == dense - 2 * gone - (1024 - heads) * 4 * 128


def test_recipe_rebuilds_the_structure(llama):
    "What `tpa.json` would say gives the same shapes on the meta device, and its shards hold all weights"
    recipe = json.loads(json.dumps(_recipe(llama)))
    with torch.device('meta'):
        again = _skeleton(llama.base.config, type(llama.base), recipe['structure'], recipe['ties'])
    _compare(_plain_state(again.base), _plain_state(llama.base))
    assert [a.heads for a in again.attns] == [a.heads for a in llama.attns]
    assert [f.neurons for f in again.ffns] == [f.neurons for f in llama.ffns]
    plan = split_torch_state_dict_into_shards(_plain_state(llama.base), max_shard_size='2GB')
    assert sum(map(len, plan.filename_to_tensors.values())) == len(_plain_state(llama.base))
    assert len(plan.filename_to_tensors) == -(-plan.metadata['total_size'] // 2_000_000_000)


def test_no_weights_to_save(llama, tmp_path):
    with pytest.raises(ValueError, match='only models with all weights in memory can be saved'):
        save_model(llama, tmp_path / 'folder')
    assert not (tmp_path / 'folder').exists()


MEMORY = """
import resource, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, LlamaConfig
from tpa_nb.arch import Arch
from tpa_nb.importance import head_importance, neuron_importance
from tpa_nb.prune import prune_heads, prune_neurons, select_heads, select_neurons

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

config = LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=8,
                     num_key_value_heads=4)
with torch.device('meta'):
    model = AutoModelForCausalLM.from_config(config)
arch = Arch(model.to(torch.bfloat16).to_empty(device='cpu'))
for p in arch.model.parameters():
    p.data = torch.randn(1, dtype=p.dtype).mul(0.02).expand(p.shape).clone()
for name, buffer in arch.model.named_buffers():
    buffer.fill_(1.0)
size = sum(p.numel() * 2 for p in arch.model.parameters())
batch = dict(input_ids=torch.randint(64, (2, 8)), labels=torch.randint(64, (2, 8)))
arch.model(**batch)
before = peak()
heads, neurons = head_importance(arch, [batch]), neuron_importance(arch, [batch])
measured = peak()
prune_heads(arch, select_heads(heads, pruning_ratio=0.5, group_size=arch.group_size))
prune_neurons(arch, select_neurons(neurons, pruning_ratio=0.5))
print(size, measured - before, peak() - measured)
"""


def test_no_second_copy_of_the_weights():
    "Importance and surgery on bf16 weights take little memory beside them"
    done = subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    size, importance, surgery = map(int, done.stdout.split())
    print(f'{size / 1e6:.0f} MB of weights; importance took {importance / 1e6:.0f} MB more, surgery {surgery / 1e6:.0f}')
    assert size > 250e6
    assert importance < 0.3 * size and surgery < 0.3 * size
