"""Serves several LoRA adapters of one small language model in one batch, over HTTP (make demo-serve).

Makes a model in Llama's architecture from the Python language reference, trains an adapter for each of several other
kinds of text, and serves them all from one process. Clients ask at once, each for its own adapter; each answer is
compared with what its adapter says alone in PEFT, and the same requests are timed through PEFT's mixed batch and one
adapter after the other.
"""

import argparse
import copy
import functools
import statistics
import sys
import time
from pathlib import Path

import serve_race
import serve_texts
import serve_training
import torch
import transformers
from finetune import device, positive, reserve
from serve_race import BANK, MIXED, SERVER, TURNS, Ask
from serve_training import Size
from torch import nn

from fastpeft.serving.http.server import background
from fastpeft.serving.http.service import Limits, Service

RANKS = (4, 8, 16, 32)
BASE = "base"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        demonstrate(options)
    except OSError as error:  # no such model, no network, no space, no permission
        print(f"serve: --model {options.model}, --out {options.out}: {error}", file=sys.stderr)
        return 1
    return 0


def demonstrate(options: argparse.Namespace) -> None:
    """All of it; the table, the plot, the model and its adapters are in ``options.out`` afterwards."""
    reserve(options.out)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    texts = serve_texts.tenants(options.adapters)
    tokenizer, model = base_model(options, texts)
    folders = {name: options.out / "adapters" / name for name in texts}
    trained = {}
    for i, (name, text) in enumerate(texts.items()):
        rank = RANKS[i % len(RANKS)]
        arguments = text, rank, options.adapter_seconds, options.size, folders[name]
        trained[name] = serve_training.train_adapter(model, tokenizer, *arguments)
        print(f"  held-out loss {trained[name].before:.2f} -> {trained[name].after:.2f}")
    asks = requests(options, tokenizer, texts)
    seconds, answers, check, first = race(options, model, tokenizer, folders, asks)
    tokens = len(asks) * options.new_tokens
    for name in list(folders)[:2]:
        i = next(i for i, ask in enumerate(asks) if ask.adapter == name)
        print(f"\n{name}: {tokenizer.decode(asks[i].ids)!r}\n  -> {answers[i].text!r}")
    table = serve_race.table(seconds, tokens)
    title = f"{len(asks)} requests, {len(folders)} adapters"
    print(f"\n{title}, {options.new_tokens} new tokens each, {options.rounds} rounds in turns:\n\n{table}\n")
    print(check)
    print(f"Median time to a request's first token at the server: {first * 1000:.0f} ms, all asked at once.")
    (options.out / "table.md").write_text(f"{table}\n\n{check}\n", "utf-8")
    serve_race.plot(seconds, tokens, trained, title, options.out / "serve.png")
    print(f"In {options.out}: table.md, serve.png, {'' if options.model else 'model/ and '}adapters/. To serve them:")
    print(f"  fastpeft serve {options.model or options.out / 'model'} --adapters {options.out / 'adapters'}")
    print(f"{time.perf_counter() - start:.0f} s in all, {torch.get_num_threads()} threads.")


def base_model(options: argparse.Namespace, texts: dict[str, serve_texts.Text]) -> tuple[object, nn.Module]:
    """The tokenizer and the model, in eval mode: the one that was asked for, or one made now."""
    if options.model:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        return tokenizer, model.to(options.device).eval()
    prose = serve_texts.prose()
    tokenizer = serve_training.make_tokenizer([prose.train, *(text.train for text in texts.values())], options.size)
    model = serve_training.make_model(len(tokenizer), options.size).to(options.device)
    ids = torch.tensor(serve_training.encode(tokenizer, prose.train))
    steps = serve_training.train(model, ids, options.base_seconds, 2e-3, options.size, "base model, all of it")
    test = torch.tensor(serve_training.encode(tokenizer, prose.test))
    loss = serve_training.held_out_loss(model, test, options.size)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"  {millions:.1f} M parameters, {steps} steps, held-out loss {loss:.2f}")
    for part in (model, tokenizer):
        part.save_pretrained(options.out / "model")
    return tokenizer, model


def requests(options: argparse.Namespace, tokenizer: object, texts: dict[str, serve_texts.Text]) -> list[Ask]:
    """Prompts of different lengths from each tenant's held-out text; tenants take turns."""
    names, asks = list(texts), []
    ids = {name: serve_training.encode(tokenizer, texts[name].test) for name in names}
    draw = torch.Generator().manual_seed(options.seed)
    for i in range(options.requests):
        name = names[i % len(names)]
        length = int(torch.randint(8, 33, (), generator=draw))
        at = int(torch.randint(max(1, len(ids[name]) - length), (), generator=draw))
        asks.append(Ask(name, ids[name][at : at + length]))
    return asks


def race(options: argparse.Namespace, model: nn.Module, tokenizer: object, folders: dict[str, Path], asks: list[Ask]):
    """Seconds of each round of each way, the server's last answers, their check, and seconds to the first token."""
    reference = serve_race.Peft(copy.deepcopy(model), folders)
    limits = Limits(slots=len(folders), max_rank=max(RANKS), max_rows=len(asks), queue=len(asks))
    # Every answer is to be as long as the next, so no token ends one.
    for holder in (model.config, model.generation_config, tokenizer):
        holder.eos_token_id = None
    service = Service(model, tokenizer, options.out / "adapters", BASE, limits)
    new = options.new_tokens
    bank = functools.partial(serve_race.in_bank, service.bank)
    ways = {SERVER: None, BANK: bank, MIXED: reference.mixed, TURNS: reference.in_turns}
    seconds = {name: [] for name in ways}
    with background(service) as url:
        print(f"{len(folders)} adapters on {url}, {len(asks)} clients")
        for i in range(-1, options.rounds):
            for name in list(ways)[:: 1 if i % 2 else -1]:
                if name == SERVER:
                    took, answers = serve_race.through_server(url, BASE, asks, new)
                else:
                    took = ways[name](asks, new)
                if i >= 0:  # the first round warms up
                    seconds[name].append(took)
    check = serve_race.compare(answers, asks, reference, tokenizer, new)
    return seconds, answers, check, statistics.median(answer.first for answer in answers)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastpeft demo --serve", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", help="causal language model: a hub id or a folder (default: a small one, made on the spot)")
    add("--device", type=device, default="cpu", help="cpu (default), cuda, ...")
    add("--out", type=Path, default=Path("demo-serve-output"), help="folder for the results")
    add("--adapters", type=positive, default=8, help="tenants, each with an adapter of its own (default: 8)")
    add("--requests", type=positive, default=32, help="clients that ask at once (default: 32)")
    add("--new-tokens", type=positive, default=48, help="of each answer (default: 48)")
    add("--rounds", type=positive, default=3)
    add("--base-seconds", type=float, default=60, help="of training the small model (default: 60)")
    add("--adapter-seconds", type=float, default=8, help="of training each adapter (default: 8)")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="seconds instead of minutes, to see that everything works")
    options = parser.parse_args(arguments)
    options.size = Size()
    if options.quick:
        options.size = Size(vocabulary=384, hidden=32, layers=2, batch=4, length=32)
        options.base_seconds = options.adapter_seconds = 0.5
        options.adapters, options.requests, options.new_tokens, options.rounds = 3, 6, 8, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
