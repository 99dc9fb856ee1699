"""The command line: env never fails, check's exit code tells the truth, demo and bench say where they are."""

import os
import subprocess
import sys
import types

import pytest
import torch

from fastpeft import cli


def env(capsys) -> dict[str, str]:
    assert cli.main(["env"]) == 0
    return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


def test_version(capsys):
    import fastpeft

    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastpeft {fastpeft.__version__}\n"


def test_env_reads_as_a_bug_report(capsys, monkeypatch):
    monkeypatch.setenv("FASTPEFT_BACKEND", "reference")
    rows = {name.strip(): value.strip() for name, value in env(capsys).items()}
    assert rows["torch"] == torch.__version__
    assert rows["reference on cpu"] == "serves"
    assert rows["cuda on cpu"].startswith("does not serve: ")
    assert rows["FASTPEFT_BACKEND"] == "reference"
    assert {"fastpeft", "python", "triton", "peft", "transformers", "numpy", "driver", "fastpeft._C"} <= set(rows)
    assert torch.cuda.is_available() == ("cuda:0" in rows)


def test_env_with_torch_alone():
    """What is missing is named with the command that gets it, and methods are not imported."""
    blocked = ("triton", "peft", "transformers", "numpy", "safetensors", "fastpeft.methods", "fastpeft.integrations")
    code = f"""
import importlib.metadata, sys
sys.modules.update(dict.fromkeys({blocked}))  # None: importing it raises ImportError
version = importlib.metadata.version
def only_torch(name):
    if name != "torch":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = only_torch
from fastpeft import cli
sys.exit(cli.main(["env"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not installed (pip install triton)" in done.stdout
    assert "Triton does not import" in done.stdout


def test_env_tells_an_extension_that_does_not_load(capsys, monkeypatch, tmp_path):
    import fastpeft
    from fastpeft import _backend

    monkeypatch.setattr(_backend, "_import_error", _backend._import_error.__wrapped__)  # not what it found before
    (tmp_path / "_C.py").write_text("raise ImportError('wrong libc')")
    monkeypatch.setattr(fastpeft, "__path__", [str(tmp_path), *fastpeft.__path__])  # in front of one that is built here
    monkeypatch.delitem(sys.modules, "fastpeft._C", raising=False)
    assert "built, but does not load: wrong libc" in str(env(capsys))


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([("lora_linear", torch.float32, 0.7, 0.7, True)], 0),
        ([("lora_linear", torch.float32, 0.7, 0.7, True), ("lora_linear", torch.float16, 9.0, 1.0, False)], 1),
        ([], 1),
    ],
    ids=["all pass", "one fails", "nothing ran"],
)
def test_check_exit_code(rows, code, capsys, monkeypatch):
    testing = types.ModuleType("fastpeft.testing")
    testing.check_ops = lambda device: rows
    monkeypatch.setitem(sys.modules, "fastpeft.testing", testing)
    assert cli.main(["check", "--device", "cpu"]) == code
    out = capsys.readouterr().out
    assert f"{len(rows) - (code and len(rows) > 0)} passed" in out
    assert ("FAILED" in out) == (code and len(rows) > 0)


def test_check_runs_every_op():
    """As a user runs it: without Triton's interpreter, which multiplies bfloat16 wrongly."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastpeft.cli", "check", "--device", "cpu"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line.split()[0] for line in done.stdout.splitlines() if line.endswith("ok")}
    assert {"lora_linear", "lora_linear_shared"} <= names


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_check_without_the_device(capsys):
    assert cli.main(["check", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "part"), [("demo", "examples/finetune.py"), ("bench", "bench")])
def test_checkout_commands(command, part, capsys, monkeypatch, tmp_path):
    """Options are passed on and the exit code comes back; without a checkout the message says where to find it."""
    monkeypatch.setattr(cli, "_CHECKOUT", tmp_path)
    assert cli.main([command]) == 2
    assert f"{part} is in the source checkout only" in capsys.readouterr().err

    (tmp_path / part).parent.mkdir(exist_ok=True)
    (tmp_path / part).write_text("")
    called = []
    monkeypatch.setattr(subprocess, "call", lambda command: called.append(command) or 7)
    assert cli.main([command, "--help", "-x", "a b"]) == 7
    assert called[0][0] == sys.executable
    assert called[0][-4:] == [str(tmp_path / part), "--help", "-x", "a b"]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["env", "--nonsense"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: fastpeft" in capsys.readouterr().err
