"What once went wrong in distillation, MoEBERT and question answering"
import copy

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from tpa_nb.distill import Distillation, distill
from tpa_nb.families import tiny_arch, tiny_batch
from tpa_nb.lora import add_lora
from tpa_nb.lora_expert import add_lora_expert, fit_lora_expert
from tpa_nb.methods import check_recipe
from tpa_nb.moe import expert_usage, moefy, moes, set_router, unmoefy
from tpa_nb.moebert import BalanceLoss, active_params, moebert
from tpa_nb.questions import load_squad, question_task, toy_questions
from tpa_nb.recipe import Recipe
from tpa_nb.router import OracleRouter, set_dynamic_k
from tpa_nb.tasks import toy_pairs
from tpa_nb.text import as_prompts, text_task
from tpa_nb.train import evaluate_model, finetune, predict

IMP = [torch.arange(64.)] * 2
QA = dict(task_type='question_answering')


@pytest.fixture(scope='module')
def task():
    return toy_pairs(n_train=64, n_validation=16).with_max_length(40)


def row(context, answer='Anna', start=0, question='Who has the key?'):
    return {'question': question, 'context': context, 'answers': [answer], 'starts': [start]}


# Questions


def test_answers_of_batches_of_different_lengths_are_scored_together():
    found = evaluate_model(tiny_arch('bert', **QA), toy_questions(8, 100))
    assert 0 <= found['f1'] <= 1


def test_a_tokenizer_that_pads_on_the_left_finds_the_answers():
    rows = [row('Anna has the key.' + ' x' * i) for i in range(0, 30, 3)]
    task = question_task('x', rows, rows, max_length=120, stride=10)
    arch = tiny_arch('llama', **QA)
    arch.tokenizer.padding_side = 'left'
    batch = next(task.examples('train').batches(arch.tokenizer, 10))
    said = {arch.tokenizer.decode(ids[s:e + 1]) for ids, (s, e, *_) in zip(batch['input_ids'], batch['labels'].tolist())}
    assert said == {'Anna'} and arch.tokenizer.padding_side == 'left'


def test_blanks_at_the_edge_of_answers_and_questions_do_no_harm():
    words = {w: i for i, w in enumerate(['[PAD]', '[UNK]', 'Anna', 'has', 'the', 'key', '.', 'Who', '?'])}
    inner = Tokenizer(models.WordLevel(words, '[UNK]'))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token='[PAD]', unk_token='[UNK]')
    cases = (('Anna', 0), ('Anna ', 0), ('key', 13), (' key', 12))
    rows = [row('Anna has the key.', *case, question=' ' * 70 + 'Who has the key?') for case in cases]
    task = question_task('x', rows, rows, max_length=20, stride=2)
    places = [r['labels'][:2] for r in task.examples('train').encode(tok)]
    assert places[0] == places[1] != [0, 0] and places[2] == places[3] != [0, 0]
    with pytest.raises(ValueError, match='does not stand'):
        question_task('x', [row('Anna has the key.', ' ', 4)], rows)


def test_what_questions_cannot_do_is_said():
    rows = [row('Anna has the key.')]
    task = question_task('x', rows, rows, max_length=300, stride=10)
    with pytest.raises(ValueError, match='`tokenizer` CanineTokenizer .* questions need a fast tokenizer'):
        task.examples('train').encode(CanineTokenizer())
    with pytest.raises(ValueError, match='`max_length` is 300, but the model has'):
        evaluate_model(tiny_arch('bert', **QA), task)
    with pytest.raises(ValueError, match="the question 'Who.*leaves no room"):
        question_task('x', [row('Anna.', question='Who ' * 60)], rows, max_length=80, stride=10).examples(
            'train').encode(tiny_arch('bert').tokenizer)
    with pytest.raises(ValueError, match='`n_train` must be 1 row or more, got -1'):
        load_squad(n_train=-1)


def test_a_diverged_model_gets_no_score():
    arch = tiny_arch('bert', **QA)
    torch.nn.init.constant_(arch.model.qa_outputs.weight, float('nan'))
    with pytest.raises(ValueError, match='scores that are not numbers'):
        evaluate_model(arch, toy_questions(8, 8))


# Prompts


@pytest.mark.parametrize('name', ['gpt2', 'opt', 'llama', 'qwen2'])
def test_prompts_do_not_depend_on_their_batch(name):
    task = as_prompts(toy_pairs(n_train=8, n_validation=32).with_max_length(100), task_type='causal_lm')
    arch = tiny_arch(name, task_type='causal_lm')
    torch.testing.assert_close(predict(arch, task, batch_size=1), predict(arch, task, batch_size=32), atol=1e-4, rtol=0)


# MoEBERT


def test_no_token_sees_what_comes_after_it():
    for name, kind in (('gpt2', 'causal_lm'), ('t5', 'seq_2_seq_lm')):
        arch = tiny_arch(name, task_type=kind)
        with pytest.raises(ValueError, match="`router` 'sentence' takes the mean of all tokens, and .* must not see"):
            moebert(arch, [torch.arange(float(f.d_ff)) for f in arch.ffns], 22, 8, router='sentence')
        assert not moes(arch)
    encoder = tiny_arch('t5', task_type='seq_2_seq_lm')
    moebert(encoder, [torch.arange(float(f.d_ff)) for f in encoder.ffns], 22, 8, router='sentence', rows=[0, 1])
    opt = tiny_arch('opt')
    with pytest.raises(ValueError, match='one row'):
        moebert(opt, [torch.arange(float(f.d_ff)) for f in opt.ffns], 22, 8, router='sentence')
    assert not moes(opt) and not opt.history


def test_a_routed_model_can_be_copied_after_training(task):
    arch = moebert(tiny_arch('bert'), IMP, 22, 8, router='token')
    finetune(arch, task, max_steps=1)
    copied = copy.deepcopy(arch.clone())
    assert all(m.seen is None for m in moes(copied).values())


def test_usage_of_sentence_routers_does_not_depend_on_the_batch(task):
    arch = moebert(tiny_arch('bert'), IMP, 22, 8, router='sentence')
    with torch.no_grad():
        for m in moes(arch).values():
            m.router.linear.weight.mul_(100)
    one, many = (expert_usage(arch, task.examples('validation'), n).share for n in (1, 16))
    for r in one:
        torch.testing.assert_close(one[r], many[r])
    for m in moes(arch).values():
        m.shared = None
    add_lora_expert(arch, 2)
    with pytest.raises(ValueError, match='is routed by the sentence'):
        fit_lora_expert(arch, task.calibration(8))


def test_the_mean_of_a_sentence_leaves_out_the_padding_of_the_tokenizer():
    arch = tiny_arch('gpt2')
    arch.base.config.pad_token_id, arch.tokenizer.pad_token = None, '[SEP]'
    moebert(arch, IMP, 22, 8, router='sentence')
    assert moes(arch)[0].router.pad == arch.tokenizer.pad_token_id != 0


def test_learned_routers_take_the_precision_of_the_model():
    arch = tiny_arch('bert')
    arch.model.to(torch.bfloat16)
    moebert(arch, IMP, 22, 8, router='token')
    assert arch.model(**tiny_batch(arch)).logits.isfinite().all()


def test_the_balance_of_one_expert_and_of_another_model(task):
    with pytest.raises(ValueError, match='no router that learns'):
        BalanceLoss(moebert(tiny_arch('bert'), IMP, 22, 8, 1, router='token'))
    arch = moebert(tiny_arch('bert'), IMP, 22, 8, router='token')
    with pytest.raises(ValueError, match='not the one that `BalanceLoss` was made for'):
        finetune(arch.clone(), task, max_steps=1, added=[BalanceLoss(arch)])
    check_recipe(Recipe(method='moebert', router='token', n_experts=1), tiny_arch('bert'), task)


def test_balance_counts_no_padding_of_the_decoder():
    arch = tiny_arch('t5', task_type='seq_2_seq_lm')
    moebert(arch, [torch.arange(float(f.d_ff)) for f in arch.ffns], 22, 8, router='token')
    loss, batch = BalanceLoss(arch), tiny_batch(arch)
    arch.model.train()
    found = []
    for more in (0, 40):
        labels = torch.nn.functional.pad(batch['labels'], (0, more), value=-100)
        torch.manual_seed(0)
        for m in arch.model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0
        outputs = arch.model(**{**batch, 'labels': labels})
        found.append(loss(outputs, {**batch, 'labels': labels}).item())
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_checkpoints_that_hide_the_routers_are_refused(task):
    arch = moebert(tiny_arch('bert'), IMP, 22, 8, router='token')
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        finetune(arch, task, max_steps=1, added=[BalanceLoss(arch)], gradient_checkpointing=True,
                 gradient_checkpointing_kwargs={'use_reentrant': True})


def test_other_routers_can_be_put_into_a_routed_layer(task):
    arch = moebert(tiny_arch('bert'), IMP, 22, 8, router='token')
    for f in arch.ffns:
        set_router(f, OracleRouter(moes(arch)[f.row].n_experts))
    assert arch.model(**tiny_batch(arch)).logits.isfinite().all()
    with pytest.raises(ValueError, match='no router that learns'):
        BalanceLoss(arch)


def test_experts_that_share_neurons_make_no_plain_layer():
    with pytest.raises(ValueError, match='experts that share neurons'):
        unmoefy(moebert(tiny_arch('bert'), IMP, 22, 8))


def test_active_parameters_follow_a_dynamic_k(task):
    arch = moefy(tiny_arch('bert'), 8, 2, task.calibration(16), split='random')
    fixed = active_params(arch)
    set_dynamic_k(arch, task.calibration(16), 2)
    assert active_params(arch)['active'] == pytest.approx(fixed['active'], rel=0.05)
    assert fixed['active'] < 0.9 * fixed['stored']


def test_tables_differ_between_layers_and_seeds():
    tables = [m.router.table for seed in (0, 1) for m in moes(moebert(tiny_arch('bert'), IMP, 22, 8, seed=seed)).values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(tables) for b in tables[:i])


# Distillation


def test_a_cache_of_another_teacher_is_refused(task, tmp_path):
    teacher = tiny_arch('bert')
    student = teacher.clone()
    Distillation(student, teacher, task, cache_dir=tmp_path / 'c')
    Distillation(student, teacher, task, cache_dir=tmp_path / 'c')
    other = teacher.clone()
    for f in other.ffns:
        f.set_act('relu')
    with pytest.raises(ValueError, match='answers of another teacher'):
        Distillation(student, other, task, cache_dir=tmp_path / 'c')
    next((tmp_path / 'c').glob('*.safetensors')).unlink()
    with pytest.raises(ValueError, match='damaged'):
        Distillation(student, teacher, task, cache_dir=tmp_path / 'c')


def test_a_teacher_in_training_mode_answers_without_dropout(task):
    teacher = tiny_arch('bert')
    teacher.model.train()
    loss = Distillation(teacher.clone(), teacher, task)
    batch = next(task.examples('train').batches(teacher.tokenizer, 8))
    assert torch.equal(loss.targets(batch)[1], loss.targets(batch)[1]) and teacher.model.training


def test_a_teacher_that_shares_weights_is_refused(task):
    arch = tiny_arch('bert')
    teacher = type(arch)(arch.model, arch.tokenizer)
    with pytest.raises(ValueError, match='share weights'):
        distill(add_lora(arch, r=2), teacher, task, max_steps=1)


def test_t5_learns_to_answer_questions_from_a_teacher():
    teacher = tiny_arch('t5', **QA)
    distill(teacher.clone(), teacher, toy_questions(16, 8), max_steps=1)


def test_a_narrow_student_in_half_precision_learns(task):
    student = tiny_arch('bert', hidden_size=16)
    student.model.to(torch.bfloat16)
    distill(student, tiny_arch('bert'), task, max_steps=1, mixed_precision='no')


def test_a_teacher_that_cuts_words_otherwise_is_refused(task):
    teacher = tiny_arch('bert')
    student = teacher.clone()
    student.tokenizer = copy.deepcopy(student.tokenizer)
    student.tokenizer.backend_tokenizer.normalizer = normalizers.Replace('a', 'b')
    with pytest.raises(ValueError, match='cuts texts into other tokens'):
        distill(student, teacher, task, max_steps=1)


def test_nothing_is_written_before_the_arguments_are_right(task, tmp_path):
    teacher = tiny_arch('bert')
    with pytest.raises(ValueError, match='`epochs` must be above 0'):
        distill(teacher.clone(), teacher, task, epochs=0, cache_dir=tmp_path / 'c')
    assert not (tmp_path / 'c').exists()
    with pytest.raises(ValueError, match='`label_smoothing_factor` works on'):
        distill(teacher.clone(), teacher, task, max_steps=1, label_smoothing_factor=0.1)


# Recipes


def test_recipes_ask_for_a_teacher_that_is_there(task):
    fresh = tiny_arch('bert')
    fresh.new_weights = ['classifier.weight']
    with pytest.raises((ValueError, OSError)):
        check_recipe(Recipe(method='moebert', teacher='/nonexistent'), fresh, task)
    with pytest.raises(ValueError, match="`warm_up` must be above 0 for 'moebert'"):
        check_recipe(Recipe(method='moebert', warm_up=0.), fresh, task)
    for name in ('distill_weight', 'temperature'):
        with pytest.raises(ValueError, match=f'`{name}`'):
            Recipe(**{name: float('inf')})
    with pytest.raises(ValueError, match="`distill_weight` means nothing to the method 'prune'"):
        check_recipe(Recipe(method='prune', distill_weight=1.), tiny_arch('bert'), task)


def test_a_text_that_is_cut_away_is_named():
    rows = [('y' * 50, 't'), ('y', 't')]
    task = text_task('x', rows, rows, max_length=20)
    with pytest.raises(ValueError, match='leaves nothing of the text'):
        task.examples('train').encode(tiny_arch('gpt2').tokenizer)
    long = text_task('x', [('y', 't' * 200)], [('y', 't')], 'seq_2_seq_lm', max_length=20)
    assert long.examples('train').truncated(tiny_arch('t5').tokenizer) == 1
