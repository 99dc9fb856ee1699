"""DistributedDataParallel and FSDP2 on two gloo processes: the trained weights are those of one process.

This file is also the program that the processes run: ``python test_distributed.py RANK FOLDER``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from tests.support import session

WORLD, STEPS, BATCH = 2, 3, 8
MODES = {
    "ddp": {},
    "fsdp2": {},
    "fsdp2 checkpointed": {"checkpointed": True},
    "fsdp2 every layer": {},  # fully_shard puts hooks on every LoraLinear, so that none shares its input
    "ddp dropout": {"dropout": 0.2},
}


class Block(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)
        self.checkpointed = checkpointed

    def mix(self, x):
        return x + self.out(self.q_proj(x) * self.k_proj(x).tanh() + self.v_proj(x))

    def forward(self, x):
        return checkpoint(self.mix, x, use_reentrant=False) if self.checkpointed else self.mix(x)


def build(checkpointed=False, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(checkpointed) for _ in range(2)), nn.Linear(8, 3)).double()
    return fastpeft.attach(model, fastpeft.Lora(r=4, dropout=dropout, init="random", modules_to_save=["2"]))


def train(model, rank=0, world=1):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(BATCH, n, dtype=torch.float64, generator=generator) for n in (8, 3))
        x, y = x.chunk(world)[rank], y.chunk(world)[rank]
        torch.manual_seed(100 * step + rank)  # every process its own masks
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def wrapped(mode, model):
    if mode.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    if mode == "fsdp2 every layer":
        for module in model.modules():
            if isinstance(module, fastpeft.nn.LoraLinear):
                fully_shard(module)
    for block in model[:2]:
        fully_shard(block)
    return fully_shard(model)


def main(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    for mode, settings in MODES.items():
        model = build(**settings)
        train(wrapped(mode, model), rank, WORLD)
        shared = model[0].q_proj.fastpeft_shared.rounds > 0
        if shared == (mode == "fsdp2 every layer"):
            raise RuntimeError(f"{mode}: inputs shared: {shared}")
        fastpeft.save(model, os.path.join(folder, mode))
        if mode.startswith("ddp"):
            torch.save(fastpeft.methods.adapter_state_dict(model), os.path.join(folder, mode + f" rank {rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_all(folder):
    """Two processes train and save every mode."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fastpeft.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=600)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)


@pytest.fixture
def folder():
    """Where two processes have trained and saved every mode, once a session."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    return session.once("distributed", train_all)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "dropout" not in mode])
def test_trained_weights_are_those_of_one_process(mode, folder):
    single = build()
    start = {key: value.clone() for key, value in fastpeft.methods.adapter_state_dict(single).items()}
    train(single)
    expected = fastpeft.methods.adapter_state_dict(single)
    model = fastpeft.load(build(), folder / mode)
    actual = fastpeft.methods.adapter_state_dict(model)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        # The mean over two halves of a batch rounds otherwise than over the whole; three steps of float64.
        assert (actual[key] - value).abs().max() <= 1e-11
        assert (start[key] - value).abs().max() > 1e-3


def test_ddp_with_dropout_keeps_the_processes_together(folder):
    first, second = (torch.load(folder / f"ddp dropout rank {rank}.pt", weights_only=True) for rank in range(WORLD))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_sharded_model_is_refused():
    """Its weights are DTensors: adapters come first, sharding second."""
    code = """
import tempfile, torch, fastpeft
from torch.distributed.fsdp import fully_shard
store = torch.distributed.FileStore(tempfile.mktemp(), 1)
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
fully_shard(model)
try:
    fastpeft.attach(model, fastpeft.Lora(targets=["0"]))
except ValueError as error:
    print(error)
torch.distributed.destroy_process_group()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(fastpeft.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert "attach first, then call fully_shard" in done.stdout, done.stderr


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
