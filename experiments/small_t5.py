"A small T5 and its tokenizer, made here from nothing: SST-2 asked in words"
from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from tpa_nb.arch import Arch
from tpa_nb.text import as_prompts

PREFIX, VOCABULARY = 't5-', 8000
SPECIAL = dict(pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
SIZES = dict(d_model=192, d_kv=48, num_heads=4, d_ff=1536, num_layers=2, num_decoder_layers=1)


def asked_in_words(task):
    "The task as prompts; the label words are two that reviewers use"
    return replace(as_prompts(task, '{sentence} it was', ('terrible', 'great')), name=PREFIX + task.name)


def trained_tokenizer(texts):
    "A unigram tokenizer as T5's, trained on `texts`"
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.train_from_iterator(texts, trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL.values()), unk_token='<unk>', show_progress=False))
    end = inner.token_to_id('</s>')
    inner.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', end)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def small_t5(task, seed):
    "A T5 with ReLU and random weights, and a tokenizer that has read the training rows"
    texts = [task.template.format(sentence=s) for s in task.train['sentence'][:]] + list(task.label_words) * 100
    tokenizer = trained_tokenizer(texts)
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(tokenizer), dense_act_fn='relu', pad_token_id=tokenizer.pad_token_id,
                      eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id, **SIZES)
    return Arch(T5ForConditionalGeneration(config).eval(), tokenizer)
