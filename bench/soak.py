"""A server under load, and under all that may go wrong, for some minutes: no answer wrong or lost, memory flat.

    python -m bench.soak --minutes 10        exit code 1 if an answer was wrong or lost, or memory grew

The server of `fastpeft serve` runs in a process of its own around a small Llama, with more adapters than slots. Clients
ask for whole answers and streams, which are compared with PEFT's; they leave in the middle, reset their connections,
send half a head, are killed. Adapters are loaded, replaced and unloaded all the time. One forward in 200 raises once,
and each that holds the row of a poisoned prompt does, whose request alone may fail. The server gets SIGTERM twice under
load and is started again: what it had accepted it answers. All traffic is on the loopback interface.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import httpx
import torch

from . import soak_clients
from .soak_clients import MARK, TOKENS, Site

NAMES, VERSIONS, PROMPTS, CLIENTS = ("alice", "bob", "carol", "dave"), 4, 16, 10
TIE = 1e-3  # of logits: closer ones may be chosen either way
GROWTH = 32 << 20  # bytes that a server's memory may grow by after its first quarter


def prepare(root: Path) -> tuple[dict[str, list[str | None]], list[list[int]]]:
    """Write the model and adapters; what PEFT answers for each prompt, and the prompts."""
    from tests.support import lora_checkpoints
    from tests.support.models import VOCAB, llama
    from tests.support.small_server import tokenizer

    model, draw = llama(), random.Random(0)
    model.save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    folders = lora_checkpoints.checkpoints(model, root / "adapters", NAMES)
    for i in range(VERSIONS):
        where = root / "adapters" / f"v{i}"
        folders[f"v{i}"] = lora_checkpoints.checkpoint(model, where, 10 + i, r=8, target_modules=["q_proj", "up_proj"])
    prompts = [[draw.randrange(1, VOCAB - 1) for _ in range(draw.randrange(3, 40))] for _ in range(PROMPTS)]
    peft, answers = lora_checkpoints.peft_model(model, folders), {}
    for name in ("base", *folders):
        if name != "base":
            peft.set_adapter(name)
        with peft.disable_adapter() if name == "base" else torch.no_grad():
            answers[name] = [_answer(peft, prompt, tokenizer()) for prompt in prompts]
    return answers, prompts


@torch.no_grad()
def _answer(model, prompt: list[int], tokenizer) -> str | None:
    """Greedy; None where two tokens are as good, or one would be taken for a poisoned prompt's."""
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(input_ids=torch.tensor([prompt]), **settings)
    tokens, best = found.sequences[0, len(prompt) :], torch.stack(found.logits)[:, 0].topk(2).values
    if (best[:, 0] - best[:, 1]).min() < TIE or (tokens == MARK).any():
        return None
    return tokenizer.decode(tokens)


def serve(root: Path, port: int) -> int:
    """The server's process: forwards that fail, and at the end what it accepted and how that ended."""
    import collections

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpeft.serving.http.server import Door, run
    from fastpeft.serving.http.service import Limits, Service

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    tokenizer, limits = AutoTokenizer.from_pretrained(root / "model"), Limits(slots=4, max_rank=16, max_rows=8)
    service, draw, calm = Service(model, tokenizer, root / "adapters", "base", limits), random.Random(1), [0]

    def fail(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        # Not soon after another, while a step is repeated: a row that fails by itself again is given up.
        calm[0] += 1
        if (ids == MARK).any() or (calm[0] > 3 * limits.max_rows and draw.random() < 0.005):
            calm[0] = 0
            raise ArithmeticError("a fault that was injected")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    ended: collections.Counter = collections.Counter()
    submit = service.batcher.submit

    def counted(*args, **kwargs):
        request = submit(*args, **kwargs)
        ended["accepted"] += 1
        request.add_done_callback(lambda done: ended.update([done.finish_reason]))
        return request

    service.batcher.submit = counted
    code = run(service, "127.0.0.1", port, Door())
    print(json.dumps(ended), flush=True)
    return code


class Server:
    """The server's process, which is ended by SIGTERM and started again."""

    def __init__(self, root: Path, site: Site):
        self.root, self.site = root, site
        self.memory: list[tuple[float, int]] = []
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "bench.soak", "--serve", str(self.root), "--port", str(self.site.port)]
        pipes = {"stdout": subprocess.PIPE, "stderr": (self.root / "server.log").open("a"), "text": True}
        self.process, self.memory = subprocess.Popen(command, **pipes), []
        while self.process.poll() is None:
            try:
                httpx.get(f"http://127.0.0.1:{self.site.port}/health", timeout=5)
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise RuntimeError(f"the server ended: {(self.root / 'server.log').read_text()[-2000:]}")

    def sample(self) -> None:
        resident = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        self.memory.append((time.monotonic(), resident * os.sysconf("SC_PAGE_SIZE")))

    def end(self) -> dict:
        """SIGTERM; what it accepted and how that ended, its exit code, and how its memory grew."""
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=120)[0]
        quarter = self.memory[len(self.memory) // 4 :]
        grown = quarter[-1][1] - quarter[0][1] if len(quarter) > 1 else 0
        return {"exit": self.process.returncode, **json.loads(said.splitlines()[-1]), "grown": grown}


def soak(minutes: float) -> dict:
    """Run it; the counts, the faults, and what each server said of itself."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        root = Path(folder)
        answers, prompts = prepare(root)
        probe.bind(("127.0.0.1", 0))
        site = Site(probe.getsockname()[1], answers, prompts)
        probe.close()
        server, pause, lives = Server(root, site), threading.Lock(), []
        versions = [f"v{i}" for i in range(VERSIONS)]
        threads = [threading.Thread(target=soak_clients.client, args=(site, i)) for i in range(CLIENTS)]
        threads.append(threading.Thread(target=soak_clients.admin, args=(site, versions, pause, 99)))
        for thread in threads:
            thread.start()
        begin, seconds = time.monotonic(), 60 * minutes
        restarts = [0.25 * seconds, 0.5 * seconds]
        try:
            while (now := time.monotonic() - begin) < seconds:
                server.sample()
                soak_clients.killed_client(site)
                if restarts and now > restarts[0]:
                    restarts.pop(0)
                    lives.append(_restart(site, server, pause))
                time.sleep(min(2.0, seconds / 20))
        finally:
            site.stop.set()
            for thread in threads:
                thread.join()
            lives.append(server.end())
        return {"counts": dict(site.tally.counts), "faults": site.tally.faults, "servers": lives}


def _restart(site: Site, server: Server, pause: threading.Lock) -> dict:
    with pause:  # a live adapter belongs to the server that loaded it
        span = [time.monotonic(), float("inf")]
        site.away.append(span)
        said = server.end()
        for name in soak_clients.LIVE:
            with site.versions.change(name, ""):
                pass
        server.start()
        span[1] = time.monotonic()
        return said


def verdict(found: dict) -> list[str]:
    """What is not as it must be."""
    wrong = list(found["faults"])
    for i, life in enumerate(found["servers"]):
        ends = {reason: life.get(reason, 0) for reason in ("length", "stop", "cancelled", "error")}
        if life["exit"] != 0:
            wrong.append(f"server {i} ended with {life['exit']}")
        if sum(ends.values()) != life["accepted"]:
            wrong.append(f"server {i} accepted {life['accepted']}, which ended as {ends}")
        if life["grown"] > GROWTH:
            wrong.append(f"server {i} grew by {life['grown'] >> 20} MiB")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.port)
    found = soak(options.minutes)
    print(json.dumps(found, indent=1))
    wrong = verdict(found)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
