"""Saving under faults: every write fails once, the disk stays full, the process is killed at every step.

Python's own writes are caught by an audit hook (every `open` for writing, `mkdir`, `rename`, `remove`), whoever calls
them; writes inside Rust (safetensors, tokenizers) and `fsync` are wrapped. A limit on the size of files makes the real
ones fail in the middle.
"""
import copy
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import peft.peft_model
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertForMaskedLM, BertLMHeadModel

from tpa_nb.arch import Arch, AttnNames, Family, FFNNames, Stack, families, register_family
from tpa_nb.families import tiny_arch, tiny_model, tiny_tokenizer
from tpa_nb.save import load_model, save_model, structure_steps

torch.set_num_threads(1)
IDS = torch.randint(5, 261, (2, 9), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings('ignore')


# The faults

class Faults:
    "Count the writes below `root`; let `on_write(number, kind)` decide what happens to each"
    def __init__(self): self.root, self.on_write, self.kinds = None, None, []

    def hit(self, kind, path):
        if self.root is None or not isinstance(path, (str, os.PathLike)) or not str(path).startswith(self.root):
            return
        self.kinds.append(kind)
        if self.on_write:
            self.on_write(len(self.kinds) - 1, kind)

    def __call__(self, event, args):
        if self.root is None:
            return
        if event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.hit('open', args[0])
        elif event == 'os.rename' or event == 'os.mkdir' and not os.path.isdir(args[0]):
            self.hit(event, args[0])
        elif event in ('os.remove', 'os.rmdir'):
            self.hit('remove', args[0])


FAULTS = Faults()
sys.addaudithook(FAULTS)


@pytest.fixture
def faults(tmp_path, monkeypatch):
    "Faults for writes below `tmp_path`"
    def wrap(owner, name, kind, path_of, half):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            path = path_of(*args, **kwargs)
            try:
                FAULTS.hit(kind, path)
            except OSError:
                if half:
                    Path(path).write_bytes(b'\0' * 100)  # what a full disk leaves
                raise
            return real(*args, **kwargs)
        monkeypatch.setattr(owner, name, wrapped)

    wrap(safetensors.torch, 'save_file', 'save_file', lambda tensors, path, **_: path, True)
    wrap(peft.peft_model, 'safe_save_file', 'save_file', lambda tensors, path, **_: path, True)
    wrap(type(tiny_tokenizer()), '_save_pretrained', 'tokenizer', lambda self, save_directory, *_, **__: save_directory,
         False)
    wrap(os, 'fsync', 'fsync', lambda fd: os.path.realpath(f'/proc/self/fd/{fd}')
         if sys.platform == 'linux' else FAULTS.root, False)
    yield FAULTS
    FAULTS.root = FAULTS.on_write = None


def run(faults, root, action, on_write=None):
    "Run `action` under `faults`; return the kinds of its writes and its error"
    faults.root, faults.on_write, faults.kinds = str(root), on_write, []
    try:
        action()
        error = None
    except Exception as e:
        error = e
    finally:
        faults.root = faults.on_write = None
    return faults.kinds, error


def full(number, kind):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# The models

def make_arch(seed=0, adapter=True, heads=(1, 3)):
    "A pruned tiny BERT, with an unmerged adapter"
    arch = tiny_arch('bert', seed=seed)
    arch.attns[0].keep_heads(list(heads))
    arch.history.append({'verb': 'prune_heads', 'kept': list(heads)})
    if adapter:
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=[a.q.name for a in arch.attns], init_lora_weights=False,
                            modules_to_save=[*arch.norms, *arch.head_modules])
        arch.model = get_peft_model(arch.model, config)
    arch.model.eval()
    return arch


def logits(arch):
    with torch.no_grad():
        return arch.model(IDS).logits


def state(arch):
    "All that a failed save must leave alone in memory"
    configs = {n: copy.deepcopy(c.to_dict()) for n, c in getattr(arch.model, 'peft_config', {}).items()}
    return ({n: (p.requires_grad, hashlib.sha256(p.detach().numpy().tobytes()).hexdigest())
             for n, p in arch.model.named_parameters()},
            configs, arch.base.config.to_dict(), copy.deepcopy(arch.history), arch.model.training)


def tree(folder):
    "Every file below `folder` with its content's hash"
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture
def old(tmp_path):
    "A saved folder, and the model in it"
    arch = make_arch(seed=1, heads=(0, 1, 2))
    return save_model(arch, tmp_path / 'out' / 'model'), arch


# Every write fails

def count_writes(faults, folder, arch):
    "Kinds of the writes of one good save"
    kinds, error = run(faults, folder.parent, lambda: save_model(arch, folder))
    assert error is None
    return list(kinds)


@pytest.mark.parametrize('adapter', [False, True])
def test_each_write_fails_once(faults, tmp_path, old, adapter):
    folder, first = old
    arch = make_arch(adapter=adapter)
    kinds = count_writes(faults, tmp_path / 'out' / 'count', arch)
    kinds = count_writes(faults, tmp_path / 'out' / 'count', arch)  # the second one replaces a folder
    assert {'open', 'os.mkdir', 'os.rename', 'save_file', 'tokenizer', 'fsync', 'remove'} <= set(kinds)
    assert kinds.count('save_file') == 1 + adapter and kinds.count('os.rename') == 2
    shutil.rmtree(tmp_path / 'out' / 'count')
    before, files, want = state(arch), tree(folder), logits(first)
    failed = 0
    for n in range(len(kinds)):
        _, error = run(faults, folder.parent, lambda: save_model(arch, folder),
                       lambda i, kind: full(i, kind) if i == n else None)
        if error is None:  # only the old copy was not removed: it goes with the next save
            assert kinds[n] == 'remove'
            assert torch.equal(logits(load_model(folder)), logits(arch))
            save_model(first, folder)
        else:
            failed += 1
            assert isinstance(error, OSError) and error.errno == errno.ENOSPC, (n, kinds[n], error)
            assert repr(str(folder)) in str(error) and 'as it was' in str(error)
        assert [p.name for p in folder.parent.iterdir()] == ['model'], (n, kinds[n])
        assert tree(folder) == files, (n, kinds[n])
        assert torch.equal(logits(load_model(folder)), want)
        assert state(arch) == before, (n, kinds[n])
    assert failed >= len(kinds) - kinds.count('remove')
    save_model(arch, folder)
    assert torch.equal(logits(load_model(folder)), logits(arch))


def test_new_folder_each_write_fails_once(faults, tmp_path):
    arch, parent = make_arch(), tmp_path / 'out'
    parent.mkdir()
    kinds = count_writes(faults, parent / 'model', arch)
    shutil.rmtree(parent / 'model')
    for n in range(len(kinds)):
        _, error = run(faults, parent, lambda: save_model(arch, parent / 'model'),
                       lambda i, kind: full(i, kind) if i == n else None)
        assert isinstance(error, OSError) or kinds[n] == 'remove', (n, kinds[n], error)
        if error:
            assert not list(parent.iterdir()), (n, kinds[n])
            with pytest.raises(ValueError, match='there is no such folder'):
                load_model(parent / 'model')
        shutil.rmtree(parent / 'model', ignore_errors=True)


@pytest.mark.parametrize('readonly', [False, True])
def test_disk_stays_broken(faults, tmp_path, old, readonly):
    "From the n-th write on nothing works; on a disk that became read-only, not even renaming back or removing"
    folder, first = old
    arch = make_arch(adapter=not readonly)
    spared = () if readonly else ('os.rename', 'remove')
    kinds = count_writes(faults, tmp_path / 'out' / 'count', arch)
    kinds = count_writes(faults, tmp_path / 'out' / 'count', arch)
    shutil.rmtree(tmp_path / 'out' / 'count')
    want = logits(first), logits(arch)
    for n in range(len(kinds)):
        _, error = run(faults, folder.parent, lambda: save_model(arch, folder),
                       lambda i, kind: full(i, kind) if i >= n and kind not in spared else None)
        got = logits(load_model(folder))
        new = torch.equal(got, want[1])
        assert new or torch.equal(got, want[0]), (n, kinds[n], error)
        if error is None:
            assert new
        else:
            assert isinstance(error, OSError) and ('as it was' in str(error)) != ('finds what stands' in str(error))
            assert not new or 'finds what stands' in str(error)
        if not readonly:
            assert new == (error is None)
            assert [p.name for p in folder.parent.iterdir()] == ['model'], (n, kinds[n])
        for left in folder.parent.glob('model.tmp-*'):
            shutil.rmtree(left)
        save_model(first, folder)  # once the disk works again
        assert [p.name for p in folder.parent.iterdir()] == ['model'], (n, kinds[n])


@pytest.mark.skipif(not hasattr(signal, 'SIGXFSZ'), reason='needs limits on the size of files')
def test_real_writes_stop_in_the_middle(tmp_path, old):
    "The kernel ends a write at `limit` bytes, in Python and in Rust"
    import resource
    folder, first = old
    arch, files = make_arch(), tree(folder)
    sizes = sorted(p.stat().st_size for p in folder.rglob('*') if p.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [0, 10, *[size - 1 for size in sizes]]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save_model(arch, folder)
            error = None
        except OSError as e:
            error = e
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if error is None:  # the new files are a little smaller than the old ones
            assert limit > sizes[-2]
            save_model(first, folder)
            continue
        assert repr(str(folder)) in str(error) and 'as it was' in str(error)
        assert tree(folder) == files and [p.name for p in folder.parent.iterdir()] == ['model']
    assert torch.equal(logits(load_model(folder)), logits(first))


# The process is killed

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_at_every_step(faults, tmp_path, old):
    folder, first = old
    arch = make_arch(adapter=False)
    count_writes(faults, tmp_path / 'out' / 'count', arch)
    kinds = count_writes(faults, tmp_path / 'out' / 'count', arch)
    shutil.rmtree(tmp_path / 'out' / 'count')
    want, seen = (logits(first), logits(arch)), set()
    for n in range(len(kinds)):
        pid = os.fork()
        if pid == 0:
            run(faults, folder.parent, lambda: save_model(arch, folder),
                lambda i, kind: os._exit(9) if i == n else None)
            os._exit(1)  # it was not killed
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, (n, kinds[n])
        got = logits(load_model(folder))
        new = torch.equal(got, want[1])
        assert new or torch.equal(got, want[0]), (n, kinds[n])
        seen.add((folder.exists(), new))
        save_model(first, folder)  # the next save puts things right
        left = [p.name for p in folder.parent.iterdir() if not p.name.startswith('model.tmp-')]
        assert left == ['model'], (n, kinds[n], left)
    assert seen == {(True, False), (False, False), (True, True)}  # before, between and after the renames
    leftovers = list(folder.parent.glob('model.tmp-*'))
    assert leftovers
    yesterday = time.time() - 25 * 3600
    for path in leftovers[1:]:
        os.utime(path, (yesterday, yesterday))
    save_model(first, folder)
    assert list(folder.parent.glob('model.tmp-*')) == leftovers[:1]  # it could belong to a save that runs


def test_interrupt_cleans_up(faults, old):
    folder, first = old
    arch, files = make_arch(), tree(folder)

    def interrupt(i, kind):
        if kind == 'os.rename' and FAULTS.kinds.count(kind) == 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(faults, folder.parent, lambda: save_model(arch, folder), interrupt)
    assert tree(folder) == files and [p.name for p in folder.parent.iterdir()] == ['model']


# What is refused before anything is written

def test_refused_before_writing(faults, tmp_path):
    changed = make_arch(adapter=False)
    changed.base.classifier = nn.Linear(32, 5)
    merged = make_arch()
    merged.model.merge_adapter()
    history = make_arch()
    history.history.append({'importance': torch.ones(2)})
    dotted = make_arch(adapter=False)
    dotted.model = get_peft_model(dotted.model, LoraConfig(target_modules=[dotted.attns[0].q.name]), 'a b')
    record = Arch(tiny_model('bert'), family=Family('bert', families['bert'].stacks, pooler=()))
    own = type('OwnBert', (type(tiny_model('bert')),), {})(tiny_model('bert').config)
    cases = [(changed, "weight 'classifier.weight' has shape"), (merged, 'merged in place'), (dotted, "named 'a b'"),
             (history, 'must hold only what JSON can'), (record, 'is not registered'), (Arch(own), 'OwnBert')]
    for arch, words in cases:
        kinds, error = run(faults, tmp_path, lambda: save_model(arch, tmp_path / 'model'))
        assert isinstance(error, ValueError) and words in str(error), (words, error)
        assert kinds == [] and not list(tmp_path.iterdir())


def test_foreign_folders_are_safe(tmp_path):
    arch = make_arch(adapter=False)
    plain = tmp_path / 'plain'
    arch.model.save_pretrained(plain)
    half = tmp_path / 'half'
    half.mkdir()
    (half / 'tpa.json').write_text('{"format": "tpa')
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'tpa.json').write_text('{"name": "my project"}')
    for folder in (plain, half, other):
        files = tree(folder)
        with pytest.raises(ValueError, match='was not written by `save_model`'):
            save_model(arch, folder, overwrite=True)
        with pytest.raises(ValueError, match='cannot be loaded'):
            load_model(folder)
        assert tree(folder) == files
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert torch.equal(logits(load_model(save_model(arch, empty))), logits(arch))


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    arch = make_arch(adapter=False)
    save_model(arch, tmp_path / 'disk' / 'model')
    (tmp_path / 'link').symlink_to(tmp_path / 'disk' / 'model')
    arch.attns[1].keep_heads([2])
    save_model(arch, tmp_path / 'link')
    assert (tmp_path / 'link').is_symlink()
    assert load_model(tmp_path / 'disk' / 'model').attns[1].heads == (2,)


# What is read is checked

def spoilt(value, path=()):
    "(path, new value) for every place in a JSON value: removed, or of another type"
    yield path, ...
    for other in (None, -1, 'x', [], {}, [1], {'x': 1}):
        if other != value:
            yield path, other
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield from spoilt(value[key], (*path, key))


def changed(recipe, path, value):
    "A copy of `recipe` with one place changed"
    new = copy.deepcopy(recipe)
    *parents, last = path
    at = new
    for key in parents:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return new


def test_any_change_of_the_recipe_is_harmless(tmp_path):
    "Every place of tpa.json with every wrong value: one ValueError that names the folder, or the same model"
    arch = make_arch()
    folder = save_model(arch, tmp_path / 'model')
    recipe, want = json.loads((folder / 'tpa.json').read_text()), logits(arch)
    free = {'package_version', 'libraries', 'history'}
    places = [(p, v) for p, v in spoilt(recipe) if p and p[0] not in free and p[0] != 'trainable']
    places += [(('trainable',), v) for v in (..., None, 'x', [1], {}, ['x'])]
    loaded = []
    for path, value in places:
        (folder / 'tpa.json').write_text(json.dumps(changed(recipe, path, value)))
        try:
            got = load_model(folder)
        except ValueError as e:
            assert repr(str(folder)) in str(e), (path, value, e)
            continue
        assert torch.equal(logits(got), want), (path, value)
        loaded.append(path)
    assert {p[0] for p in loaded} <= {'attention', 'tokenizer', 'structure', 'files', 'adapter'}, loaded
    assert len(loaded) < len(places) / 10


def test_weights_of_another_model(tmp_path):
    "Two good folders, mixed up: the hash tells; with the hash put right, the shapes do"
    one = save_model(make_arch(adapter=False), tmp_path / 'one')
    two = save_model(make_arch(adapter=False, heads=(0,)), tmp_path / 'two')
    shutil.copy(two / 'model.safetensors', one / 'model.safetensors')
    with pytest.raises(ValueError, match='truncated or was changed'):
        load_model(one)
    recipe = json.loads((one / 'tpa.json').read_text())
    recipe['files']['model.safetensors'] = tree(two)['model.safetensors']
    (one / 'tpa.json').write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r'has shape \(8, 32\), the structure asks for \(16, 32\)'):
        load_model(one)


@pytest.mark.parametrize('size', [0, 4, 500, 20_000])
def test_truncated_weights_with_the_right_hash(tmp_path, size):
    folder = save_model(make_arch(adapter=False), tmp_path / 'model')
    os.truncate(folder / 'model.safetensors', size)
    recipe = json.loads((folder / 'tpa.json').read_text())
    recipe['files']['model.safetensors'] = tree(folder)['model.safetensors']
    (folder / 'tpa.json').write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match='not valid safetensors'):
        load_model(folder)


def test_missing_adapter_folder(tmp_path):
    folder = save_model(make_arch(), tmp_path / 'model')
    shutil.rmtree(folder / 'adapter')
    with pytest.raises(ValueError, match=r"its file 'adapter/adapter_config.json' is missing"):
        load_model(folder)


# Rarer models

def same(arch, again):
    assert torch.equal(logits(arch), logits(again))
    assert ([(n, p.requires_grad, p.dtype) for n, p in arch.model.named_parameters()]
            == [(n, p.requires_grad, p.dtype) for n, p in again.model.named_parameters()])


def test_several_adapters_keep_their_state(tmp_path):
    arch = make_arch()
    arch.model.add_adapter('second', LoraConfig(r=1, target_modules=[arch.attns[0].o.name], init_lora_weights=False))
    for active in ('default', 'second'):
        arch.model.set_adapter(active)
        arch.model.eval()
        again = load_model(save_model(arch, tmp_path / 'model'))
        assert again.model.active_adapters == [active] and set(again.model.peft_config) == {'default', 'second'}
        same(arch, again)
    with_it = logits(arch)
    arch.base.get_parameter('bert.embeddings.word_embeddings.weight').requires_grad_(True)
    arch.model.base_model.disable_adapter_layers()
    again = load_model(save_model(arch, tmp_path / 'model'))
    same(arch, again)
    assert not torch.equal(logits(again), with_it)
    again.model.base_model.enable_adapter_layers()
    assert torch.equal(logits(again), with_it)


@pytest.mark.parametrize('kwargs', [dict(use_dora=True), dict(use_rslora=True), dict(init_lora_weights='pissa'),
                                    dict(bias='lora_only')])
def test_kinds_of_lora(tmp_path, kwargs):
    arch = make_arch(adapter=False)
    arch.model = get_peft_model(arch.model, LoraConfig(r=2, target_modules=[a.q.name for a in arch.attns], **kwargs))
    for name, p in arch.model.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    arch.model.eval()
    folder = save_model(arch, tmp_path / 'model')
    same(arch, load_model(folder))
    elsewhere = PeftModel.from_pretrained(load_model(folder).model.unload(), folder / 'adapter').eval()
    with torch.no_grad():
        assert torch.equal(elsewhere(IDS).logits, logits(arch))


def test_base_file_is_clean(tmp_path):
    "The base file has the weights before training, under their plain names; the adapter has the trained ones"
    clean, arch = make_arch(adapter=False), make_arch()
    for p in arch.model.parameters():
        if p.requires_grad:
            p.data += 1
    folder = save_model(arch, tmp_path / 'model')
    base = safetensors.torch.load_file(folder / 'model.safetensors')
    want = clean.model.state_dict()
    assert base.keys() == want.keys() and all(torch.equal(base[n], want[n]) for n in want)
    adapter = safetensors.torch.load_file(folder / 'adapter' / 'adapter_model.safetensors')
    for name in ('classifier.weight', 'bert.embeddings.LayerNorm.bias'):
        assert torch.equal(adapter[f'base_model.model.{name}'], want[name] + 1)
    same(arch, load_model(folder))


@pytest.mark.parametrize('autocast', [False, True])
def test_adapter_precision_is_kept(tmp_path, autocast):
    arch = make_arch(adapter=False)
    arch.model.to(torch.bfloat16)
    config = LoraConfig(r=2, target_modules=[arch.attns[0].q.name], modules_to_save=arch.head_modules,
                        init_lora_weights=False)
    arch.model = get_peft_model(arch.model, config, autocast_adapter_dtype=autocast).eval()
    assert {p.dtype for n, p in arch.model.named_parameters() if 'lora_A' in n} == {
        torch.float32 if autocast else torch.bfloat16}
    same(arch, load_model(save_model(arch, tmp_path / 'model')))


def test_mixed_precision_and_frozen_weights(tmp_path):
    arch = make_arch(adapter=False)
    arch.base.bert.encoder.to(torch.float64)
    arch.base.bert.pooler.to(torch.float64)
    arch.base.classifier.to(torch.float64)
    for p in arch.base.bert.encoder.parameters():
        p.requires_grad_(False)
    arch.base.bert.embeddings.register_forward_hook(lambda m, args, out: out.double())
    again = load_model(save_model(arch, tmp_path / 'model'))
    again.base.bert.embeddings.register_forward_hook(lambda m, args, out: out.double())
    same(arch, again)


@pytest.mark.parametrize('kind', [BertForMaskedLM, BertLMHeadModel])
def test_tied_weights(tmp_path, kind):
    config = copy.deepcopy(tiny_model('bert').config)
    config.is_decoder = kind is BertLMHeadModel
    arch = Arch(kind(config).eval(), tiny_tokenizer())
    arch.attns[1].keep_heads([0])
    same(arch, load_model(save_model(arch, tmp_path / 'model')))
    n = len(list(arch.model.parameters()))
    decoder = arch.base.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach() + 0.1)  # trained apart, although the config would tie it
    again = load_model(save_model(arch, tmp_path / 'model'))
    same(arch, again)
    assert len(list(again.model.parameters())) == n + 1
    if arch.base.can_generate():
        arch.base.generation_config.max_new_tokens = 7
        assert load_model(save_model(arch, tmp_path / 'model')).base.generation_config.max_new_tokens == 7


def test_own_tie(tmp_path):
    arch = make_arch(adapter=False)
    one, two = (a.q.linear for a in arch.attns)
    arch.attns[1].keep_heads([0, 2])
    two.weight = one.weight
    again = load_model(save_model(arch, tmp_path / 'model'))
    same(arch, again)
    assert again.attns[0].q.weight is again.attns[1].q.weight


def test_shards(tmp_path):
    arch = make_arch()
    folder = save_model(arch, tmp_path / 'model', max_shard_size='40KB')
    assert len(list(folder.glob('model-*-of-*.safetensors'))) > 2
    torch.manual_seed(0)
    again = load_model(folder)
    drawn = torch.rand(1)
    same(arch, again)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)  # loading draws from a generator of its own
    (folder / 'model-00002-of-00004.safetensors').unlink(missing_ok=True)
    with pytest.raises(ValueError, match='is missing'):
        load_model(folder)


def test_backend_and_tokenizer(tmp_path):
    arch = make_arch()
    arch.base.set_attn_implementation('eager')
    arch.tokenizer = None
    again = load_model(save_model(arch, tmp_path / 'model'))
    assert again.base.config._attn_implementation == 'eager' and again.tokenizer is None
    same(arch, again)
    again = load_model(tmp_path / 'model', attn_implementation='sdpa')
    assert again.base.config._attn_implementation == 'sdpa'
    torch.testing.assert_close(logits(again), logits(arch))


def test_family_of_the_user(tmp_path):
    record = Family('xlm-roberta', families['bert'].stacks, tiny={**families['bert'].tiny, 'type_vocab_size': 1})
    register_family(record)
    try:
        arch = tiny_arch('xlm-roberta')
        arch.attns[0].keep_heads([2])
        same(arch, load_model(save_model(arch, tmp_path / 'model')))
    finally:
        del families['xlm-roberta']
    with pytest.raises(ValueError, match="architecture 'xlm-roberta' is not supported"):
        load_model(tmp_path / 'model')


def test_precision_of_buffers_that_are_not_stored(tmp_path):
    "`model.to(bfloat16)` rounds a Llama's rotary frequencies, which no file holds"
    attn = AttnNames('self_attn', *(f'self_attn.{n}_proj' for n in 'qkvo'))
    record = Family('llama', (Stack('layers', (attn,), FFNNames('mlp.up_proj', 'mlp.down_proj', 'mlp.gate_proj')),),
                    head=('score',), tiny=dict(vocab_size=261, hidden_size=32, intermediate_size=48, pad_token_id=0,
                                               num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4))
    known = families.get('llama')
    register_family(record, replace=True)
    try:
        arch = tiny_arch('llama')
        arch.model.to(torch.bfloat16)
        arch.attns[1].keep_heads([0, 2])
        structure_steps['neurons'].rebuild(arch, {f.name: 40 for f in arch.ffns})
        again = load_model(save_model(arch, tmp_path / 'model'))
        same(arch, again)
        assert {n: b.dtype for n, b in again.base.named_buffers()} == {n: b.dtype for n, b in arch.base.named_buffers()}
        assert torch.bfloat16 in {b.dtype for b in again.base.buffers()}
    finally:
        del families['llama']
        if known:
            register_family(known)


def test_steps_are_closed():
    assert set(structure_steps) >= {'heads', 'neurons'}
