"""``save_pretrained`` of an attached model, by hand and by Trainer: the base model's folder, no random layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastpeft
from tests.support.models import IDS, bert, llama, logits, t5

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CONFIGS = {
    "lora": lambda: fastpeft.Lora(r=2, init="random"),
    "head": lambda: fastpeft.Lora(r=2, targets=["lm_head", "embed_tokens"], init="random"),
    "copy": lambda: fastpeft.Lora(r=2, targets=["q_proj"], modules_to_save=["norm"], init="random"),
    "bottleneck": lambda: fastpeft.Bottleneck(size=3, init="mam"),
    "prompt": lambda: fastpeft.PromptTuning(length=3),
    "prefix": lambda: fastpeft.PrefixTuning(length=3),
    "norms": lambda: fastpeft.Selective(params=["norm"]),
    "blocks and bias": lambda: fastpeft.Selective(layers="last:1", add_missing_bias=["model.layers.1.mlp.up_proj"]),
    "tokens": lambda: [fastpeft.Lora(r=2, init="random"), fastpeft.Selective(tokens=[3, 5])],
    "rows": lambda: fastpeft.Selective(rows={"up_proj": [1, 2]}),
}


def moved(model):
    """Every trained number another one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def reloaded(model, folder):
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"]
    return again.eval()


@pytest.mark.oldest
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_folder_is_the_base_model_s_and_resumes(kind, tied, tmp_path):
    if kind == "prefix":
        pytest.importorskip("transformers.masking_utils", reason="this transformers has no masks that a prefix can use")
    plain = logits(llama(tied=tied))
    model = moved(fastpeft.attach(llama(tied=tied), CONFIGS[kind]()))
    trained = logits(model)
    assert trained.shape != plain.shape or not torch.equal(trained, plain)
    with pytest.warns(UserWarning, match=r"Write adapters with fastpeft\.save"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), trained)
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again), plain)
    # As Trainer resumes: into the same model with fresh adapters.
    from safetensors.torch import load_file

    fresh = fastpeft.attach(llama(tied=tied), CONFIGS[kind]())
    result = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_head.weight", "lm_head.base_layer.weight"} if tied else set())
    assert torch.equal(logits(fresh), trained)
    fastpeft.detach(fresh)
    assert torch.equal(logits(fresh), plain)


@pytest.mark.oldest
@pytest.mark.filterwarnings("ignore:save_pretrained")
@pytest.mark.skipif(transformers.__version__ >= "5", reason="this transformers writes safetensors alone")
def test_pickled_folders(tmp_path):
    model = moved(fastpeft.attach(llama(tied=True), CONFIGS["head"]()))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(llama(tied=True)))
    fresh = fastpeft.attach(llama(tied=True), CONFIGS["head"]())
    fresh.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", weights_only=True), strict=False)
    assert torch.equal(logits(fresh), logits(model))


def test_several_adapters_and_shards(tmp_path):
    """The inactive one resumes too, from a folder of several files."""
    model = fastpeft.attach(llama(), CONFIGS["norms"](), "a")
    fastpeft.attach(moved(model), CONFIGS["lora"](), "b")
    fastpeft.set_adapter(model, "b")
    with pytest.warns(UserWarning, match="save_pretrained"):
        moved(model).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(llama()))
    fresh = fastpeft.attach(fastpeft.attach(llama(), CONFIGS["norms"](), "a"), CONFIGS["lora"](), "b")
    from safetensors.torch import load_file

    for shard in sorted(tmp_path.glob("*.safetensors")):
        fresh.load_state_dict(load_file(shard), strict=False)
    for name in ("a", "b"):
        for one in (model, fresh):
            fastpeft.set_adapter(one, name)
        assert torch.equal(logits(fresh), logits(model))


def test_merged_weights_are_written(tmp_path):
    model = moved(fastpeft.attach(llama(), CONFIGS["copy"]()))
    fastpeft.merge(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


def test_copies_of_the_model_write_their_own(tmp_path):
    model = moved(fastpeft.attach(llama(), CONFIGS["lora"]()))
    for i, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert other.save_pretrained.module is other
        with torch.no_grad():
            other.get_input_embeddings().weight.zero_()
        with pytest.warns(UserWarning, match="save_pretrained"):
            other.save_pretrained(tmp_path / str(i))
        assert not reloaded(other, tmp_path / str(i)).get_input_embeddings().weight.any()
    fastpeft.detach(model)
    assert "save_pretrained" not in model.__dict__
    assert not model._load_state_dict_pre_hooks
    assert not model._state_dict_hooks
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(reloaded(model, tmp_path / "own")), logits(model))


def test_a_part_and_a_model_around(tmp_path):
    """A model around the one with adapters refuses; one inside writes its own names."""
    model = llama()
    fastpeft.attach(model.model, CONFIGS["lora"]())
    with pytest.raises(
        ValueError, match=r"adapters are attached to model, a part .* write the adapters with fastpeft\.save"
    ):
        model.save_pretrained(tmp_path / "outer")
    assert not list((tmp_path / "outer").glob("*.safetensors"))
    around = nn.Sequential(llama())
    fastpeft.attach(around, CONFIGS["lora"]())
    with pytest.warns(UserWarning, match="save_pretrained"):
        around[0].save_pretrained(tmp_path / "inner")
    assert torch.equal(logits(reloaded(around[0], tmp_path / "inner")), logits(llama()))


@pytest.mark.parametrize("make", [bert, t5])
def test_other_families(make, tmp_path):
    model = moved(fastpeft.attach(make(), fastpeft.Lora(r=2, bias="all" if make is bert else "none", init="random")))
    with pytest.warns(UserWarning, match="save_pretrained"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(make()))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = (IDS.flatten() * (i + 2)) % 90 + 1
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, **settings):
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], logging_strategy="no", disable_tqdm=True, seed=1, **settings,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


@pytest.mark.filterwarnings("ignore:save_pretrained")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["lora", "head", "tokens", "norms"])
def test_trainer(kind, tied, tmp_path):
    """Checkpoints, resumption bit for bit, the best model at the end, and the folder that is left."""

    def attached():
        torch.manual_seed(5)
        return fastpeft.attach(llama(tied=tied), CONFIGS[kind]())

    straight = attached()
    run = trainer(straight, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    run.train()
    last = reloaded(straight, tmp_path / "checkpoint-4")
    assert torch.equal(logits(last), logits(llama(tied=tied)))
    run.save_model(str(tmp_path / "end"))
    assert torch.equal(logits(reloaded(straight, tmp_path / "end")), logits(llama(tied=tied)))
    resumed = attached()
    other = trainer(resumed, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for model in (straight, resumed):
        model.eval()
    assert torch.equal(logits(resumed), logits(straight))
    fresh = attached().eval()
    assert not torch.equal(logits(fresh), logits(straight))
