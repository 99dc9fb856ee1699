"""Memory of training steps of real models, as PyTorch's allocator counts it, on the GPU that computes nothing.

    python -m bench.nullgpu -m bench.bench_memory --out bench/results/memory.jsonl [--model Llama-3.1-8B ...]

A step is forward and backward of one batch, the second of its kind: ``kept_bytes`` are allocated after forward beyond
what was before (its output included), ``peak_bytes`` the most at any time. Weights, adapters and the optimizer's state
are alike in all and not in them; the adapters' gradients are. With ``head`` the step ends in the model's own loss over
its vocabulary, else in the gradient of the last hidden state.
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# What fits on no device has a number too.
os.environ.setdefault("NULLGPU_GIB", "4096")

import torch
from torch import nn

from . import machine, nullgpu
from .memory_models import FROZEN, MODELS, UNSLOTH, WAYS, adapted

ADAPTERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One step; ``adapters`` names the dtype of A and B, ``experts`` is whether LoRA is on experts too."""

    model: str
    way: str
    adapters: str
    dropout: float
    experts: bool
    autocast: bool
    checkpointing: bool
    head: bool
    tokens: int


def built(name: str, quick: bool) -> Iterator[tuple[dict, Callable[[], nn.Module]]]:
    """The models to make of one shape: the columns that their steps share, and what makes them."""
    shape = MODELS[name]
    names = ["float32"] if shape.dtype == torch.float32 else list(ADAPTERS)
    for way, adapters, dropout, experts in itertools.product(
        WAYS, names, (0.0, 0.05), (False, True) if shape.parameters else (False,)
    ):
        if way == FROZEN and (adapters, dropout, experts) != (names[0], 0.0, False):
            continue
        if (way == UNSLOTH and not name.startswith("Llama")) or (experts and dropout):  # which PEFT refuses
            continue
        columns = {"model": name, "way": way, "adapters": adapters, "dropout": dropout, "experts": experts}

        def make(way=way, adapters=adapters, dropout=dropout, experts=experts) -> nn.Module:
            return adapted(shape.base(2 if quick else None), shape, way, dropout, ADAPTERS[adapters], experts)

        yield columns, make


def steps(columns: dict, quick: bool) -> Iterator[Case]:
    """The steps of one model. Autocast matters where adapters and base differ, or where all is float32."""
    shape = MODELS[columns["model"]]
    for checkpointing, autocast, head, tokens in itertools.product(
        (False, True), (False, True), shape.heads, shape.tokens[:1] if quick else shape.tokens
    ):
        if not (autocast and columns["adapters"] == "bfloat16"):
            yield Case(**columns, autocast=autocast, checkpointing=checkpointing, head=head, tokens=tokens)


def measure(model: nn.Module, case: Case) -> dict:
    """The bytes of one step."""
    shape = MODELS[case.model]
    inputs = shape.inputs(case.tokens, case.head)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if shape.decodes and not case.head:
        base = base.base_model
    gradient = None
    for _ in range(2):
        gc.collect()  # what the step before left behind is not this one's
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=case.autocast):
            output = base(**inputs)
        output = output.loss if case.head else output.last_hidden_state
        kept = torch.cuda.memory_allocated() - before
        if gradient is None:
            gradient = torch.empty_like(output)
        output.backward(gradient)
        peak = torch.cuda.max_memory_allocated() - before
        model.zero_grad(set_to_none=True)
        del output
    return {"kept_bytes": kept, "peak_bytes": peak}


def rows_of(columns: dict, make: Callable[[], nn.Module], quick: bool) -> Iterator[dict]:
    """A row for each step of one model; a step that fails is a row that says why."""
    refused = dict.fromkeys(("base_bytes", "kept_bytes", "peak_bytes"))
    try:
        model = make()
        # Without it no gradient reaches the first layer of a frozen model, and checkpointing has nothing to do.
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, y: y.requires_grad_())
    except Exception as error:
        model, reason = None, error
    base_bytes = torch.cuda.memory_allocated()
    checkpointing = False
    for case in steps(columns, quick):
        found = dict(refused, refused=None)
        try:
            if model is None:
                raise reason
            if case.checkpointing and not checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                checkpointing = True
            found = {"base_bytes": base_bytes, **measure(model, case), "refused": None}
        except Exception as error:
            found["refused"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        yield {**asdict(case), "note": MODELS[case.model].note, **found}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; all unless given")
    parser.add_argument("--way", action="append", choices=WAYS, help="may be repeated; all but Unsloth's unless given")
    parser.add_argument("--quick", action="store_true", help="two layers, the fewest tokens")
    parser.add_argument("--out", type=Path, help="append the rows to this file, a JSON object a line")
    options = parser.parse_args(argv)
    if not nullgpu.is_loaded():
        print("bench_memory: expected `python -m bench.nullgpu -m bench.bench_memory`", file=sys.stderr)
        return 2
    wanted = options.way or [way for way in WAYS if way != UNSLOTH]  # importing Unsloth changes others' code
    facts = {**machine.facts(torch.device("cuda")), "transformers": importlib.metadata.version("transformers")}
    failed = False
    for name in options.model or MODELS:
        for columns, make in built(name, options.quick):
            if columns["way"] not in wanted:
                continue
            rows = [{**row, **facts} for row in rows_of(columns, make, options.quick)]
            gc.collect()
            torch.cuda.empty_cache()
            for row in rows:
                failed |= row["refused"] is not None and row["way"] == "ours"
                print(line(row), flush=True)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
    return int(failed)


def line(row: dict) -> str:
    case = " ".join(f"{name}={row[name]}" for name in Case.__dataclass_fields__)
    if row["refused"]:
        return f"{case}: {row['refused']}"
    return f"{case}: kept {row['kept_bytes'] / 2**30:.3f} GiB, peak {row['peak_bytes'] / 2**30:.3f} GiB"


if __name__ == "__main__":
    sys.exit(main())
