"""What a bank refuses, with the reason and nothing changed; threads that load and evict under it; no growth."""

import gc
import json
import random
import shutil
import threading
import tracemalloc

import pytest
import torch
from torch import nn

from fastpeft.serving import AdapterBank, BadCheckpoint, BankFull

pytest.importorskip("peft", reason="PEFT is not installed")
from safetensors.torch import load_file

from tests.support.lora_checkpoints import SETTINGS, checkpoint
from tests.support.models import llama, prompts
from tests.support.spoiled import ATTENTION, edit, first, pickled, set_to, truncated, widened

NAMES = list(SETTINGS)


@pytest.fixture
def bank(folders):
    with AdapterBank(llama(), slots=2, max_rank=12) as bank:
        bank.load("alice", folders["alice"])
        yield bank


ZOO = {
    "truncated": (truncated, "truncated or no safetensors file"),
    "pickle": (pickled, "has adapter_model.bin, which would be unpickled"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is no JSON"),
    "another method": (lambda f: edit(f, config={"peft_type": "IA3"}), "is PEFT's IA3: peft_type='IA3' is not served"),
    "no config": (lambda f: (f / "adapter_config.json").write_text("[]"), "is neither PEFT's"),
    "rank that is no number": (lambda f: edit(f, config={"r": "four"}), "r is 'four'"),
    "A of another shape": (
        lambda f: edit(f, set_to("q_proj.lora_A.weight", torch.ones(4, 31))),
        r"A \[4, 31\] at model.layers.0.self_attn.q_proj, expected \[4, 32\]",
    ),
    "B of another shape": (
        lambda f: edit(f, set_to("k_proj.lora_B.weight", torch.ones(16, 5))),
        r"lora_B \[16, 5\] of model.layers.0.self_attn.k_proj is not of rank 4",
    ),
    "rank over the bank's": (
        lambda f: edit(f, lambda t: t.update({k: widened(k, v) for k, v in t.items()}), {"r": 13}),
        "rank 13 at .*, expected at most the bank's max_rank=12",
    ),
    "integers": (
        lambda f: edit(f, set_to("q_proj.lora_A.weight", torch.ones(4, 32).char())),
        "lora_A of .* is torch.int8",
    ),
    "NaN": (
        lambda f: edit(f, first("q_proj.lora_A.weight", float("nan"))),
        "q_proj.lora_A.weight has values that are not finite",
    ),
    "infinity": (
        lambda f: edit(f, first("v_proj.lora_B.weight", 1e400)),
        "v_proj.lora_B.weight has values that are not",
    ),
    "scale": (
        lambda f: edit(f, config={"lora_alpha": 1e300}),
        "has scale 2.5e\\+299 at .*, expected a number of float32",
    ),
    "another model": (
        lambda f: edit(f, lambda t: t.update({k.replace("layers.0", "layers.7"): t.pop(k) for k in list(t)})),
        r"is for another model: LlamaForCausalLM has no model.layers.7.mlp.down_proj, .* and 1 more",
    ),
    "another prefix": (lambda f: edit(f, lambda t: t.update({"x": torch.ones(1)})), "has x, expected keys that start"),
    "A alone": (
        lambda f: edit(f, lambda t: t.pop(f"{ATTENTION}.q_proj.lora_B.weight")),
        "model.layers.0.self_attn.q_proj has no lora_B beside its lora_A",
    ),
    "a layer is missing": (
        lambda f: edit(f, lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.up_proj" in k]),
        "has no weights for model.layers.1.mlp.up_proj, which its config names",
    ),
    "DoRA": (lambda f: edit(f, config={"use_dora": True}), "down_proj has no lora_magnitude_vector"),
    "DoRA's tensors": (
        lambda f: edit(f, set_to("q_proj.lora_magnitude_vector", torch.ones(32))),
        "q_proj.lora_magnitude_vector is no part of LoRA",
    ),
    "biases": (lambda f: edit(f, config={"bias": "all"}), "has bias='all', expected no trained biases"),
    "no bias of B": (lambda f: edit(f, config={"lora_bias": True}), r"has the lora_bias none at .*, expected \[32\]"),
    "a bias of B": (
        lambda f: edit(
            f, lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(32)})
        ),
        "is a trained bias, which is not served",
    ),
    "modules_to_save": (lambda f: edit(f, config={"modules_to_save": ["norm"]}), r"has modules_to_save=\['norm'\]"),
    "changed base": (
        lambda f: edit(f, config={"init_lora_weights": "pissa"}),
        "'pissa', which changes the frozen weights",
    ),
    "a resized embedding": (
        lambda f: edit(f, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(96, 32)})),
        "embed_tokens.weight, which is no LoRA weight",
    ),
    "no linear layer": (
        lambda f: edit(
            f,
            lambda t: t.update(
                {
                    f"base_model.model.model.norm.lora_{h}.weight": torch.ones(*s)
                    for h, *s in (("A", 4, 32), ("B", 32, 4))
                }
            ),
        ),
        "model.norm, which is a LlamaRMSNorm",
    ),
}


@pytest.mark.parametrize("case", ZOO)
@torch.no_grad()
def test_bad_checkpoints_change_nothing(bank, folders, tmp_path, case):
    """Refused with the reason under a new name and under the name of a good adapter, which is served as before."""
    spoil, reason = ZOO[case]
    ids = prompts(1)
    with bank.use(["alice"]):
        before = bank.model(ids).logits
    bad = shutil.copytree(folders["alice"], tmp_path / "bad")
    spoil(bad)
    for name in ("bad", "alice"):
        with pytest.raises(BadCheckpoint, match=reason):
            bank.load(name, bad, pin=True)
    assert (bank.names(), bank.resident()) == (["alice"], ["alice"])
    with bank.use(["alice"]):
        assert torch.equal(bank.model(ids).logits, before)


def test_missing_files(bank, folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        bank.load("x", tmp_path / "nowhere")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = shutil.copytree(folders["alice"], tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {name}"):
            bank.load("x", folder)
    assert bank.names() == ["alice"]


def test_values_that_overflow_the_banks_dtype(folders, tmp_path):
    bad = shutil.copytree(folders["alice"], tmp_path / "bad")
    edit(bad, first("q_proj.lora_A.weight", 1e6))
    with AdapterBank(llama().half(), max_rank=12) as bank:
        bank.load("good", folders["alice"])
        with pytest.raises(BadCheckpoint, match="not finite in torch.float16"):
            bank.load("bad", bad)


def test_targets_limit_the_bank(folders):
    with AdapterBank(llama(), max_rank=12, targets=["q_proj", "v_proj"]) as bank:
        with pytest.raises(BadCheckpoint, match="layers.0.self_attn.k_proj, which is not among the bank's targets"):
            bank.load("alice", folders["alice"])
        with pytest.raises(BadCheckpoint, match="embed_tokens, which is not among"):
            bank.load("dave", folders["dave"])


def test_memory_is_taken_where_adapters_need_it(tmp_path):
    model = llama()
    with AdapterBank(model, slots=2, max_rank=4) as bank:
        bank.load("q", checkpoint(model, tmp_path / "q", r=4, target_modules=["q_proj"]))
        assert {site.path.rpartition(".")[2] for site in bank._sites if site.lora_a is not None} == {"q_proj"}


def test_models_that_cannot_have_a_bank():
    from peft import LoraConfig, get_peft_model

    import fastpeft

    with pytest.raises(ValueError, match="has adapters of its own"):
        AdapterBank(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="has adapters of its own"):
        AdapterBank(fastpeft.attach(llama(), fastpeft.Lora(r=2)))
    with pytest.raises(ValueError, match="layers are on cpu, meta, expected one device"):
        AdapterBank(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="matches no layer"):  # its fused path reads weights without calling layers
        AdapterBank(nn.Sequential(encoder))


@torch.no_grad()
def test_threads_load_evict_and_run(folders):
    """Four threads run mixed batches of any adapters while two load and replace them: every result is as if alone."""
    model, ids = llama(), prompts(3)
    bank = AdapterBank(model, slots=4, max_rank=12)
    alone = {None: model(ids).logits}
    for name, folder in folders.items():
        bank.load(name, folder)
        with bank.use([name] * 3):
            alone[name] = model(ids).logits
    wrong, runs, stop = [], [], threading.Event()

    def run(seed):
        choose = random.Random(seed)
        while not stop.is_set():
            rows = [choose.choice([None, *NAMES]) for _ in range(3)]
            try:
                with bank.use(rows):
                    logits = model(ids).logits
            except BankFull:
                continue
            error = max((logits[i] - alone[name][i]).abs().max().item() for i, name in enumerate(rows))
            (wrong if error > 1e-4 else runs).append(error)

    def churn(seed):
        choose = random.Random(seed)
        while not stop.is_set():
            bank.load(f"other {choose.randrange(6)}", folders[choose.choice(NAMES)])
            name = choose.choice(NAMES)
            bank.load(name, folders[name])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    threads += [threading.Thread(target=churn, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    stop.wait(4)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(runs) > 20
    bank.close()


def test_a_thousand_loads_leave_nothing(bank, folders):
    """Neither tensors nor Python memory grow."""

    sources = [
        (
            load_file(folders[name] / "adapter_model.safetensors"),
            json.loads((folders[name] / "adapter_config.json").read_text()),
        )
        for name in NAMES[:3]
    ]

    def cycle(count):
        for i in range(count):
            tensors, config = sources[i % 3]
            bank.load(f"name {i % 7}", tensors, config=config)
            if i % 2:
                bank.unload(f"name {i % 7}")
            with bank.use([bank.names()[-1]]):
                pass
        for name in bank.names():
            if name != "alice":
                bank.unload(name)

    def tensors():
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    cycle(42)
    before = tensors()
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    cycle(1000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert tensors() == before
    assert grown < 200_000  # an adapter that stayed would be 20 times the 200 bytes a cycle
