"""The adapters that the servers of these tests offer."""

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.support.lora_checkpoints import checkpoints  # which needs PEFT
    from tests.support.models import llama

    root = tmp_path_factory.mktemp("adapters")
    checkpoints(llama(), root)
    return root
