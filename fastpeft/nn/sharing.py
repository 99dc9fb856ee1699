"""Sibling layers that receive the same tensor (q, k and v; gate and up) read it once.

A layer takes part by what ``protocol.Sharing`` declares. The first sibling that is called with x computes all outputs
and keeps the others' until they are asked for, with the very same tensor object, not modified since, and with the same
parameters, grad mode and autocast. Whatever differs is computed by itself, so sharing never changes what a layer
computes, only how often x is read.

Nothing is kept for longer than one call of the module that holds the siblings, which two hooks on it delimit: between
two calls anybody may write through ``.data`` or into the memory, which no version counter shows. A sibling that is
called by others than that module computes alone.

Siblings are found by the names of their modules (``siblings``). Names are a guess: when a sibling turns out to receive
another tensor (cross-attention), those that were served stay together and the rest form a group of their own, for good.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import _host, ops
from .._check import PLAIN
from ..ops.lora_linear_bound import bound
from .branch import Branch, branch_of
from .conditions import autograd_state, call_conditions, reentrant_possible
from .guarding import guard_call, guard_process
from .protocol import Sharing
from .siblings import families


class _Plan:
    """The siblings that one leads, and what keeps that true of the others: ``guarding``'s guards, or None."""

    def __init__(self, parts: list[int], branches: dict[int, Branch], guards: Any):
        self.parts, self.branches, self.guards = parts, branches, guards
        self.drops = any(branch.dropout for branch in branches.values())
        *columns, lora_biases = map(list, zip(*branches.values(), strict=True))
        self.columns: list[list] = columns  # the branches' tensors and numbers, side by side, as the shared op has them
        self.biased = any(bias is not None for bias in lora_biases)
        self.bound = None if self.biased else bound(*columns)
        # What rises when any of the branches' tensors is modified in place.
        self.versions: Callable[[], object] = self._versions if guards is None else guards.versions

    def holds(self, me: int, branch: object, x: Tensor) -> bool:
        """Whether things are as they were planned for this leader."""
        return self.guards is not None and self.branches[me].unchanged(branch) and self.guards(x)

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """What the siblings give for x."""
        found = None if self.bound is None else self.bound(x)
        if found is not None:
            return found
        weights, lora_as, lora_bs, biases, scales, dropouts = self.columns
        if self.biased:
            biases = [branch.folded_bias() for branch in self.branches.values()]
        return ops.lora_linear_shared(x, weights, lora_as, lora_bs, biases, scales, dropouts)

    def _versions(self) -> list[tuple]:
        return [branch.versions() for branch in self.branches.values()]


class _Round(NamedTuple):
    """What the first sibling that was called with x left for the others."""

    x: Tensor
    conditions: tuple
    plan: _Plan
    versions: object
    outputs: dict[int, Tensor]


class SharedInput:
    """Siblings that may receive the same tensor.

    ``forward`` returns a module's output, or None where the module must compute it itself, as it must outside of
    ``begin`` and ``end``. Pending outputs belong to one thread; they are neither copied nor pickled, and an
    output is let go when it is handed out.

    Recomputation under gradient checkpointing repeats what forward did: once a group has computed under saved-tensor
    hooks or inside a backward pass, who shares with whom stays as it is; and where dropout is active, nothing is shared
    without grad mode, since the forward of reentrant checkpointing cannot be told from an evaluation.

    Args:
        members: The sibling modules, in the order in which the model calls them; each has what ``protocol.Sharing``
            declares.
    """

    def __init__(self, members: Sequence[nn.Module]):
        self.members = tuple(members)
        self._numbers = _numbered(self.members)
        self.rounds = 0  # calls of the shared op
        self._parts = [0] * len(self.members)  # members with one number share
        self._unclaimed = 0  # rounds in a row whose outputs nobody asked for
        self._settled = False  # computed under checkpointing, whose recomputation must find the same parts
        self._replays = False  # whether the last forward that may be replayed was inside of a call
        self._thread = threading.local()
        self._plans: dict[int, _Plan] = {}  # by who leads

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_thread", "_plans", "_numbers")}

    def __setstate__(self, state):
        self.__dict__.update(state, _thread=threading.local(), _plans={}, _numbers=_numbered(state["members"]))

    def part(self, module: nn.Module, guards: Any) -> tuple[int, int] | None:
        """The number of a member that shares with others, and of those; None for any other module.

        Args:
            module: Any module.
            guards: What is told on what this depends.
        """
        me = self._numbers.get(id(module))
        guards.is_(self.__dict__, "_parts", self._parts)
        return None if me is None or self._parts.count(self._parts[me]) < 2 else (me, self._parts[me])

    def begin(self, *_: object) -> None:
        """A call of the module that holds the members begins; its forward pre-hook.

        Args:
            _: What such a hook is given.
        """
        if not torch.compiler.is_compiling():
            self._thread.__dict__.pop("replay", None)
            self._thread.rounds = {}

    def end(self, *_: object) -> None:
        """The call is over, and nothing is kept; the forward hook.

        Args:
            _: What such a hook is given.
        """
        if not torch.compiler.is_compiling():
            for last in (self._thread.__dict__.pop("rounds", None) or {}).values():
                self._learn(None, last)

    def forward(self, module: nn.Module, x: Tensor, branch: object = None) -> Tensor | None:
        """The module's output from a shared call, or None: then the module computes alone; not for ``torch.compile``.

        Args:
            module: A member, or a replica or copy of one.
            x: ``[..., K]``, what the module was called with.
            branch: What the module's ``fastpeft_branch`` gives, where that is known; None: it is asked.
        """
        if type(x) not in PLAIN or x.is_inference():
            return None
        hooks, task = autograd_state()
        rounds, me = self._rounds(hooks, task), self._numbers.get(id(module))
        if rounds is None or me is None or self._parts.count(self._parts[me]) < 2:  # no number: a replica, or a copy
            return None
        branch = branch_of(module) if branch is None else branch
        conditions = call_conditions(x, hooks)
        part = self._parts[me]
        last = rounds.get(part)
        if last is not None and last.x is x and last.conditions == conditions:
            kept = last.outputs.pop(me, None)
            if not last.outputs:
                del rounds[part]
                self._unclaimed = 0
            if kept is None or not last.plan.branches[me].unchanged(branch) or last.versions != last.plan.versions():
                return None
            return kept
        if last is not None:
            if isinstance(branch_of(module), str):  # a sibling that keeps to itself says nothing about the others
                return None
            del rounds[part]
            self._learn(me, last)
        plan = self._plans.get(me)
        if plan is None or plan.parts is not self._parts or not plan.holds(me, branch, x):
            plan = self._plan(me, x)
        if plan is None or (plan.drops and reentrant_possible(hooks, task)):
            return None
        self._settled |= hooks is not None or task != -1
        return self._lead(me, x, plan, conditions, rounds)

    def _rounds(self, hooks: object, task: int) -> dict | None:
        """What is pending in this call of the module that holds the members, or None outside of one."""
        # A checkpoint inside of such a call recomputes in backward, past the hooks, and must do what the forward did.
        rounds = self._thread.__dict__.get("rounds")
        if task == -1:
            if hooks is not None:
                self._replays = rounds is not None
        elif rounds is None and self._replays:
            replay = self._thread.__dict__.get("replay")
            if replay is None or replay[0] != task:
                replay = self._thread.replay = task, {}
            return replay[1]
        return rounds

    def partners(self, module: nn.Module) -> list[nn.Module]:
        """The members that share with ``module`` as things stand, without itself.

        Args:
            module: A member.
        """
        parts = {id(member): part for member, part in zip(self.members, self._parts, strict=True)}
        part = parts.get(id(module))
        if part is None or isinstance(branch_of(module), str):
            return []
        others = [m for m in self.members if m is not module and parts[id(m)] == part]
        return [m for m in others if not isinstance(branch_of(m), str)]

    def _learn(self, me: int | None, last: _Round) -> None:
        """A new tensor, or the end, came while outputs of the last one were left: who shares was guessed wrong."""
        if self._settled:
            return
        if me is not None and me in last.outputs:
            self._split({me, *last.outputs})
            return
        # Once may be an exception between two calls; twice in a row is a model that calls some siblings on their own.
        self._unclaimed += 1
        if self._unclaimed > 1:
            self._split(set(last.outputs))

    def _split(self, apart: set[int]) -> None:
        number = max(self._parts) + 1
        self._parts = [number if i in apart else part for i, part in enumerate(self._parts)]
        self._unclaimed = 0

    def _lead(self, me: int, x: Tensor, plan: _Plan, conditions: tuple, rounds: dict) -> Tensor:
        kept = dict(zip(plan.branches, plan.outputs(x), strict=True))
        self.rounds += 1
        output = kept.pop(me)
        if rounds:
            for gone in rounds.keys() - set(self._parts):  # another thread has split the part
                del rounds[gone]
        rounds[self._parts[me]] = _Round(x, conditions, plan, plan.versions(), kept)
        return output

    def _plan(self, me: int, x: Tensor) -> _Plan | None:
        """Who computes with this member as things stand, if anybody does."""
        parts = self._parts
        found = {i: branch_of(self.members[i]) for i, part in enumerate(parts) if part == parts[me]}
        mine = found[me]
        if isinstance(mine, str):
            return None
        branches = {i: b for i, b in found.items() if isinstance(b, Branch) and mine.fits(b)}
        if me not in branches or len(branches) < 2:
            return None
        # Without a branch it is not known what would give one, so then everybody is asked again each time.
        guards = _host.guards() if len(branches) == len(found) else None
        if guards is not None:
            for tensor in filter(torch.is_tensor, mine):
                guards.tensor(tensor)
            for i in branches:
                guard_call(guards, self.members[i])
                if i != me:  # who leads has looked at itself
                    cast(Sharing, self.members[i]).fastpeft_guard(guards)
            guard_process(guards)
            guards.input(x)
        self._plans[me] = plan = _Plan(parts, branches, guards)
        return plan


def _numbered(members: Sequence[nn.Module]) -> dict[int, int]:
    """The members' numbers by their identity."""
    return {id(member): number for number, member in enumerate(members)}


def share_inputs(model: nn.Module, takes_part: Callable[[nn.Module], bool]) -> list[SharedInput]:
    """Group the siblings in ``model`` that take part (see ``siblings``).

    Args:
        model: The model, whose modules' names say who are siblings.
        takes_part: Whether a module, which then has what ``protocol.Sharing`` declares, is to be in a group.

    Returns:
        The groups. Each of their members has its group as the attribute ``fastpeft_shared``; the module that calls them
        has hooks.
    """
    groups = []
    for caller, members in families(model, takes_part):
        group = SharedInput(members)
        groups.append(group)
        for member in members:
            cast(Sharing, member).fastpeft_shared = group
        if caller is not None:
            caller.register_forward_pre_hook(group.begin)
            caller.register_forward_hook(group.end, always_call=True)
    return groups


def unshare_inputs(model: nn.Module) -> None:
    """Take back ``share_inputs``: every layer computes alone again.

    Args:
        model: The model whose siblings were grouped.
    """
    for module in model.modules():
        module.__dict__.pop("fastpeft_shared", None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), SharedInput)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
