"""Adapted experts under DistributedDataParallel and FSDP2 on two gloo processes: the gradients are those of one.

This file is also the program that the processes run: ``python test_distributed_experts.py RANK FOLDER``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpeft
from tests.support import session
from tests.support.models import build, prompts

WORLD, MODES = 2, ("ddp", "fsdp2")


def attached():
    torch.manual_seed(1)
    model = build("qwen3_moe", num_hidden_layers=1).double()
    return fastpeft.attach(model, fastpeft.Lora(r=3, init="random")).train()


def gradients(model, rank=0, world=1):
    ids = prompts(4).chunk(world)[rank]
    model(input_ids=ids).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main(rank, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    model = attached()
    found = gradients(torch.nn.parallel.DistributedDataParallel(model), rank, WORLD)
    torch.save({name.removeprefix("module."): grad for name, grad in found.items()}, f"{folder}/ddp {rank}.pt")
    model = attached()
    for layer in model.model.layers:
        fully_shard(layer)
    found = gradients(fully_shard(model), rank, WORLD)
    torch.save({name: grad.full_tensor() for name, grad in found.items()}, f"{folder}/fsdp2 {rank}.pt")
    fastpeft.save(model, f"{folder}/adapter")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_all(folder):
    """Two processes leave their gradients of every mode, and what they saved."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fastpeft.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=600)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)


@pytest.fixture
def folder():
    """Where two processes have left their results, once a session."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    return session.once("distributed experts", train_all)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_one_process(mode, folder):
    expected = gradients(attached())
    assert any(".experts.adapters." in name for name in expected)
    for rank in range(WORLD):
        found = torch.load(folder / f"{mode} {rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            # The mean over two halves of a batch rounds otherwise than over the whole, in float64.
            assert (found[name] - grad).abs().max() <= 1e-13 * max(1, grad.abs().max()), name


def test_what_shards_saved_is_whole(folder):
    loaded = fastpeft.load(build("qwen3_moe", num_hidden_layers=1).double(), folder / "adapter")
    found, wanted = (fastpeft.methods.adapter_state_dict(model) for model in (loaded, attached()))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
