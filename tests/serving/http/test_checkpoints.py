"""Checkpoints and paths that a server is offered: none leads out of its folder, a bad one harms no good one."""

import json
import shutil

import pytest

from tests.support.lora_checkpoints import SETTINGS
from tests.support.small_server import complete, damaged, error, load, serving


def test_bad_checkpoints_among_good_ones(folder, tmp_path):
    bad = damaged(folder, tmp_path / "adapters")
    with serving(tmp_path / "adapters", slots=2) as (_, client):
        body = client.get("/v1/models").json()
        assert {card["id"] for card in body["data"]} == {"base", *SETTINGS}
        assert set(body["errors"]) == bad
        assert "truncated" in body["errors"]["truncated"]
        assert "unpickled" in body["errors"]["pickled"]
        assert str(tmp_path) not in json.dumps(body)
        assert "refused" in error(complete(client, "pickled"), 404, "model_not_found")
        for name in SETTINGS:
            assert complete(client, name).status_code == 200
        error(load(client, "truncated"), 400, "bad_checkpoint")
        error(load(client, "truncated", "alice", load_inplace=True), 400, "bad_checkpoint")
        assert complete(client, "alice").status_code == 200


NAMES_OUT = [
    *("..", ".", "", "/", "../outside", "alice/..", "alice/../alice", "./alice", "alice/.", "alice/", "//alice"),
    *("/etc", "/etc/passwd", "~", "~root", "$HOME", "alice\x00", "alice\n", "alice\\..\\bob", "..\\outside", "C:\\"),
    *("%2e%2e/outside", "..%2foutside", "．．/outside", "file:///etc", "http://host/x", "org/../../outside"),
    *(".hidden", "a" * 5000, "a/" * 20 + "a", "alice bob", "aliсe"),
]
LINKS_OUT = ["linked", "linked/x", "linked_file", "linked_up", "linked_up/outside"]


@pytest.mark.parametrize("path", [*NAMES_OUT, *LINKS_OUT], ids=lambda path: repr(path[:30]))
def test_no_path_leads_out(zoo, path, monkeypatch):
    """Refused, the same whether it exists or not, before anything is opened."""
    client = zoo
    opened = []
    monkeypatch.setattr("fastpeft.serving.bank.bank.read_adapter", lambda *a: opened.append(a))
    error(load(client, path), 400)
    if path in NAMES_OUT:
        error(load(client, "alice", name=path), 400)
    error(client.post("/v1/unload_lora_adapter", json={"lora_name": path}), 404, "model_not_found")
    assert opened == []
    assert {card["id"] for card in client.get("/v1/models").json()["data"]} == {"base", *SETTINGS}


@pytest.fixture(scope="module")
def zoo(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo") / "adapters"
    damaged(folder, root)
    (root / ".hidden").mkdir()
    (root / "linked_up").symlink_to("..")
    for made in ("~", "$HOME", "alice bob"):
        (root / made).mkdir(exist_ok=True)
    with serving(root, slots=2) as (_, client):
        yield client


def test_a_link_inside_the_folder_is_followed(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "latest").symlink_to("alice")
    with serving(tmp_path) as (_, client):
        assert (
            complete(client, "latest", max_tokens=9).json()["choices"]
            == complete(client, "alice", max_tokens=9).json()["choices"]
        )
        error(load(client, "missing"), 404)
