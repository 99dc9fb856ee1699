"""Where gradients enter a frozen stack of blocks: at the first block that trains, not at the embedding.

transformers makes the embedding's output require a gradient once gradient checkpointing is on, so that reentrant
checkpoints of blocks with frozen inputs get theirs. All blocks then compute, and keep, a gradient for an input that
nobody trains. Here that hook is taken off before each forward, and where a checkpoint is reentrant the input of the
first block that trains is made to require a gradient instead, which is thrown away.
"""

from collections.abc import Callable

import torch
from torch import nn

from ..embeddings import input_embeddings
from ..reentrant import Checkpoint, is_reentrant, opened
from .blocks import stacks

_ASK, _FUNCTION = "enable_input_require_grads", "_gradient_checkpointing_func"
_HOOK = "make_inputs_require_grad"  # as transformers and PEFT call it


class _Checkpoint:
    """A model's checkpoint function for blocks that older versions of transformers hand to it as ``block.__call__``."""

    def __init__(self, function, entry: "GradEntry"):
        self.function, self.entry = function, entry

    def __call__(self, function, *args, **kwargs):
        block = getattr(function, "__self__", None)
        if isinstance(block, nn.Module) and block in self.entry.blocks and self.entry.first_of(block) is block:
            args = opened(args)
        return self.function(function, *args, **kwargs)


class GradEntry:
    """The hooks on one model; ``remove`` leaves it as it was.

    Without reentrant checkpoints nothing has to enter: autograd starts at the first parameter that is trained.
    """

    def __init__(self, model: nn.Module):
        modules = dict(model.named_modules())
        self.stacks = [[modules[path] for path in paths] for paths in stacks(model).values()]
        self.blocks = {block for blocks in self.stacks for block in blocks}
        self.owners = [modules[path.rpartition(".")[0]] for path in stacks(model)]
        self.askers = [module for module in model.modules() if hasattr(module, _ASK)]
        self.silenced: list[tuple[nn.Module, int, Callable]] = []
        self.handles = [m.register_forward_pre_hook(self.before_model) for m in dict.fromkeys([model, *self.askers])]
        self.handles += [b.register_forward_pre_hook(self.before_block) for b in self.blocks]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for owner in self.owners:
            if isinstance(owner.__dict__.get(_FUNCTION), _Checkpoint):
                setattr(owner, _FUNCTION, owner.__dict__[_FUNCTION].function)
        for module, key, hook in self.silenced:
            module._forward_hooks[key] = hook
        self.silenced.clear()

    def before_model(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        for asker in self.askers:
            self._silence(asker)
        for owner in self.owners:
            function = owner.__dict__.get(_FUNCTION)
            if function is not None and not isinstance(function, _Checkpoint | Checkpoint) and is_reentrant(function):
                setattr(owner, _FUNCTION, _Checkpoint(function, self))

    def before_block(self, block: nn.Module, args: tuple):
        if torch.compiler.is_compiling():
            return None
        checkpointed = block.training and getattr(block, "gradient_checkpointing", False)
        if checkpointed and is_reentrant(getattr(block, _FUNCTION, None)) and self.first_of(block) is block:
            return opened(args)
        return None

    def first_of(self, block: nn.Module) -> nn.Module | None:
        """The first block that trains, in the stack that has this one."""
        blocks = next(blocks for blocks in self.stacks if any(other is block for other in blocks))
        return next((b for b in blocks if any(p.requires_grad for p in b.parameters())), None)

    def _silence(self, asker: nn.Module) -> None:
        table = input_embeddings(asker)
        if table is None:
            return
        for key, hook in list(table._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith(_HOOK):
                self.silenced.append((table, key, table._forward_hooks.pop(key)))
