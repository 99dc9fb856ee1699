"""The README and the site say what is so: their Python runs as written, and what they name exists.

Every block of README.md runs alone. The blocks of a page of docs/ share one namespace, in order, as in a notebook. A
block that cannot run here has a comment in front of it that says why, and is counted.
"""

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
import yaml

import fastpeft
from tests.support.lora_checkpoints import checkpoints
from tests.support.models import llama

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
WORKFLOWS = sorted((ROOT / ".github").rglob("*.yml"))
NOT_RUN = {"docs/peft.md": 1, "docs/quantised.md": 1}  # blocks by page; each says why in the page

_BLOCK = re.compile(r"(?:<!-- not run: (?P<why>.+) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Python of a page: its first line's number, its text, and why it is not run, or None."""

    line: int
    code: str
    why: str | None


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in _BLOCK.finditer(text):
        found.append(Block(text.count("\n", 0, match.start("code")) + 1, match["code"], match["why"]))
    return found


def run(page: str, block: Block, namespace: dict) -> None:
    """Errors name the page and its line."""
    exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


WITH_BLOCKS = [page for page in PAGES if blocks_of(page.read_text())]


@pytest.fixture
def small_hub(monkeypatch, tmp_path):
    """Every name of a model is a small one; adapters/alice and adapters/bob are checkpoints for it."""
    auto = transformers.AutoModelForCausalLM
    monkeypatch.setattr(auto, "from_pretrained", lambda name, **_: llama())
    monkeypatch.chdir(tmp_path)
    checkpoints(llama(), tmp_path / "adapters", names=("alice", "bob"))


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=named)
def test_blocks_run(page, small_hub):
    namespace = {}
    for block in blocks_of(page.read_text()):
        if block.why is None:
            with contextlib.redirect_stdout(io.StringIO()):
                run(named(page), block, {} if page.name == "README.md" else namespace)


def test_blocks_are_found():
    count = {named(page): len(blocks_of(page.read_text())) for page in WITH_BLOCKS}
    assert count["README.md"] == 3
    assert len(count) >= 6
    fences = {named(page): page.read_text().count("```python") for page in PAGES}
    assert {page: n for page, n in fences.items() if n} == count, "a fence of another form is not run"
    left_out = {named(page): sum(b.why is not None for b in blocks_of(page.read_text())) for page in WITH_BLOCKS}
    assert {page: n for page, n in left_out.items() if n} == NOT_RUN


def test_a_wrong_block_fails():
    text = "# A page\n\n```python\nx = 1\n```\n\n<!-- not run: no GPU -->\n```python\ny\n```\n\n```python\nx + y\n```\n"
    first, skipped, last = blocks_of(text)
    assert (first.line, skipped.why, last.line) == (4, "no GPU", 13)
    namespace = {}
    run("page", first, namespace)
    with pytest.raises(NameError, match="'y'") as error:
        run("page", last, namespace)
    assert error.traceback[-1].lineno == 12  # counted from 0


def test_readme_is_short():
    assert 600 <= len((ROOT / "README.md").read_text().split()) <= 900


_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
_PATH = re.compile(r"`([\w./*-]+/[\w./*-]*|[\w*-]+\.(?:py|sh|md|jsonl|yaml|txt|toml|cu))`")
# Files that users make; endpoints; what a build makes.
_THEIRS = re.compile(r"^(/|adapters/|demo-output/|out/|nvidia/|site/|text/)|^(fastpeft-\*\.whl|adapter_)")


def missing_files(page: Path, text: str) -> list[str]:
    """Files that a page links to, or names between backticks, and that are not there."""
    names = {name for name in _PATH.findall(text) if not _THEIRS.search(name) and "<" not in name}
    gone = [name for name in names if not any(any(root.glob(name)) for root in (ROOT, ROOT / "tests", ROOT / "csrc"))]
    return gone + [link for link in _LINK.findall(text) if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_files_that_are_named_exist(page):
    assert missing_files(page, page.read_text()) == []


def test_missing_files_are_found():
    text = "`bench/no_such.py`, `ops/*/test_no.py`, [a page](no.md), `bench/command.py`, `/v1/models`, [R](README.md)"
    assert sorted(missing_files(ROOT / "README.md", text)) == ["bench/no_such.py", "no.md", "ops/*/test_no.py"]


def commands(text: str, program: str) -> set[str]:
    """The first words after a program's name where it is code: between backticks, in a block of the shell, a step."""
    shell = re.findall(r"^```bash\n(.*?)^```$|^ +- run: (.*)", text, re.MULTILINE | re.DOTALL)
    code = [line for match in shell for part in match for line in part.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    found = [re.match(rf"(?:[A-Z_]+=\S+ )*{program} ([a-z][a-z-]*)", line) for line in code]
    return {match[1] for match in found if match}


@pytest.mark.parametrize("page", [*TEXTS, *WORKFLOWS], ids=named)
def test_commands_that_are_named_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    parsed = ast.walk(ast.parse((ROOT / "fastpeft" / "cli.py").read_text()))
    words = {node.value for node in parsed if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    text = page.read_text()
    assert commands(text, "make") - targets == set()
    assert commands(text, "fastpeft") - words == set()


def test_commands_are_found():
    text = "`make demo` and\n```bash\nmake test   # all\nfastpeft env\n```\n"
    assert (commands(text, "make"), commands(text, "fastpeft")) == ({"demo", "test"}, {"env"})


def test_every_environment_variable_is_explained():
    """What the package and its installation read is what the page's table has."""
    sources = [ROOT / "setup.py", *(ROOT / "fastpeft").rglob("*.py")]
    read = re.compile(r"environ(?:\.get\(|\[)\"([A-Z_]+)\"")
    used = {name for path in sources for name in read.findall(path.read_text())} | {"CUDA_HOME", "CUDA_PATH"}
    table = [line.split("|")[1] for line in (ROOT / "docs/environment.md").read_text().splitlines() if "|" in line]
    assert {name for cell in table for name in re.findall(r"`([A-Z_]+)`", cell)} == used


def test_every_public_name_has_its_entry():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    ends = {entry.rpartition(".")[2] for entry in re.findall(r"^::: ([\w.]+)$", text, re.M)}
    ends.update(name for names in re.findall(r"members: \[(.+)\]", text) for name in names.split(", "))
    modules = {"integrations", "methods", "nn", "ops", "reference", "serving", "testing"}
    public = {*fastpeft.__all__, *fastpeft.ops.__all__, *fastpeft.nn.__all__, *fastpeft.serving.__all__}
    assert (public | {*fastpeft.testing.__all__}) - modules - ends - {"MAX_RATIO", "RMS_RATIO"} == set()


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_workflows_are_yaml(path):
    """Parsed, with a job that has steps, each of which runs something."""
    parsed = yaml.safe_load(path.read_text())
    if path.parent.name != "workflows":
        return
    assert {"name", True, "permissions", "jobs"} <= set(parsed)  # `on` is a boolean to YAML 1.1
    for job in parsed["jobs"].values():
        assert job["runs-on"]
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_workflows_are_found():
    names = {path.name for path in WORKFLOWS}
    assert {"tests.yml", "docs.yml", "wheels.yml"} <= names
