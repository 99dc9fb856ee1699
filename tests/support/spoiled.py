"""Checkpoints of LoRA on a small Llama, spoiled in one place each."""

import json
import pickle

from safetensors.torch import load_file, save_file

ATTENTION = "base_model.model.model.layers.0.self_attn"
NORM = "base_model.model.model.norm.lora_"


def edit(folder, tensors=None, config=None):
    """Change a checkpoint's tensors and config by functions that edit them in place."""
    path = folder / "adapter_model.safetensors"
    held = {key: tensor.clone() for key, tensor in load_file(path).items()}
    if tensors is not None:
        tensors(held)
    save_file(held, path)
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields.update(config or {})
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def set_to(key, value):
    return lambda tensors: tensors.__setitem__(f"{ATTENTION}.{key}", value)


def first(key, value):
    def change(tensors):
        tensors[f"{ATTENTION}.{key}"].view(-1)[0] = value

    return change


def widened(key, tensor):
    """A or B of rank 4 as of rank 13."""
    return tensor.repeat(4, 1)[:13] if "lora_A" in key else tensor.repeat(1, 4)[:, :13].contiguous()


def truncated(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)
