"""Tokens a second in vLLM's engine on a CPU: its own LoRA layers beside ours, in one run.

    python -m bench.vllm_lora            in the environment of `make test-engines`

Two engines start, one with ``FASTPEFT_VLLM=strict`` and one without the plug-in, and take turns at the same batch: 16
rows over 8 adapters, whose prompts are read (64 tokens each) and continued (32 tokens). Times are processor time, so
that other work on the machine does not count, and the best of the rounds after the first. In float32 both must give
the same tokens, or there is no row; in bfloat16 they round differently. vLLM's own layers give a row without an adapter
that of the last slot, so here no row is without one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, ADAPTERS, PROMPT, ANSWER, SLOT_RANK = 16, 8, 64, 32, 64
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4}
LAYERS = 6
MODES = {"vLLM's own": "0", "fastpeft": "strict"}


def model(dtype):
    from tests.support.models import build

    return build("llama", num_hidden_layers=LAYERS, initializer_range=0.05, **SIZES).to(dtype)


def folders(root: Path) -> dict[str, Path]:
    return {f"adapter{i}": root / f"adapter{i}" for i in range(ADAPTERS)}


def write(root: Path, rank: int) -> None:
    """The model and its adapters, small enough that nothing overflows."""
    import torch

    from tests.support.lora_checkpoints import LINEARS, checkpoint

    base = model(torch.float32)
    base.save_pretrained(root / "base")
    for seed, folder in enumerate(folders(root).values()):
        checkpoint(base, folder, seed, r=rank, lora_alpha=rank / 8, target_modules=LINEARS)


def serve(root: Path, dtype: str) -> None:
    """A process of one engine: a line of its standard input is one round, whose times it answers as JSON."""
    from tests.support import real_vllm

    room = {"max_loras": ADAPTERS, "max_cpu_loras": ADAPTERS, "max_lora_rank": SLOT_RANK, "max_num_seqs": ROWS}
    room |= {"max_num_batched_tokens": ROWS * PROMPT, "num_gpu_blocks_override": 256, "block_size": 32}
    llm = real_vllm.engine(root / "base", dtype=dtype, enable_prefix_caching=False, **room)
    asked = [real_vllm.request(name, i + 1, folder) for i, (name, folder) in enumerate(folders(root).items())]
    asked = [asked[row % ADAPTERS] for row in range(ROWS)]
    prompts = [{"prompt_token_ids": [(row + 7 * i) % 90 + 1 for i in range(PROMPT)]} for row in range(ROWS)]

    def timed(tokens):
        began = time.process_time()
        outputs = llm.generate(prompts, real_vllm.greedy(tokens), lora_request=asked, use_tqdm=False)
        return time.process_time() - began, [list(output.outputs[0].token_ids) for output in outputs]

    for _ in sys.stdin:
        read, _ = timed(1)
        whole, answers = timed(1 + ANSWER)
        print("ROUND", json.dumps({"read": read, "continued": whole - read, "answers": answers}), flush=True)


def ask(process: subprocess.Popen) -> dict:
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("ROUND "):
            return json.loads(line.removeprefix("ROUND "))
    raise RuntimeError(f"an engine ended with {process.wait()}; --engine shows why")


def compare(dtype: str, rank: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, rank)
        command = [sys.executable, "-m", "bench.vllm_lora", "--engine", folder, "--dtype", dtype]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        engines = {
            name: subprocess.Popen(command, env=environment | {"FASTPEFT_VLLM": mode}, **pipes)
            for name, mode in MODES.items()
        }
        try:
            found = {name: [] for name in engines}
            for _ in range(rounds):
                for name, process in engines.items():
                    found[name].append(ask(process))
        finally:
            for process in engines.values():
                process.kill()
                process.wait()
        same = [a == b for a, b in zip(*(found[name][-1]["answers"] for name in MODES), strict=True)]
        if dtype == "float32" and not all(same):
            raise SystemExit(f"the engines differ in {same.count(False)} of {ROWS} answers: no rows")
        for name in engines:
            read, continued = (min(round_[key] for round_ in found[name][1:]) for key in ("read", "continued"))
            print(f"{dtype}, rank {rank} of {SLOT_RANK}, {name}: ", end="")
            print(f"prompts {ROWS * PROMPT / read:.0f}, answers {ROWS * ANSWER / continued:.0f} tokens/s", flush=True)
        print(f"equal answers: {sum(same)} of {ROWS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.engine:
        serve(options.engine, options.dtype)
    else:
        compare(options.dtype, options.rank, options.rounds)


if __name__ == "__main__":
    main()
