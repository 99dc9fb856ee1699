"""A small language model made on the spot, and LoRA adapters for it or for any other."""

import copy
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from serve_texts import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

import fastpeft


class Size(NamedTuple):
    """Of the model that is made, and of a training step."""

    vocabulary: int = 1024
    hidden: int = 256
    layers: int = 4
    batch: int = 4
    length: int = 64


def make_tokenizer(texts: Iterable[str], size: Size) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of these texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size.vocabulary, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


def make_model(vocabulary: int, size: Size) -> nn.Module:
    """Random weights in Llama's architecture."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def train(model: nn.Module, ids: Tensor, seconds: float, lr: float, size: Size, title: str) -> int:
    """Next-token training on random windows of ``ids`` for so long; returns the steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    draw = torch.Generator().manual_seed(0)
    start, steps, passed = time.perf_counter(), 0, 0.0
    model.train()
    with tqdm(total=seconds, desc=title, bar_format="{desc:28}|{bar}| {n:.0f} of {total:.0f} s{postfix}") as progress:
        while passed < seconds:
            for group in optimizer.param_groups:  # warm up, then down to a tenth; the clock is the schedule
                group["lr"] = lr * min(1.0, (steps + 1) / 10) * (1 - 0.9 * passed / seconds)
            loss = loss_of(model, windows(ids, size, draw).to(model.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            steps += 1
            now = time.perf_counter() - start
            progress.update(min(now, seconds) - min(passed, seconds))
            progress.set_postfix_str(f"step {steps}, loss {loss.item():.2f}")
            passed = now
    model.eval()
    return steps


def windows(ids: Tensor, size: Size, draw: torch.Generator) -> Tensor:
    """``[batch, length]``, starting anywhere."""
    starts = torch.randint(max(1, len(ids) - size.length), (size.batch, 1), generator=draw)
    return ids[(starts + torch.arange(min(size.length, len(ids)))).clamp(max=len(ids) - 1)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor, size: Size) -> float:
    """Nats a token, on the same windows every time."""
    draw = torch.Generator().manual_seed(1)
    batches = [windows(ids, size, draw).to(model.device) for _ in range(2)]
    return sum(loss_of(model, batch).item() for batch in batches) / len(batches)


class Trained(NamedTuple):
    """Held-out loss of one adapter's text, with the base model alone and with the adapter."""

    rank: int
    before: float
    after: float


def train_adapter(
    base: nn.Module, tokenizer: object, text: Text, rank: int, seconds: float, size: Size, directory: Path
) -> Trained:
    """LoRA on a copy of the base model, through fastpeft; a PEFT checkpoint in ``directory`` afterwards."""
    train_ids, test_ids = (torch.tensor(encode(tokenizer, part)) for part in text)
    before = held_out_loss(base, test_ids, size)
    model = fastpeft.attach(copy.deepcopy(base), fastpeft.Lora(r=rank, alpha=2 * rank))
    train(model, train_ids, seconds, 2e-3, size, f"LoRA r={rank} {directory.name}")
    after = held_out_loss(model, test_ids, size)
    fastpeft.save(model, directory)
    return Trained(rank, before, after)


def encode(tokenizer: object, text: str) -> list[int]:
    # A warning says that this is longer than the model's context; windows are cut from it.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
