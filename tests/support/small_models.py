"""Small transformers of different families, for the tests of methods that act on whole models."""

import torch

from tests.support.small_llama import VOCAB, llama


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.15, **sizes, **drops, **ids)).eval()


def _bert_config(kind):
    return kind(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.15,
        pad_token_id=0,
        num_labels=3,
    )


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(_bert_config(BertConfig)).eval()


def bert_tokens():
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    return BertForTokenClassification(_bert_config(BertConfig)).eval()


def roberta():
    from transformers import RobertaConfig, RobertaForTokenClassification

    torch.manual_seed(0)
    return RobertaForTokenClassification(_bert_config(RobertaConfig)).eval()


def llama_classifier():
    from transformers import LlamaForSequenceClassification

    config = llama().config
    config.num_labels = 3
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, dropout_rate=0.0, **sizes, **ids)).eval()
