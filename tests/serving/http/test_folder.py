"""What a folder of adapters offers: names of two parts, the hub's cache, links that are allowed, what comes later."""

import json
import shutil

import pytest

from tests.support.lora_checkpoints import greedy_alone
from tests.support.small_server import complete, error, load, serving

FILES = ("adapter_config.json", "adapter_model.safetensors")


def text(client, name):
    response = complete(client, name, "hello", max_tokens=9)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_names_of_two_parts_and_the_hubs_cache(folder, tmp_path):
    root = tmp_path / "adapters"
    shutil.copytree(folder / "alice", root / "org" / "a")
    cached = root / "models--org--b"
    blobs, snapshot = cached / "blobs", cached / "snapshots" / "0123abcd"
    for made in (blobs, snapshot, cached / "refs"):
        made.mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abcd\n")
    for i, file in enumerate(FILES):
        shutil.copy(folder / "bob" / file, blobs / str(i))
        (snapshot / file).symlink_to(f"../../blobs/{i}")
    (root / "models--org--c" / "refs").mkdir(parents=True)
    (root / "models--org--c" / "refs" / "main").write_text("../../..")
    with serving(root, slots=2) as (service, client):
        assert service.bank.names() == ["org/b", "org/a"] or service.bank.names() == ["org/a", "org/b"]
        assert service.folder.errors == {}
        ids = service.tokenizer("hello")["input_ids"]
        for name in ("org/a", "org/b"):
            assert text(client, name) == service.tokenizer.decode(greedy_alone(service.bank, ids, name, 9))
            assert client.get(f"/v1/models/{name}").json()["id"] == name
        assert load(client, "org/a", "other/x").status_code == 200
        for wrong in ("a/b/c", "/a", "a/", "../a", "org/.."):
            error(load(client, "org/a", wrong), 400)


def test_links_lead_only_where_they_may(folder, tmp_path):
    root, elsewhere = tmp_path / "adapters", tmp_path / "elsewhere"
    root.mkdir()
    shutil.copytree(folder / "alice", elsewhere / "a")
    (root / "linked").symlink_to(elsewhere / "a")
    (root / "org").symlink_to(elsewhere)
    with serving(root) as (service, client):
        assert "leads out of the served folder" in error(complete(client, "linked"), 404, "model_not_found")
        error(complete(client, "org/a"), 404, "model_not_found")
        assert "leads out" in error(load(client, "org/a"), 400)
        assert service.bank.names() == []
    with serving(root, links=(elsewhere,)) as (service, client):
        assert sorted(service.bank.names()) == ["linked", "org/a"]
        assert text(client, "linked") == text(client, "org/a")
    with pytest.raises(NotADirectoryError, match="links"), serving(root, links=(tmp_path / "none",)):
        pass


def test_a_folder_that_comes_later_is_found(folder, tmp_path):
    """Once it is asked for; a bad one is not read again until it changes; what was unloaded stays so."""
    with serving(tmp_path) as (service, client):
        error(complete(client, "late"), 404, "model_not_found")
        shutil.copytree(folder / "alice", tmp_path / "late")
        (tmp_path / "late" / FILES[0]).rename(tmp_path / "config")
        (tmp_path / "late" / FILES[0]).write_text("{")
        assert "its checkpoint is refused" in error(complete(client, "late"), 404, "model_not_found")
        assert service.folder.path_of("late") is None
        (tmp_path / "config").replace(tmp_path / "late" / FILES[0])
        assert client.get("/v1/models/late").status_code == 200
        assert text(client, "late")
        assert service.folder.errors == {}
        client.post("/v1/unload_lora_adapter", json={"lora_name": "late"})
        error(complete(client, "late"), 404, "model_not_found")
        assert load(client, "late", "late").status_code == 200
        assert text(client, "late")


def test_what_was_unloaded_stays_so_while_its_folder_is_there(folder, tmp_path):
    """Until it is loaded by name; a folder that comes under a name which had none is another checkpoint."""
    with serving(tmp_path) as (service, _):
        served = service.folder

        def offered():
            served.discover("late")
            return "late" in service.bank

        served.load_bytes("late", tensors(folder, "alice"))
        served.unload("late")
        assert not offered()
        shutil.copytree(folder / "alice", tmp_path / "late")
        assert offered()
        served.unload("late")
        assert not offered()
        served.load_bytes("late", tensors(folder, "bob"))
        shutil.rmtree(tmp_path / "late")
        served.unload("late")
        shutil.copytree(folder / "alice", tmp_path / "late")
        assert offered()


def test_the_base_model_is_called_by_its_name(tmp_path, monkeypatch):
    """By its id, by its folder, and in the hub's cache, whose folders are called by a hash, by its id again."""
    from fastpeft.serving.http.start import base_name

    snapshot = tmp_path / "models--org--big--model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "latest").symlink_to(snapshot)
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        ("org/model", "org/model"),
        (str(snapshot), "org/big--model"),
        ("latest", "org/big--model"),
        (".", tmp_path.name),
    ):
        assert base_name(given) == expected


def tensors(folder, name):
    """A checkpoint as one safetensors file."""
    from safetensors.torch import load_file, save

    config = (folder / name / FILES[0]).read_text()
    return save(load_file(folder / name / FILES[1]), metadata={"adapter_config": config})


def put(client, body, **query):
    headers = {"Content-Type": "application/octet-stream"}
    return client.post("/v1/load_lora_adapter_from_tensors", params=query, content=body, headers=headers)


def test_an_adapter_in_a_body(folder, tmp_path):
    """As a trainer sends each step's: in place, without a disk; the answers say which version gave them."""
    (tmp_path / "empty").mkdir()
    with serving(tmp_path / "empty", max_adapter_bytes=200_000) as (service, client):
        ids = service.tokenizer("hello")["input_ids"]
        versions = []
        for source in ("alice", "bob", "alice"):
            assert put(client, tensors(folder, source), lora_name="policy", load_inplace=True).status_code == 200
            answer = complete(client, "policy", "hello", max_tokens=9).json()
            expected = service.tokenizer.decode(greedy_alone(service.bank, ids, "policy", 9))
            assert answer["choices"][0]["text"] == expected
            versions.append(answer["system_fingerprint"])
            assert versions[-1] == f"policy:{client.get('/v1/models/policy').json()['version']}"
        numbers = [int(version.removeprefix("policy:")) for version in versions]
        assert numbers == sorted(set(numbers))
        assert complete(client, max_tokens=1).json()["system_fingerprint"] is None
        error(put(client, tensors(folder, "alice"), lora_name="policy"), 400)
        error(put(client, tensors(folder, "alice")), 400)
        error(put(client, tensors(folder, "alice"), lora_name="x", pin="perhaps"), 400)
        error(put(client, b"x" * 200_001, lora_name="x"), 413, "body_too_large")
        good = tensors(folder, "alice")
        header = json.dumps({"__metadata__": {"adapter_config": "[1]"}}).encode()
        bad_config = len(header).to_bytes(8, "little") + header
        for bad in (b"", b"\xff" * 8, good[:-1], good[:40], bad_config):
            error(put(client, bad, lora_name="x"), 400, "bad_checkpoint")
        assert service.bank.names() == ["policy"]
