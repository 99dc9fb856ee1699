"""Models with prefixes, and PEFT's with the same."""

import copy
import warnings

import pytest
import torch

from fastpeft import PrefixTuning, attach
from tests.support.models import bert, gpt2, llama, prompts, roberta

peft = pytest.importorskip("peft", reason="PEFT is not installed")


def bert_encoder():
    return bert().bert


def roberta_encoder():
    return roberta().roberta


FAMILIES = {"llama": llama, "gpt2": gpt2, "bert": bert_encoder, "roberta": roberta_encoder}


each_family = pytest.mark.parametrize("family", FAMILIES)


each_causal = pytest.mark.parametrize("family", ["llama", "gpt2"])


each_kind = pytest.mark.parametrize("projection", [None, 6], ids=["plain", "projection"])


def with_prefixes(model, projection=None, **lengths):
    torch.manual_seed(1)
    for name, length in lengths.items():
        attach(model, PrefixTuning(length=length, projection=projection), name=name)
        for parameter in model.fastpeft_prefix.adapters[name].parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def in_peft(model, family, **settings):
    torch.manual_seed(2)
    task = "FEATURE_EXTRACTION" if "bert" in family else "CAUSAL_LM"
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), config).eval()


def padded(rows=3):
    ids, mask = prompts(rows), torch.ones(rows, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    return ids, mask


def copy_weights(theirs, ours):
    """Into PEFT's modules."""
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(ours.embedding)
        if ours.transform is not None:
            encoder.transform.load_state_dict(ours.transform.state_dict())
    trained = [encoder.embedding.weight]
    return trained + (list(encoder.transform.parameters()) if ours.transform is not None else [])
