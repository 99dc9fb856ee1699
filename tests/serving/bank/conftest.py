"""A small Llama, adapters for it, and a bank of four slots with every adapter loaded."""

import pytest

from fastpeft.serving import AdapterBank


@pytest.fixture(scope="module")
def model():
    from tests.support.models import llama  # which needs transformers

    return llama()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    from tests.support.lora_checkpoints import checkpoints  # which needs PEFT

    return checkpoints(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def bank(model, folders):
    with AdapterBank(model, slots=4, max_rank=16) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        yield bank
