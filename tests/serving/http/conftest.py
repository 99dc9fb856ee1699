"""The adapters that the servers of these tests offer."""

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.support.lora_checkpoints import checkpoints  # which needs PEFT
    from tests.support.models import llama

    root = tmp_path_factory.mktemp("adapters")
    checkpoints(llama(), root)
    return root


@pytest.fixture(scope="module")
def served(folder):
    """A service of three slots, and a client of its server."""
    from tests.support.small_server import serving  # which needs the server's packages

    with serving(folder, slots=3) as (service, client):
        yield service, client


@pytest.fixture
def client(served):
    return served[1]
