"""The bank's slots: the least recently used adapter makes room, leased and pinned ones stay, no old contents leak."""

import pytest
import torch

from fastpeft.serving import AdapterBank, BadCheckpoint, BankError, BankFull

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.lora_checkpoints import SETTINGS
from tests.support.models import prompts

NAMES = list(SETTINGS)
MIXED = ["alice", None, "dave", "bob", "carol", "alice", None, "bob"]


def test_a_cpu_takes_similar_ranks_together(model, folders):
    """Padded with zeros up to the next power of two, 8 at least: ranks that are near each other need one call."""
    with AdapterBank(model, slots=4, max_rank=16) as bank:
        for name in NAMES:
            bank.load(name, folders[name])
        ranks = {rank for site in bank._sites for rank in site.ranks.tolist()}
        assert ranks == {0, 8, 16}


def test_least_recently_used_makes_room(model, folders):
    with AdapterBank(model, slots=2, max_rank=16) as bank:
        for name in NAMES:
            bank.load(name, folders[name])
        assert bank.names() == NAMES
        assert bank.resident() == ["alice", "bob"]
        with bank.use(["alice"]):
            pass
        with bank.use(["carol", None]):
            assert bank.resident() == ["alice", "carol"]
        bank.pin("alice")
        with bank.use(["dave"]):
            assert bank.resident() == ["alice", "dave"]
        bank.unpin("alice")
        with bank.use(["bob"]):
            assert bank.resident() == ["dave", "bob"]
        assert "alice" in bank
        bank.unload("alice")
        assert "alice" not in bank


def test_a_lease_keeps_its_adapter(model, folders):
    """Loaded anew under the same name or unloaded: who holds the old one keeps it, whoever comes gets the new one."""
    ids = prompts(1)
    with AdapterBank(model, slots=2, max_rank=16) as bank:
        bank.load("a", folders["alice"])
        bank.load("b", folders["bob"])
        with bank.use(["a"]):
            alice = model(ids).logits
        with bank.use(["b"]):
            bob = model(ids).logits
        bank.unload("b")
        lease = bank.lease("a")
        with bank.use(["a"]):
            bank.load("a", folders["bob"])
            assert torch.equal(model(ids).logits, alice)
            with bank.use(["a"]):
                assert torch.equal(model(ids).logits, bob)
            assert torch.equal(model(ids).logits, alice)
        with bank.use([lease]):
            bank.unload("a")
            assert torch.equal(model(ids).logits, alice)
        with pytest.raises(BankError, match="close: adapters are in use: a"):
            bank.close()
        lease.release()
        lease.release()
        assert bank.names() == []
        with pytest.raises(ValueError, match="a lease on 'a' that was released"), bank.use([lease]):
            pass


def test_bank_full(model, folders):
    with AdapterBank(model, slots=2, max_rank=16) as bank:
        for name in NAMES:
            bank.load(name, folders[name])
        with pytest.raises(BankFull, match="use: 3 different adapters need a slot, but of 2 slots 0 are in"):
            bank.use(["alice", "bob", "carol"]).__enter__()
        bank.pin("alice")
        with bank.use(["bob"]):
            with pytest.raises(BankFull, match="1 are in use by running batches and 1 others are pinned"):
                bank.use(["carol"]).__enter__()
            with pytest.raises(BankFull, match="load: "):
                bank.load("eve", folders["carol"], pin=True)
            assert "eve" not in bank
            with bank.use(["alice", "bob", "alice", None]):
                assert bank.resident() == ["alice", "bob"]
        with bank.use(["carol"]):
            assert bank.resident() == ["alice", "carol"]


@torch.no_grad()
def test_what_evicted_slots_held_is_never_read(bank, model, folders):
    """NaN in every free slot, beyond every true rank and in every untouched layer."""
    ids, rows = prompts(len(MIXED)), MIXED
    with bank.use(rows):
        expected = model(ids).logits
    for name in NAMES:
        bank.unload(name)
    for site in bank._sites:
        for table in (site.lora_a, site.lora_b):
            table.fill_(float("nan"))
    for name in reversed(NAMES):
        bank.load(name, folders[name])
    with bank.use(rows):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_host_memory_is_bounded(folders):
    """Tensors that are let go are read again, unless the files are others by now; what runs does not notice."""
    from tests.support.models import llama

    free = AdapterBank(llama(), slots=1, max_rank=16)
    bank = AdapterBank(llama(), slots=1, max_rank=16, host_bytes=1)
    for name in NAMES:
        for each in (free, bank):
            each.load(name, folders[name])
    assert [bank._known._by_name[name].tensors for name in NAMES] == [None] * len(NAMES)
    for name in (*NAMES, *NAMES):
        with free.use([name]), bank.use([name]):
            assert torch.equal(free.model(prompts(1)).logits, bank.model(prompts(1)).logits)
    config = folders["alice"] / "adapter_config.json"
    text = config.read_text()
    try:
        config.write_text(text + " ")
        with pytest.raises(BadCheckpoint, match="the files of 'alice' have changed since it was loaded"):
            bank.use(["alice"]).__enter__()
        assert bank.resident() == [NAMES[-1]]
    finally:
        config.write_text(text)
    with pytest.raises(ValueError, match="host_bytes is 0"):
        AdapterBank(llama(), host_bytes=0)
