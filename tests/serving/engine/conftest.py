"""A bank of three slots around the small Llama, with every adapter loaded."""

import pytest

from fastpeft.serving import AdapterBank


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from tests.support.lora_checkpoints import checkpoints  # which needs PEFT
    from tests.support.models import llama

    return checkpoints(llama(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def bank(folders):
    from tests.support.models import llama

    with AdapterBank(llama(), slots=3, max_rank=16) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        yield bank
