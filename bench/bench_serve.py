"""What serving costs: tokens a second, and how long a tenant waits, beside PEFT's mixed batch and the bare model.

Rows are checked first: every way gives the tokens that PEFT's mixed batch gives. On a CPU times are the process's own,
so that others' work is not among them, and ways take turns; of each the best round is shown.

    python -m bench.bench_serve                   # 1, 8 and 32 adapters, a long row among short ones, joins and leaves
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from torch import nn

from fastpeft import serving

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, LONG = 8, 2000


def model_of(layers: int, width: int, device: torch.device) -> nn.Module:
    """A Llama of this size with random weights that ends no sequence."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval().to(device)


class Tenants:
    """One model served three ways, with the same adapters.

    Args:
        bare: the model.
        adapters: how many.
        folder: for their checkpoints.
    """

    def __init__(self, bare: nn.Module, adapters: int, folder: str):
        self.bare, self.names = bare, [f"adapter{i}" for i in range(adapters)]
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, init_lora_weights=False)
        self.peft = peft.get_peft_model(copy.deepcopy(bare), config, adapter_name=self.names[0])
        for name in self.names[1:]:
            self.peft.add_adapter(name, config)
        self.peft.eval().save_pretrained(folder)
        self.bank = serving.AdapterBank(copy.deepcopy(bare), slots=adapters, max_rank=64)
        for name in self.names:
            self.bank.load(name, Path(folder) / name)

    def rows(self, count: int) -> list[str]:
        """The adapter of each row."""
        return [self.names[i % len(self.names)] for i in range(count)]


def decode(tenants: Tenants, ids: torch.Tensor, new: int) -> dict[str, Callable[[], list]]:
    """The ways to generate for a batch of prompts."""
    names = tenants.rows(len(ids))
    settings = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    batcher = serving.Batcher(tenants.bank, max_rows=len(ids))

    def batched() -> list:
        requests = [batcher.submit(row, name, max_new_tokens=new) for row, name in zip(ids, names, strict=True)]
        while not all(request.done for request in requests):
            batcher._turn()
        return [request.result() for request in requests]

    length = ids.shape[1]
    return {
        "bare model": lambda: tenants.bare.generate(ids, **settings)[:, length:].tolist(),
        "PEFT, mixed batch": lambda: tenants.peft.generate(input_ids=ids, adapter_names=names, **settings)[
            :, length:
        ].tolist(),
        "bank.generate": lambda: tenants.bank.generate(ids, adapter_names=names, **settings)[:, length:].tolist(),
        "Batcher": batched,
    }


def agree(one: list, other: list) -> float:
    """The share of rows that are equal; near-ties part a few."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def throughput(options: argparse.Namespace, clock: Callable[[], float]) -> list[dict]:
    """Tokens a second of every way, for each number of adapters."""
    rows = []
    ids = torch.randint(1, 1000, (options.rows, 16), device=options.device)
    for adapters in options.adapters:
        with tempfile.TemporaryDirectory() as folder:
            ways = decode(Tenants(model_of(options.layers, options.width, options.device), adapters, folder), ids, 24)
        expected = ways["PEFT, mixed batch"]()
        for name in ("bank.generate", "Batcher"):
            same = agree(ways[name](), expected)
            if same < 0.9:
                raise SystemExit(f"{name}: {same:.0%} of the rows equal PEFT's, which is no near-tie")
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(options.rounds):
            for name, way in ways.items():
                begin = clock()
                way()
                best[name] = min(best[name], clock() - begin)
        for name, seconds in best.items():
            over = seconds / best["bare model"]
            rate = options.rows * 24 / seconds
            rows.append({"case": f"{adapters} adapters", "way": name, "tokens/s": rate, "over bare": over})
    return rows


def latencies(options: argparse.Namespace, clock: Callable[[], float]) -> list[dict]:
    """How long a tenant waits for its first token and between two, with others beside it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tenants = Tenants(model_of(options.layers, options.width, options.device), 8, folder)
    names = tenants.rows(options.rows)
    for case in ("short rows", "one long row among them", "a row joins and leaves each step"):
        batcher = serving.Batcher(tenants.bank, max_rows=options.rows + 1)
        for name in names[1:]:
            batcher.submit([5] * 8, name, max_new_tokens=3000)
        first: list[float] = []
        if case == "one long row among them":
            long = batcher.submit([5] * LONG, names[0], max_new_tokens=1000)
            while not long.tokens:
                batcher._turn()
        steps = []
        for turn in range(options.rounds * 8):
            if case == "a row joins and leaves each step" or turn % 8 == 0:
                one = batcher.submit([7, 8], names[0], max_new_tokens=1)
            begin = clock()
            batcher._turn()
            steps.append(clock() - begin)
            if one.done and (turn % 8 == 0 or case.startswith("a row")):
                first.append(steps[-1])
        batcher.stop(drain=False)
        batcher._rows.clear("cancelled")
        row = {"case": case, "way": "Batcher", "step min ms": 1e3 * min(steps)}
        for name, times in (("between", steps), ("first", first)):
            times = sorted(times)
            row[f"{name} p50 ms"] = 1e3 * statistics.median(times)
            row[f"{name} p99 ms"] = 1e3 * times[int(0.99 * (len(times) - 1))]
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print the rows, and append them to ``--out``."""
    made = argparse.ArgumentParser(prog="bench_serve", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--adapters", type=int, nargs="*", default=[1, 8, 32])
    for name, default in (("rows", 32), ("layers", 6), ("width", 256), ("rounds", 5), ("threads", 1)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--out", type=Path, help="append the rows to this file, a JSON object a line")
    options = made.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    def clock() -> float:
        if options.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    with torch.no_grad():
        rows = latencies(options, clock) + throughput(options, clock)
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else str(v) for k, v in row.items()))
    if options.out is not None:
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
