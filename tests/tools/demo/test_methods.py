"""The comparison of methods: every line of its table trains what it says, tuning sees no test text, and it runs."""

import re

import encoder
import methods
import methods_plot
import pytest
import torch
from results import Row

import fastpeft


def texts_for(model) -> encoder.Texts:
    words = [f"{'word ' * (i % 7)}{i}" for i in range(24)]
    return encoder.Texts(encoder.load_tokenizer(model), words, [i % 3 for i in range(24)], 16, torch.device("cpu"))


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_starts_as_the_model_and_learns(name, tiny_bert):
    """The head is zero, so all start from one loss; what is attached gets gradients, and the rest does not move."""
    data = texts_for(str(tiny_bert))
    base = encoder.Classifier(encoder.load_encoder(str(tiny_bert)), 3)
    models, refused = methods.made(name, base, data)
    assert not refused, refused
    assert len(models) == 1 + (methods.METHODS[name].theirs is not None)
    batches = data.shuffled(8, steps=4, seed=0)
    options = methods.parse([])
    before = {n: p.clone() for n, p in base.named_parameters()}
    run = methods.train(models, methods.METHODS[name].rate, batches, options, name)
    for title, model in models.items():
        assert run.losses[title][0] == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-5)
        trained = [p for p in model.encoder.parameters() if p.requires_grad]
        assert trained, title
        assert any(p.grad is not None and p.grad.any() for p in trained), title
    assert all(torch.equal(before[n], p) for n, p in base.named_parameters())
    sizes = {title: methods.parameters(model) for title, model in models.items()}
    assert len(set(sizes.values())) == 1, "PEFT's and ours train different numbers of parameters"


@pytest.mark.thorough
@pytest.mark.slow
def test_tuning_sees_no_test_text_and_judges_what_was_not_learnt(tiny_bert, monkeypatch, capsys):
    seen = []

    def watched(models, rate, batches, options, title):
        seen.append({tuple(row) for batch in batches for row in batch.inputs["input_ids"].tolist()})

    def judged(model, texts, function=None):
        seen.append({tuple(ids) for ids in texts.ids})
        return torch.zeros(len(texts), 4)

    def started(base, texts, seed):
        seen.append({tuple(ids) for ids in texts.ids})

    monkeypatch.setattr(methods, "train", watched)
    monkeypatch.setattr(methods, "predict", judged)
    monkeypatch.setattr(methods, "start_from_head", started)
    options = ["--tune", "--quick", "--method", "norms", "--rate", "0.1", "--model", str(tiny_bert)]
    assert methods.main([*options, "--steps", "20"]) == 0
    options = methods.parse(options)
    _, train_set, test_set = methods.task(options)
    for_the_head, held_out, again_for_the_head, learnt, held_out_again = seen
    tests = {tuple(ids) for ids in test_set.ids}
    assert len(held_out) <= len(train_set) // 5
    assert not held_out & tests
    assert held_out == held_out_again
    assert for_the_head == again_for_the_head
    assert not held_out & for_the_head
    assert not {tuple(t for t in ids if t) for ids in learnt} & {tuple(t for t in ids if t) for ids in held_out}
    assert "best 0.1" in capsys.readouterr().out


@pytest.mark.thorough
def test_whole_demo(tiny_bert, tmp_path, capsys):
    out = tmp_path / "out"
    chosen = [word for name in ("prompt", "norms", "5 % of rows") for word in ("--method", name)]
    assert methods.main(["--quick", "--model", str(tiny_bert), "--out", str(out), *chosen]) == 0
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in (out / "methods.md").read_text().splitlines()]
    assert lines[0][1:] == list(methods.COLUMNS)
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert list(rows) == [
        *("head only", "head, converged", "fastpeft prompt", "PEFT prompt"),
        *("fastpeft norms", "PEFT norms", "fastpeft 5 % of rows"),
    ]
    assert all(all(cells) for name, cells in rows.items() if "head" not in name), "a cell is empty"
    assert (out / "methods.png").read_bytes().startswith(b"\x89PNG\r\n")
    said = capsys.readouterr().out
    assert (out / "methods.md").read_text().strip() in said
    assert re.search(r"\d of 3 methods are above the frozen encoder's head only", said)


def test_the_verdict_counts_ours_alone():
    rows = {"head only": Row(0.5, 1), "head, converged": Row(0.7, 1), "fastpeft a": Row(0.6, 1), "PEFT a": Row(0.9, 1)}
    assert methods.verdict(rows).splitlines() == [
        "1 of 1 methods are above the frozen encoder's head only.",
        "0 of 1 methods are above the frozen encoder's head, converged.",
    ]


def test_the_plot_marks_every_method(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(methods_plot, "panel", lambda axis, rows, title: drawn.append((title, list(rows))))
    methods_plot.plot({"fastpeft a": Row(0.6, 10, 0.1, 5)}, tmp_path / "plot.png")
    assert [title for title, _ in drawn] == list(methods_plot.PANELS)


def test_bad_input(tmp_path, capsys):
    with pytest.raises(SystemExit):
        methods.main(["--method", "magic"])
    assert "invalid choice: 'magic'" in capsys.readouterr().err
    assert methods.main(["--quick", "--model", "no/such-model", "--out", str(tmp_path)]) == 1
    assert "no/such-model" in capsys.readouterr().err


def test_a_method_that_a_peer_cannot_run_is_said_and_left_out(tiny_bert, monkeypatch):
    def broken():
        raise RuntimeError("not with this version")

    monkeypatch.setitem(methods.METHODS, "norms", methods.METHODS["norms"]._replace(theirs=broken))
    base = encoder.Classifier(encoder.load_encoder(str(tiny_bert)), 3)
    models, refused = methods.made("norms", base, texts_for(str(tiny_bert)))
    assert list(models) == ["fastpeft norms"]
    assert refused == ["  PEFT's norms does not run here: RuntimeError: not with this version"]


def test_the_configs_are_those_of_fastpeft(tiny_bert):
    data = texts_for(str(tiny_bert))
    kinds = {type(method.ours(data)) for method in methods.METHODS.values()}
    assert kinds == {
        fastpeft.Lora, fastpeft.Bottleneck, fastpeft.PromptTuning, fastpeft.PrefixTuning, fastpeft.Selective
    }  # fmt: skip
