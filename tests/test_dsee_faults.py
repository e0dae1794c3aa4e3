"What once went wrong in DSEE, its masks, recipes and data-to-text"
import shutil

import pytest
import torch
from peft import LoraConfig

from tpa_nb.dsee import add_dsee, dsee_settings, merge_dsee
from tpa_nb.families import tiny_arch, tiny_batch
from tpa_nb.generation import Ter, linearize, load_data_to_text, toy_records
from tpa_nb.masks import mask_from_update
from tpa_nb.methods import check_recipe
from tpa_nb.moe import moefy
from tpa_nb.recipe import Recipe, recipe_methods
from tpa_nb.rpca import inexact_alm
from tpa_nb.tasks import toy_pairs
from tpa_nb.train import finetune


@pytest.fixture(scope='module')
def task():
    return toy_pairs(n_train=32, n_validation=8)


def adapted(**kwargs):
    "A tiny BERT whose adapter has learnt something"
    arch = add_dsee(tiny_arch('bert'), **{**dict(r=2, n_sparse=4), **kwargs})
    torch.manual_seed(0)
    with torch.no_grad():
        for p in arch.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return arch


def weight(arch):
    return arch.attns[0].q.site.get_base_layer().weight


def test_the_parts_of_a_recipe_draw_orders_of_their_own(task, monkeypatch):
    seeds = {}
    import tpa_nb.methods as methods
    real = methods.finetune
    for method in ('dsee', 'prune-lora', 'moebert', 'moefy'):
        seen = seeds[method] = []
        def spied(arch, task, *args, seed, seen=seen, **kwargs):
            seen.append(seed)
            return real(arch, task, *args, seed=seed, **kwargs)
        monkeypatch.setattr(methods, 'finetune', spied)
        monkeypatch.setattr('tpa_nb.distill.finetune', spied)
        monkeypatch.setattr('tpa_nb.train.finetune', lambda arch, task, epochs, lr, batch_size, seed, seen=seen, **kw:
                            (seen.append(seed), real(arch, task, epochs, lr, batch_size, seed, **kw))[1])
        recipe = Recipe(method=method, epochs=1, r=2, n_sparse=4, batch_size=8, calibration=8, expert_r=2)
        recipe_methods[method](tiny_arch('bert'), task, recipe, False)
    assert all(len(found) >= 2 and len(set(found)) == len(found) for found in seeds.values()), seeds


def test_weights_go_gradually_in_a_recipe(task):
    recipe = Recipe(method='dsee', epochs=1, r=2, n_sparse=4, batch_size=8, weight_ratio=0.5, iterative_steps=2)
    found = recipe_methods['dsee'](tiny_arch('bert'), task, recipe, False).arch
    shares = [h['zeros']['adapted'] for h in found.history if h['verb'] == 'mask_from_update']
    assert shares == pytest.approx([1 - 0.5 ** 0.5, 0.5], abs=0.01)


@pytest.mark.parametrize('name, value', [('flops_ratio', 0.3), ('neuron_ratio', 0.5), ('max_drop', 1.), ('keep', 4),
                                         ('scope', 'layer')])
def test_what_dsee_does_not_do_is_refused(task, name, value):
    recipe = Recipe(method='dsee', r=2, n_sparse=4, weight_ratio=0.5, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}` means nothing to the method 'dsee'"):
        check_recipe(recipe, tiny_arch('bert'), task)


def test_recipes_that_would_fail_after_training_fail_before_it(task):
    with pytest.raises(ValueError, match='leave the attentions without an update'):
        check_recipe(Recipe(method='dsee', r=2, targets=('up', 'down')), tiny_arch('bert'), task)
    mixed = moefy(tiny_arch('bert'), 4, 2, split='random', router=None)
    with pytest.raises(ValueError, match='this model has mixtures'):
        check_recipe(Recipe(method='dsee', r=2, weight_ratio=0.5), mixed, task)
    with pytest.raises(ValueError, match='no plain layer any more'):
        arch = add_dsee(mixed, r=2, n_sparse=4)
        arch.attns[0].q.site.lora_S['default'].data += 1
        mask_from_update(arch, 0.3)


def test_adapters_that_are_not_seen_are_refused():
    arch = tiny_arch('bert')
    arch.model.add_adapter(LoraConfig(target_modules=['key'], r=2))
    with pytest.raises(ValueError, match='`model.add_adapter` put there'):
        add_dsee(arch, r=2, n_sparse=3)


def test_a_second_adapter_has_the_positions_and_the_mask_of_the_first():
    arch = mask_from_update(adapted(), 0.3)
    zeros = weight(arch) == 0
    arch.model.add_adapter('second', arch.model.peft_config['default'])
    site = arch.attns[0].q.site
    assert torch.equal(site.lora_S_index['second'], site.lora_S_index['default'])
    torch.nn.init.normal_(site.lora_B['second'].weight)
    arch.model.set_adapter('second')
    arch.model.merge_adapter()
    assert torch.equal(weight(arch) == 0, zeros)


def test_an_adapter_merged_in_place_is_not_trained(task):
    arch = adapted()
    arch.model.merge_adapter()
    with pytest.raises(ValueError, match='merged in place, which would learn nothing'):
        finetune(arch, task, max_steps=1)


@pytest.mark.parametrize('other', [None, dict(pruning_ratio=0.2), dict(pruning_ratio=0.4, mask='weight')])
def test_a_run_is_not_resumed_under_other_masks(task, tmp_path, other):
    settings = dict(epochs=2, output_dir=tmp_path / 'run', save_total_limit=3)
    finetune(mask_from_update(adapted(), 0.4), task, **settings)
    last = max((tmp_path / 'run').glob('checkpoint-*'), key=lambda p: int(p.name.rpartition('-')[2]))
    shutil.rmtree(last)
    same = mask_from_update(adapted(), 0.4)
    changed = adapted() if other is None else mask_from_update(adapted(), **other)
    with pytest.raises(ValueError, match='holds another adapter than this model has'):
        finetune(changed, task, resume=True, **settings)
    finetune(same, task, resume=True, **settings)
    merge_dsee(same)


def test_zeros_of_the_checkpoint_are_not_taken_for_masks():
    def sparse_before():
        arch = tiny_arch('bert')
        with torch.no_grad():
            for a in arch.attns:
                for p in (a.q, a.v):
                    p.weight.masked_fill_(torch.rand(p.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3, 0)
        add_dsee(arch, r=2, n_sparse=4)
        for a in arch.attns:
            for p in (a.q, a.v):
                torch.nn.init.normal_(p.site.lora_B['default'].weight, generator=torch.Generator().manual_seed(2))
        return arch
    twice = mask_from_update(mask_from_update(sparse_before(), 0.2, 0.), 0.5, 0.)
    once = mask_from_update(sparse_before(), 0.5, 0.)
    assert torch.equal(weight(twice) == 0, weight(once) == 0)


def test_a_merge_under_autocast_is_exact():
    arch = mask_from_update(adapted(), 0.3)
    batch = tiny_batch(arch)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        before = arch.model(**batch).logits
    merge_dsee(arch)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(arch.model(**batch).logits, before)


def test_random_positions_need_no_copy_of_all_weights():
    arch = tiny_arch('bert', hidden_size=256, intermediate_size=256)
    import tpa_nb.dsee as dsee
    sizes, real = [], dsee.sparse_support
    dsee.sparse_support = lambda W, *args, **kwargs: (sizes.append(len(W)), real(W, *args, **kwargs))[1]
    try:
        add_dsee(arch, r=2, n_sparse=4, support='random')
    finally:
        dsee.sparse_support = real
    assert set(sizes) == {1}


def test_arguments_of_the_adapter():
    for kwargs, said in ((dict(targets=('q', 'q')), '`targets` must be some of'), (dict(r=2.), '`r` must be'),
                         (dict(r=None), '`r` must be'), (dict(lora_alpha=float('nan')), '`lora_alpha` must be above 0')):
        with pytest.raises(ValueError, match=said):
            add_dsee(tiny_arch('bert'), n_sparse=2, **kwargs)
    with pytest.raises(ValueError, match='`model_type` must be'):
        dsee_settings('rte', 'albert')
    with pytest.raises(ValueError, match='`lam` must be above 0'):
        inexact_alm(torch.randn(4, 4), lam=0)
    with pytest.raises(ValueError, match='a matrix of zeros'):
        inexact_alm(torch.zeros(4, 4))


def test_the_history_tells_the_zeros_that_are_there():
    arch = mask_from_update(adapted(), 0.3, 0.9)
    mask_from_update(arch, 0.5, 0.2)
    assert arch.history[-1]['zeros']['others'] == pytest.approx(0.9, abs=0.01)
    with pytest.raises(ValueError, match="`pattern` '2:4' would bring some back"):
        mask_from_update(mask_from_update(adapted(), 0.7), pattern='2:4')


# Data to text


def test_edits_are_counted_on_words_and_signs():
    pytest.importorskip('sacrebleu')
    assert Ter().compute(predictions=['A dog, barks.'], references=[['A dog , barks .']])['ter'] == 0
    lower = Ter(lowercase=True).compute(predictions=['the vaults is near .'], references=[['The Vaults is near.']])
    assert lower['ter'] == 0


def test_held_out_records_are_not_trained_on():
    kept, held = toy_records().split(0.2)
    assert not set(kept.rows['source'][:]) & set(held.rows['source'][:])


def test_a_record_is_one_line():
    assert linearize({'a': 'x\ny'}) == 'a : x y'
    with pytest.raises(ValueError, match='`n_train` must be'):
        load_data_to_text('e2e', '/nonexistent', n_train=0)
