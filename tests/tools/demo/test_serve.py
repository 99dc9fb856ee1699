"""The serving demo: it runs from end to end, its comparison can fail, and its texts are what they say."""

import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'fastpeft[demo]'")

import serve
import serve_race
import serve_texts

from fastpeft import cli
from tests.support.models import llama

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.mark.thorough
@pytest.mark.slow
def test_from_end_to_end_and_again_from_its_own_folder(tmp_path, capsys):
    """Made on the spot; then the model that the first run has saved, as `--model` takes any other."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert serve.main(["--quick", "--out", str(first)]) == 0
    assert serve.main(["--quick", "--out", str(second), "--model", str(first / "model")]) == 0
    assert "0 differ otherwise" in capsys.readouterr().out
    for out in (first, second):
        table = (out / "table.md").read_text()
        assert all(way in table for way in (serve_race.SERVER, serve_race.MIXED, serve_race.TURNS))
        assert "0 differ otherwise" in table
        assert (out / "serve.png").read_bytes().startswith(b"\x89PNG")
        assert {path.name for path in (out / "adapters").iterdir()} >= {"docstrings"}
    assert (first / "model" / "tokenizer.json").is_file()
    assert not (second / "model").exists()


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    assert serve.main(["--quick", "--out", str(tmp_path), "--model", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("serve: ")


def test_the_command_line_finds_it(monkeypatch):
    called = []
    monkeypatch.setattr(subprocess, "call", lambda command: called.append(command) or 0)
    assert cli.main(["demo", "--serve", "--quick"]) == 0
    assert cli.main(["demo", "--quick"]) == 0
    assert [Path(command[1]).name for command in called] == ["serve.py", "finetune.py"]
    assert [command[2:] for command in called] == [["--quick"], ["--quick"]]


class Alone:
    """Stands for PEFT: always the same tokens, whose two best logits are ``gap`` apart from the third on."""

    def __init__(self, gap):
        self.gap = gap

    def alone(self, ask, new):
        return [1, 2, 3, 4] if ask.adapter else [1, 2, 9, 4]

    def logits(self, ask, tokens):
        return torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, self.gap], [0.0, self.gap]])


class Digits:
    def decode(self, tokens, **_):
        return "".join(map(str, tokens))


@pytest.mark.parametrize(
    ("text", "gap", "expected"),
    [
        ("1234", 0.5, (1, 0, 0)),
        ("1294", 1e-5, (0, 1, 0)),
        ("1294", 1e-3, (0, 0, 1)),
        ("1934", 1e-5, (0, 0, 1)),
        ("123", 1e-3, (0, 0, 1)),
        ("12345", 1e-5, (0, 0, 1)),
    ],
)
def test_the_comparison_can_fail(text, gap, expected):
    asks, answers = [serve_race.Ask("a", [1])], [serve_race.Answer(text, 0.0)]
    assert serve_race.compare(answers, asks, Alone(gap), Digits(), 4) == (*expected, text != "1294")


def test_peft_in_one_batch_and_alone_give_the_same(tmp_path):
    """Padding and neighbours change nothing, so the race is between equals."""
    from tests.support.lora_checkpoints import checkpoints

    folders = checkpoints(llama(), tmp_path, ("alice", "bob"))
    reference = serve_race.Peft(llama(), folders)
    asks = [serve_race.Ask(name, list(range(1, 4 + i))) for i, name in enumerate(["alice", "bob", None, "alice"])]
    names = [ask.adapter or "__base__" for ask in asks]
    mixed = reference._generate(asks, 6, adapter_names=names).tolist()
    assert mixed == [reference.alone(ask, 6) for ask in asks]
    logits = reference.logits(asks[1], mixed[1])
    assert logits.argmax(-1).tolist() == mixed[1]


def test_texts():
    texts = serve_texts.tenants(4)
    assert next(iter(texts)) == "docstrings"
    assert len(texts) == 4
    for text in (*texts.values(), serve_texts.prose()):
        assert 8 < len(text.train) / len(text.test) < 10
        assert len(text.test) > 2000
    assert len({text.train[:1000] for text in texts.values()}) == 4
