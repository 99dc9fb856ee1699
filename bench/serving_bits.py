"""What training with the bits that serve costs: a step inside ``fastpeft.serving_bits`` over the usual one, on a CPU.

    python -m bench.serving_bits

A Llama of 4 layers, 512 wide, with LoRA of rank 16 on all linear layers; forward and backward of 4 x 128 tokens, one
thread, processor time, both ways in turn. Kept is what the forward leaves for backward. The shares say how many of a
layer's outputs have the bits with which ``multi_lora_`` serves them after the layer's own base.
"""

import argparse
import statistics
import time

import torch

import fastpeft
from tests.support.models import build

SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4}


def adapted(dtype):
    model = build("llama", num_hidden_layers=4, initializer_range=0.05, **SIZES).to(dtype)
    fastpeft.attach(model, fastpeft.Lora(r=16, alpha=16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def step(model, ids) -> tuple[float, int]:
    """Seconds, and bytes kept for backward."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    began = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    loss.backward()
    seconds = time.process_time() - began
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return seconds, sum(size for address, size in kept.items() if address not in own)


def share(model, rows: int = 128) -> tuple[float, float]:
    """Of one layer's outputs, those with the bits that serve: by the usual forward, and inside the context."""
    layer = model.model.layers[0].self_attn.q_proj
    base, adapter = layer.base_layer, layer.adapters["default"]
    torch.manual_seed(0)
    x = torch.randn(rows, base.in_features).to(base.weight.dtype)
    a, b = (torch.nn.Parameter(t.to(x.dtype)) for t in (adapter.lora_A, adapter.lora_B))
    with torch.no_grad():
        served = base(x)
        slots = torch.zeros(rows, dtype=torch.int32)
        fastpeft.ops.multi_lora_(served, x, a[None], b[None], slots, torch.tensor([adapter.scale]))
        usual = layer(x)
        with fastpeft.serving_bits(model):
            found = layer(x)
    return (usual == served).float().mean().item(), (found == served).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        model = adapted(dtype)
        ids = torch.randint(1, 90, (4, 128), generator=torch.Generator().manual_seed(0))
        found: dict[str, list] = {"usual": [], "bits": []}
        for _ in range(rounds + 1):
            found["usual"].append(step(model, ids))
            with fastpeft.serving_bits(model):
                found["bits"].append(step(model, ids))
        ratio = statistics.median(b[0] / u[0] for b, u in zip(found["bits"][1:], found["usual"][1:], strict=True))
        kept = found["bits"][-1][1] / found["usual"][-1][1]
        before, after = share(model)
        print(f"{dtype}: step {ratio:.2f}, kept {kept:.2f}; bits that serve: {before:.0%} of outputs, then {after:.0%}")


if __name__ == "__main__":
    main()
