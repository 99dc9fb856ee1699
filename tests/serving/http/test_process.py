"""`fastpeft serve` as a process: what it says, what SIGTERM does, its exit codes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="httpx is not installed")
import httpx

from fastpeft import cli
from tests.support.models import llama
from tests.support.small_server import complete, damaged, slow_text, tokenizer, until

ROOT = Path(__file__).resolve().parents[3]


@contextlib.contextmanager
def process(folder, tmp_path, *options, **environment):
    """`fastpeft serve` as a process of its own; yields it and its address."""
    model = tmp_path / "model"
    llama().save_pretrained(model)
    tokenizer().save_pretrained(model)
    command = [sys.executable, "-m", "fastpeft.cli", "serve", model, "--adapters", folder, "--port", "0"]
    command += ["--served-model-name", "base", "--max-rank", "16", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    made = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in made.stderr:
            said.append(line)
            if " on http://" in line:
                break
        made.said = "".join(said)
        assert said, "it said nothing"
        assert " on http://" in said[-1], made.said
        yield made, said[-1].split()[-1]
    finally:
        made.kill()
        made.communicate()


def test_sigterm_under_load(folder, tmp_path):
    """What was accepted is finished, nothing new is accepted, and the exit code is 0."""
    options = ("--max-rows", "4", "--api-key", "k")
    with process(folder, tmp_path, *options) as (server, url):
        headers = {"Authorization": "Bearer k"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client, ThreadPoolExecutor(12) as pool:
            assert complete(client, max_tokens=1).status_code == 200
            started = threading.Barrier(13)

            def ask(i):
                with httpx.Client(base_url=url, headers=headers, timeout=60) as own:
                    own.get("/health")
                    started.wait()
                    return complete(own, ["alice", "bob", "base"][i % 3], max_tokens=300, stream=i % 2 == 0)

            requests = [pool.submit(ask, i) for i in range(12)]
            started.wait()

            def accepted():
                rows = (row.rsplit(" ", 1) for row in client.get("/metrics").text.splitlines())
                return sum(float(value) for name, value in rows if name.startswith("fastpeft_prompt_tokens_total{"))

            until(lambda: accepted() == 13 * len("abc"))
            assert not all(request.done() for request in requests)
            server.send_signal(signal.SIGTERM)
            answers = [request.result(60) for request in requests]
            assert {answer.status_code for answer in answers} == {200}
            for i, answer in enumerate(answers):
                if i % 2 == 0:
                    assert answer.text.endswith("data: [DONE]\n\n")
                else:
                    assert answer.json()["usage"]["completion_tokens"] == 300
        assert server.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")


def test_sigterm_cuts_off_what_takes_too_long(folder, tmp_path):
    """Clients that never read their streams cannot keep the server up. The key may come from the environment."""
    with process(folder, tmp_path, "--drain-seconds", "1", FASTPEFT_API_KEY="k") as (server, url):
        assert httpx.get(url + "/v1/models").status_code == 401
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}, timeout=60) as client:
            with contextlib.ExitStack() as streams:
                for _ in range(8):
                    assert streams.enter_context(slow_text(client, max_tokens=500)).status_code == 200
                server.send_signal(signal.SIGTERM)
                assert server.wait(30) == 0


def test_serve_says_what_is_wrong(folder, tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path / "none"), "--adapters", str(folder)]) == 1
    assert cli.main(["serve", "x", "--adapters", str(tmp_path / "none")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("fastpeft serve: ") for line in (lines[0], lines[-1]))
    assert "no such folder" in lines[-1]


def test_serve_warns_and_names_bad_checkpoints(folder, tmp_path):
    damaged(folder, tmp_path / "adapters")
    with process(tmp_path / "adapters", tmp_path, "--host", "0.0.0.0") as (server, _):
        assert "without an API key" in server.said
        assert "truncated is not served" in server.said
        assert "adapters: alice, bob, carol, dave" in server.said


def test_without_the_extra_it_says_how_to_get_it(tmp_path):
    code = """
import sys
sys.modules["fastapi"] = None
from fastpeft import cli
sys.exit(cli.main(["serve", "model", "--adapters", "."]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'fastpeft[serve]'" in done.stderr
