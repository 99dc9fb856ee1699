"""The baseline: multinomial logistic regression on the frozen encoder's features, given its best chance."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # on the squared weights


def fit(features: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Linear:
    """The head, trained to convergence on standardised features; the penalty is the best on a held-out fifth."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]

    def accuracy(penalty: float) -> float:
        head = minimise(features[rest], labels[rest], classes, penalty)
        return (head(features[held_out]).argmax(1) == labels[held_out]).float().mean().item()

    return minimise(features, labels, classes, max(PENALTIES, key=accuracy))


@torch.no_grad()
def minimise(features: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    """``min cross_entropy(head(z)) + penalty |W|^2`` over ``z = (x - mean) / std``: convex, so L-BFGS finds it."""
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)  # MiniLM has features that are always zero
    standardised = (features - mean) / std
    head = nn.Linear(features.shape[1], classes, device=features.device, dtype=features.dtype)
    head.weight.zero_()
    head.bias.zero_()
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
