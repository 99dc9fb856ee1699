"""What others do for a batch that mixes adapters: PEFT, gather and bmm, grouped_mm, vLLM's and SGLang's kernels.

Each takes ``(mix, site)`` and returns ``run(y, x) -> y`` that adds the low-rank terms in place, or raises ImportError
or ValueError where it cannot serve. What an engine prepares once a step or once a load is prepared off the clock.
"""

import torch
import torch.nn.functional as F


def gather_bmm(mix, site):
    """A and B of every token, gathered, then two batched products: the simplest form without a loop."""
    slots, scale = mix.token_slots.clamp(min=0), (mix.scales[mix.token_slots] * (mix.token_slots >= 0))[:, None]

    def run(y, x):
        s = torch.bmm(site.lora_a[slots], x[:, :, None]).mul_(scale[:, :, None].to(x.dtype))
        return y.add_(torch.bmm(site.lora_b[slots], s)[:, :, 0])

    return run


def grouped_mm(mix, site):
    """torch.nn.functional.grouped_mm over tokens sorted by adapter: ranks are padded, base tokens left out."""
    if site.lora_a.dtype != torch.bfloat16 or not site.lora_a.is_cuda:
        raise ValueError("grouped_mm takes bfloat16 on a GPU")
    tokens = torch.argsort(mix.token_slots, stable=True)[int((mix.token_slots < 0).sum()) :]
    slots = mix.token_slots[tokens].long()
    ends = torch.bincount(slots, minlength=len(mix.scales)).cumsum(0).int()
    scale, a, b = mix.scales[slots][:, None].to(site.lora_a.dtype), site.lora_a.mT, site.lora_b.mT

    def run(y, x):
        s = F.grouped_mm(x[tokens], a, offs=ends).mul_(scale)
        return y.index_add_(0, tokens, F.grouped_mm(s, b, offs=ends))

    return run


def peft_layer(mix, site):
    """PEFT's layer around the base weight with one adapter a slot, for a mixed batch (``adapter_names``)."""
    import peft

    base = torch.nn.Linear(site.weight.shape[1], site.weight.shape[0], bias=False, device="meta")
    base.weight = torch.nn.Parameter(site.weight, requires_grad=False)
    ranks, scales = mix.ranks.tolist(), mix.scales.tolist()
    configs = [
        peft.LoraConfig(r=r, lora_alpha=scale * r, target_modules=["proj"])
        for r, scale in zip(ranks, scales, strict=True)
    ]
    model = peft.get_peft_model(torch.nn.ModuleDict({"proj": base}), configs[0], "0", autocast_adapter_dtype=False)
    for slot, config in enumerate(configs[1:], 1):
        model.add_adapter(str(slot), config)
    layer = model.base_model.model["proj"]
    for slot, r in enumerate(ranks):
        layer.lora_A[str(slot)].weight = torch.nn.Parameter(site.lora_a[slot, :r].clone())
        layer.lora_B[str(slot)].weight = torch.nn.Parameter(site.lora_b[slot, :, :r].clone())
    layer.eval()
    names = ["__base__" if slot < 0 else str(slot) for slot in mix.token_slots.tolist()]
    return lambda x: layer(x, adapter_names=names)


def vllm(mix, site):
    """vLLM's Triton shrink and expand: ranks padded, sums by atomics, the scale folded into B at load."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    meta = LoRAKernelMeta.make(len(mix.scales), len(mix.token_slots), site.weight.device)
    meta.prepare_tensors(mix.token_slots)
    arguments = meta.meta_args(len(mix.token_slots), False)
    a, b = site.lora_a[:, None], (site.lora_b * mix.scales[:, None, None].to(site.lora_b.dtype))[:, None]
    s = torch.empty(1, len(mix.token_slots), a.shape[2], dtype=torch.float32, device=a.device)

    def run(y, x):
        lora_shrink(x, [a], s, *arguments, 1.0)
        lora_expand(s, [b], y, *arguments, offset_start=0, add_inputs=True)
        return y

    return run


def sglang(mix, site):
    """SGLang's chunked kernels (its default backend): true ranks, S in the adapters' dtype."""
    from sglang.srt.lora.triton_ops import chunked_sgmv_lora_expand_forward, chunked_sgmv_lora_shrink_forward
    from sglang.srt.lora.utils import LoRABatchInfo

    tokens, device = len(mix.token_slots), site.weight.device
    chunk = 16 if tokens < 64 else 32 if tokens < 256 else 128
    order = torch.argsort(mix.token_slots, stable=True)
    slots, starts, chosen = mix.token_slots[order].tolist(), [], []
    for place, slot in enumerate(slots):
        if not starts or slot != chosen[-1] or place - starts[-1] == chunk:
            starts.append(place)
            chosen.append(slot)
    none = len(mix.scales)  # tokens without an adapter are a slot of rank 0
    a, b = (torch.cat([t, torch.zeros_like(t[:1])]).contiguous() for t in (site.lora_a, site.lora_b))
    new = {"dtype": torch.int32, "device": device}
    info = LoRABatchInfo(
        use_cuda_graph=False,
        bs=tokens,
        num_segments=len(starts),
        seg_indptr=torch.tensor([*starts, tokens], **new),
        weight_indices=torch.tensor([none if slot < 0 else slot for slot in chosen], **new),
        lora_ranks=torch.cat([mix.ranks, torch.zeros(1, **new)]),
        scalings=torch.cat([mix.scales, torch.ones(1, device=device)]),
        max_len=chunk,
        seg_lens=None,
        permutation=order.int(),
    )
    width = site.weight.shape[0]
    offsets = torch.tensor([0, width], **new)

    def run(y, x):
        s = chunked_sgmv_lora_shrink_forward(x, a, info, 1)
        return chunked_sgmv_lora_expand_forward(s, b, info, offsets, width, y)

    return run
