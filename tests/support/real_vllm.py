"""vLLM's build for CPUs around a small Llama: its engine in this process, and its server in another.

``checked`` compares with PEFT on the same weights: each token must be PEFT's own choice after the tokens before it, or
as good as that to within rounding.
"""

import contextlib
import functools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.support import lora_checkpoints
from tests.support.models import build

# What a CPU's engine needs: one GiB of cache, no process of its own, nothing from a network.
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING")
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SLOTS, MAX_RANK, BLOCK = 3, 16, 32
NAMES = ("alice", "bob", "carol")
TIED = 1e-4  # of logits that are about 1


@functools.cache
def model(family: str = "llama") -> torch.nn.Module:
    """Heads are 32 wide, as vLLM's attention on a CPU needs them."""
    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    return build(family, **sizes)


def write(root: Path) -> dict[str, Path]:
    """Write the model as ``base`` and adapters of ranks 4, 8 and 6 (12 and 3 in places), and return the adapters."""
    model().save_pretrained(root / "base")
    return lora_checkpoints.checkpoints(model(), root, NAMES)


def engine(base: Path, **settings):
    """vLLM's engine in this process, with a cache of 24 blocks and steps of at most 64 tokens."""
    from vllm import LLM

    given = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 256, "num_gpu_blocks_override": 24}
    given |= {"max_loras": SLOTS, "max_cpu_loras": 8, "max_lora_rank": MAX_RANK, "block_size": BLOCK}
    given |= {"enable_lora": True, "enforce_eager": True, "skip_tokenizer_init": True, "dtype": "float32"}
    return LLM(str(base), disable_log_stats=False, **(given | settings))


def request(name: str, number: int, folder: Path, **fields):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folder), **fields)


def greedy(tokens: int):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


class Checker:
    """PEFT's model with the same adapters."""

    def __init__(self, folders: dict[str, Path]):
        self.peft = lora_checkpoints.peft_model(model(), folders)

    @torch.no_grad()
    def wrong(self, prompt: list[int], answer: list[int], name: str | None) -> list[int]:
        """The places where the answer's token is not what this adapter chooses; nothing, if all is right."""
        ids = torch.tensor([[*prompt, *answer]])
        if name is None:
            with self.peft.disable_adapter():
                logits = self.peft(ids).logits
        else:
            self.peft.set_adapter(name)
            logits = self.peft(ids).logits
        logits = logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return (chosen < logits.amax(1) - TIED).nonzero()[:, 0].tolist()


@contextlib.contextmanager
def server(base: Path, folders: dict[str, Path], log: Path, **environment: str):
    """vLLM's OpenAI server with adapters; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += [
        "--served-model-name",
        "base",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--enable-lora",
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    command += ["--max-loras", str(SLOTS), "--max-cpu-loras", "8", "--max-lora-rank", str(MAX_RANK)]
    command += ["--max-model-len", "256", "--max-num-seqs", "8", "--block-size", str(BLOCK)]
    command += ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]
    names = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LOGGING_LEVEL": "INFO"} | environment
    with log.open("w") as output:
        process = subprocess.Popen(command, env=names, stdout=output, stderr=subprocess.STDOUT)
        try:
            _answers(port, process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int, process: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers; TimeoutError or RuntimeError with the end of its log where it does not."""
    import httpx

    for _ in range(240):
        if process.poll() is not None:
            raise RuntimeError(f"vLLM's server ended:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        time.sleep(0.5)
    raise TimeoutError(f"vLLM's server does not answer:\n{log.read_text()[-4000:]}")
