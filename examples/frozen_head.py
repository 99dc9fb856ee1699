"""The baselines: a linear head on the frozen encoder's features, trained as LoRA is, and trained to convergence."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # learning rates
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # on the squared weights


def same_steps(features: Tensor, labels: Tensor, classes: int, batches: Sequence[list[int]], seed: int) -> nn.Linear:
    """The head after LoRA's own batches (rows of ``features``), at the learning rate that is best for the head alone.

    A learning rate is judged on a held-out fifth, which is then left out of the batches.
    """

    def fit(rows: Tensor, rate: float) -> nn.Linear:
        allowed = set(rows.tolist())
        kept = [[row for row in batch if row in allowed] for batch in batches]
        return descend(features, labels, classes, kept, rate)

    return fit(torch.arange(len(labels)), choose(RATES, fit, features, labels, seed))


def converged(features: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Linear:
    """Multinomial logistic regression; the penalty is the best on a held-out fifth."""

    def fit(rows: Tensor, penalty: float) -> nn.Linear:
        return minimise(features[rows], labels[rows], classes, penalty)

    return fit(torch.arange(len(labels)), choose(PENALTIES, fit, features, labels, seed))


def choose(values: Iterable[float], fit: Callable, features: Tensor, labels: Tensor, seed: int) -> float:
    """The value with which a head fitted to four fifths of the rows has the least cross-entropy on the others.

    Accuracy there is a coin toss between near values, some of which are so sure of what they have seen that adapters
    that start from such a head have nothing left to learn from.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]

    def loss(value: float) -> float:
        return cross_entropy(fit(rest, value)(features[held_out]), labels[held_out]).item()

    return min(values, key=loss)


def descend(features: Tensor, labels: Tensor, classes: int, batches: Sequence[list[int]], rate: float) -> nn.Linear:
    """One step of AdamW a batch, from a head of zeros."""
    head = zeros(features, classes)
    optimizer, schedule = adamw([{"params": head.parameters(), "lr": rate}], len(batches))
    for rows in batches:
        if rows:
            optimizer.zero_grad()
            cross_entropy(head(features[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return head


def adamw(groups: list[dict], steps: int) -> tuple[AdamW, LambdaLR]:
    """The optimizer of every training here; the learning rate goes up for a tenth of the steps, then to zero."""
    optimizer = AdamW(groups)
    return optimizer, LambdaLR(optimizer, lambda step: min(10 * (step + 1) / steps, 1 - step / steps))


@torch.no_grad()
def minimise(features: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    """``min cross_entropy(head(z)) + penalty |W|^2`` over ``z = (x - mean) / std``: convex, so L-BFGS finds it."""
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)  # MiniLM has features that are always zero
    standardised = (features - mean) / std
    head = zeros(features, classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = cross_entropy(head(standardised), labels) + penalty * head.weight.square().sum()
            value.backward()
        return value

    optimizer.step(loss)
    head.weight /= std  # the same head for features as they come
    head.bias -= head.weight @ mean
    return head


def zeros(features: Tensor, classes: int) -> nn.Linear:
    head = nn.Linear(features.shape[1], classes, device=features.device, dtype=features.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
