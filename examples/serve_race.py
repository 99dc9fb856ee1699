"""The same requests through fastpeft's HTTP server and through PEFT, timed, and compared token by token."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from serve_training import Trained
from torch import nn
from tqdm import tqdm

from fastpeft.serving import AdapterBank

SERVER, BANK = "fastpeft server, streaming", "fastpeft bank, one batch"
MIXED, TURNS = "PEFT mixed batch", "PEFT one adapter at a time"
COLOURS = {SERVER: "#1f77b4", BANK: "#1f77b4", MIXED: "#7f7f7f", TURNS: "#bcbcbc"}
TIE = 1e-4  # a difference counts only where the two best logits are further apart


class Ask(NamedTuple):
    """A request: the adapter's name, or None for the base model, and the prompt."""

    adapter: str | None
    ids: list[int]


class Answer(NamedTuple):
    """Its text, and seconds to its first piece."""

    text: str
    first: float


def through_server(url: str, base: str, asks: Sequence[Ask], new: int) -> tuple[float, list[Answer]]:
    """All at once, each by a client that reads its stream; seconds until the last has ended."""
    common = {"max_tokens": new, "temperature": 0, "stream": True}
    bodies = [{"model": ask.adapter or base, "prompt": ask.ids, **common} for ask in asks]
    command = [sys.executable, Path(__file__).with_name("serve_clients.py")]
    done = subprocess.run(command, input=json.dumps({"url": url, "bodies": bodies}), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError("the clients failed, see above")
    result = json.loads(done.stdout)
    return result["seconds"], [Answer(*answer) for answer in result["answers"]]


class Peft:
    """The same adapters on the same weights, with PEFT's own layers."""

    def __init__(self, model: nn.Module, folders: dict[str, Path]):
        first, *others = folders
        self.model = peft.PeftModel.from_pretrained(model, folders[first], adapter_name=first)
        for name in others:
            self.model.load_adapter(folders[name], adapter_name=name)
        self.model.eval()

    def mixed(self, asks: Sequence[Ask], new: int) -> float:
        """One batch of all requests, each with its own adapter; seconds."""
        start = time.perf_counter()
        self._generate(asks, new, adapter_names=[ask.adapter or "__base__" for ask in asks])
        return time.perf_counter() - start

    def in_turns(self, asks: Sequence[Ask], new: int) -> float:
        """A batch for each adapter, one after the other; seconds."""
        start = time.perf_counter()
        for name in dict.fromkeys(ask.adapter for ask in asks):
            self._with(name, self._generate, [ask for ask in asks if ask.adapter == name], new)
        return time.perf_counter() - start

    def alone(self, ask: Ask, new: int) -> list[int]:
        """The tokens of one request with nobody beside it."""
        return self._with(ask.adapter, self._generate, [ask], new)[0].tolist()

    @torch.no_grad()
    def logits(self, ask: Ask, tokens: Sequence[int]) -> torch.Tensor:
        """``[len(tokens), V]``: those that each of the tokens was chosen by."""
        ids = torch.tensor([[*ask.ids, *tokens]], device=self.model.device)
        return self._with(ask.adapter, lambda: self.model(input_ids=ids).logits[0, len(ask.ids) - 1 : -1].float())

    def _with(self, name: str | None, function, *arguments):
        if name is None:
            with self.model.disable_adapter():
                return function(*arguments)
        self.model.set_adapter(name)
        return function(*arguments)

    def _generate(self, asks: Sequence[Ask], new: int, **more) -> torch.Tensor:
        batch, length = padded(asks, new, self.model.device)
        return self.model.generate(**batch, **more)[:, length:]


def in_bank(bank: AdapterBank, asks: Sequence[Ask], new: int) -> float:
    """The batch that PEFT gets, through the bank and without a server; seconds."""
    start = time.perf_counter()
    bank.generate(adapter_names=[ask.adapter for ask in asks], **padded(asks, new, bank.device)[0])
    return time.perf_counter() - start


def padded(asks: Sequence[Ask], new: int, device: torch.device) -> tuple[dict, int]:
    """Arguments of ``generate`` for one batch, padded on the left, and the length of its prompts."""
    length = max(len(ask.ids) for ask in asks)
    ids = torch.tensor([[0] * (length - len(ask.ids)) + ask.ids for ask in asks], device=device)
    mask = torch.tensor([[0] * (length - len(ask.ids)) + [1] * len(ask.ids) for ask in asks], device=device)
    steps = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return {"input_ids": ids, "attention_mask": mask, **steps}, length


class Check(NamedTuple):
    """Of answers against their adapter alone in PEFT."""

    equal: int
    tied: int
    different: int
    unlike_base: int  # equal or not; without this, adapters that do nothing would pass

    def __str__(self) -> str:
        return (
            f"{self.equal} of {sum(self[:3])} answers are, token by token, those of their adapter alone in PEFT; "
            f"{self.tied} differ at a tie (two best logits within {TIE:g}), {self.different} differ otherwise. "
            f"{self.unlike_base} differ from what the base model says."
        )


def compare(answers: Sequence[Answer], asks: Sequence[Ask], reference: Peft, tokenizer: object, new: int) -> Check:
    counts = [0, 0, 0, 0]
    for answer, ask in zip(answers, tqdm(asks, "each alone", leave=False), strict=True):
        tokens = reference.alone(ask, new)
        base = tokenizer.decode(reference.alone(Ask(None, ask.ids), new), skip_special_tokens=True)
        counts[3] += answer.text != base
        decoded = [tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(1, len(tokens) + 1)]
        if answer.text == decoded[-1]:
            counts[0] += 1
            continue
        # The first token whose text the answer does not have; a torn character at the end says nothing yet.
        place = next((n for n, text in enumerate(decoded) if not answer.text.startswith(text.rstrip("\ufffd"))), 0)
        best = reference.logits(ask, tokens)[place].topk(2).values
        counts[1 if best[0] - best[1] <= TIE else 2] += 1
    return Check(*counts)


def table(seconds: dict[str, list[float]], tokens: int) -> str:
    """Median tokens a second, with the slowest and the fastest round."""
    rows = ["| | tokens/s (median) | slowest to fastest round | time to PEFT's mixed batch |", "|---|---|---|---|"]
    mixed = statistics.median(seconds[MIXED])
    for name, times in seconds.items():
        median = statistics.median(times)
        rounds = f"{tokens / max(times):.0f} to {tokens / min(times):.0f}"
        rows.append(f"| {name} | {tokens / median:.0f} | {rounds} | {median / mixed:.2f} |")
    return "\n".join(rows)


def plot(seconds: dict[str, list[float]], tokens: int, trained: dict[str, Trained], title: str, path: Path) -> None:
    """Throughput on the left; on the right what each adapter has learnt of its text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    rates = {name: [tokens / each for each in times] for name, times in seconds.items()}
    medians = [statistics.median(each) for each in rates.values()]
    error = [
        [median - min(each) for median, each in zip(medians, rates.values(), strict=True)],
        [max(each) - median for median, each in zip(medians, rates.values(), strict=True)],
    ]
    names = [name.replace(", ", ",\n").replace(" one adapter", "\none adapter") for name in rates]
    drawn = left.barh(names, medians, xerr=error, color=[COLOURS[name] for name in rates], ecolor="#444444")
    left.bar_label(drawn, [f" {median:.0f}" for median in medians], label_type="center", color="white")
    left.set_title(f"Tokens a second: {title}", loc="left", fontsize=10)
    left.invert_yaxis()
    labels = [f"{name} (r={row.rank})" for name, row in trained.items()]
    right.scatter([row.before for row in trained.values()], labels, color="#bcbcbc", label="base model")
    right.scatter([row.after for row in trained.values()], labels, color="#1f77b4", label="with its adapter")
    right.set_title("Held-out loss of each tenant's text, nats a token", loc="left", fontsize=10)
    right.legend(frameon=False)
    right.invert_yaxis()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
