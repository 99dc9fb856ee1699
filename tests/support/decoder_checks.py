"""What must hold for a prompt and a prefix on any decoder, each compared with what the model does without."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastpeft
from fastpeft import PrefixTuning, PromptTuning
from fastpeft.nn import cache as caches
from fastpeft.nn.entry import entered
from tests.support.models import close, prompts

P, T, STEPS = 3, 9, 4
CONFIGS = {"prompt": PromptTuning(length=P), "prefix": PrefixTuning(length=P)}
Check = Callable[[nn.Module], Any]


def attached(model: nn.Module, kind: str) -> nn.Module:
    """A copy with a prompt or prefix that shows in the outputs."""
    model = fastpeft.attach(copy.deepcopy(model), CONFIGS[kind])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if kind == "prefix" else 0.3))
    return model


def generated(model: nn.Module, ids: Tensor, **how) -> tuple[Tensor, Tensor]:
    """New tokens, and the logits that they were chosen from ``[B, STEPS, V]``."""
    torch.manual_seed(5)
    how = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, **how}
    how.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **how)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def cached(model: nn.Module) -> bool:
    """Logits of generation with a cache are those of recomputation."""
    ids = prompts(2, T)
    with_cache, without = generated(model, ids), generated(model, ids, use_cache=False)
    return close(with_cache[1], without[1])


def padded(model: nn.Module) -> bool:
    """A row that is padded on the left generates what it does alone."""
    ids = prompts(2, T)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    together = generated(model, ids * mask, attention_mask=mask)[1]
    alone = generated(model, ids[:1, 4:])[1]
    return close(together[0], alone[0]) and close(together[1], generated(model, ids[1:])[1][0])


def beams(model: nn.Module) -> bool:
    """Beam search finds the same with a cache and without."""
    ids = prompts(2, T)
    return torch.equal(*(generated(model, ids, num_beams=2, use_cache=c)[0] for c in (True, False)))


def sampled(model: nn.Module) -> bool:
    """Several samples of each row are the same with a cache and without."""
    ids, how = prompts(2, T), {"do_sample": True, "num_return_sequences": 2}
    return torch.equal(*(generated(model, ids, use_cache=c, **how)[0] for c in (True, False)))


def static(model: nn.Module) -> bool:
    """A cache of a fixed size gives the logits of one that grows, twice in a row."""
    ids = prompts(2, T)
    how = {"cache_implementation": "static", "disable_compile": True}
    wanted = generated(model, ids)[1]
    return close(generated(model, ids, **how)[1], wanted) and close(generated(model, ids, **how)[1], wanted)


def checkpointed(model: nn.Module) -> bool:
    """Gradients under checkpointing are those without."""
    ids, found = prompts(2, T), []
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        for on in (False, True):
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(3)
            grads = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, parameters, allow_unused=True)
            found.append([g for g in grads if g is not None])
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    scale = max(g.abs().max() for g in found[0])
    return len(found[0]) == len(found[1]) and all(close(a / scale, b / scale) for a, b in zip(*found, strict=True))


CHECKS: dict[str, Check] = {
    "cache": cached,
    "padding": padded,
    "beams": beams,
    "samples": sampled,
    "static cache": static,
    "checkpointing": checkpointed,
}


def attempt(check: Check, model: nn.Module) -> str:
    """ "" where it holds, else what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "" if check(model) else "differs"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:100]}"


def in_peft(model: nn.Module, kind: str, ours: nn.Module) -> nn.Module:
    """PEFT's model with the same values; whatever it raises means that it does not serve the model."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
        theirs = peft.get_peft_model(copy.deepcopy(model), config(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
        weight = theirs.prompt_encoder["default"].embedding.weight
        parameter = next(p for p in ours.parameters() if p.requires_grad)
        with torch.no_grad():
            weight.copy_(parameter)
    return theirs


def as_peft(model: nn.Module, kind: str, ours: nn.Module) -> str:
    """ "equal", "PEFT raises", or "differs"."""
    ids = prompts(2, T)
    try:
        with torch.no_grad():
            wanted = in_peft(model, kind, ours)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    except Exception:
        return "PEFT raises"
    if kind == "prompt" or wanted.shape == ours(ids).logits.shape:
        return "equal" if close(ours(ids).logits, wanted) else "differs"
    return "PEFT raises"


def entries(model: nn.Module, kind: str, ours: nn.Module) -> str:
    """ "" where every way in has the same effect: the forward by name, and the modules inside the model."""
    ids = prompts(2, T)
    with torch.no_grad():
        plain, called, by_name = model(ids).logits, ours(ids).logits, ours.forward(ids).logits
        if not torch.equal(called, by_name):
            return "forward by name differs"
        if close(called[:, -T:], plain):
            return "no effect"
        for path, module in entered(ours).items():
            if path:
                seen: list[Tensor] = []
                hook = module.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0]))
                ours(ids)
                found, named = module(ids)[0], module.forward(ids)[0]
                hook.remove()
                if not torch.equal(seen[0], found) or not torch.equal(found, named):
                    return f"{path} called by itself differs"
        if kind == "prompt":
            table = ours.fastpeft_prompt.prompts["default"]
            x = torch.cat([table.expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
            if not close(called, model(inputs_embeds=x).logits):
                return "not what the prompt in front gives"
            return in_front_differs(model, ours, ids, x)
    return ""


def in_front_differs(model: nn.Module, ours: nn.Module, ids: Tensor, x: Tensor) -> str:
    """ "" where decoding goes on as after the prompt's embeddings, by hand: also where no ``generate`` can tell."""
    one, two = ours(ids, use_cache=True), model(inputs_embeds=x, use_cache=True)
    for _ in range(2):
        name = next((n for n in caches.CACHES if getattr(two, n, None) is not None), None)
        if name is None:
            return ""
        more = two.logits[:, -1:].argmax(-1)
        one, two = (m(more, use_cache=True, **{name: out[name]}) for m, out in ((ours, one), (model, two)))
        if not close(one.logits, two.logits):
            return "decoding does not go on after the prompt"
    return ""


def verdict(model: nn.Module, kind: str) -> tuple[str, str]:
    """("served" or "refused" or "wrong", why or what of it the model itself does not do)."""
    before = set(vars(model)), list(model.state_dict())
    try:
        ours = attached(model, kind)
    except (TypeError, ValueError) as error:
        return "refused", str(error)
    except Exception as error:
        return "wrong", f"attach: {type(error).__name__}: {error}"
    assert before == (set(vars(model)), list(model.state_dict()))
    faults, absent = [], []
    if fault := _entries(model, kind, ours):
        faults.append(f"entries: {fault}")
    for name, check in CHECKS.items():
        if (attempt(check, model) if name != "checkpointing" else attempt(check, _training(model))) != "":
            absent.append(name)
        elif fault := attempt(check, ours):
            faults.append(f"{name}: {fault}")
    theirs = as_peft(model, kind, ours)
    if theirs == "differs":
        faults.append("differs from PEFT")
    note = "; ".join([*faults] or [*(f"no {name}" for name in absent), *([theirs] if theirs != "equal" else [])])
    return ("wrong" if faults else "served"), note


def _entries(model: nn.Module, kind: str, ours: nn.Module) -> str:
    try:
        return entries(model, kind, ours)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"


def _training(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_()
