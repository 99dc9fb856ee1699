"""What a report says of every adapted layer."""

import pytest
from torch import nn

import fastpeft
from fastpeft import _host
from fastpeft.methods.folding import folded
from fastpeft.nn import LoraLinear
from tests.support.small_net import attached, build


class TestReport:
    def test_lines(self):
        model = attached(targets=["q_proj", "k_proj", "v_proj", "out"])
        report = fastpeft.report(model)
        assert report.fused == len(report) == 12
        row = next(iter(report))
        assert (row.path, row.status, row.backend) == ("layers.0.q_proj", "fused", "reference")
        assert row.shares_with == ("layers.0.k_proj", "layers.0.v_proj")
        assert "12 of 12 LoRA layers fused" in str(report)
        assert "layers.0-2.q_proj  fused (reference), reads x with k_proj, v_proj" in str(report)
        assert fastpeft.report(build()).layers == ()

    def test_layers_that_differ_in_a_number_are_one_line(self):
        model = attached()
        model.layers[1].out.base_layer.register_forward_hook(lambda *args: None)
        lines = str(fastpeft.report(model)).splitlines()
        assert lines[0] == "14 of 14 LoRA layers fused"
        assert [line.split()[:3] for line in lines[-6:]] == [
            ["layers.0-2.q_proj", "fused", "(reference),"],
            ["layers.0-2.k_proj", "fused", "(reference),"],
            ["layers.0-2.v_proj", "fused", "(reference),"],
            ["layers.0,2.out", "fused", "(reference)"],
            ["layers.1.out", "fused", "beside"],
            ["score.0,2", "fused", "(reference)"],
        ]

    def test_what_costs_the_host_more_than_it_needs_to(self, monkeypatch):
        monkeypatch.setattr(_host, "load", lambda: None)
        monkeypatch.setattr(_host, "missing", lambda: "not built")
        report = fastpeft.report(attached())
        assert str(report).splitlines()[2] == f"calls that repeat: {report.host}"
        assert report.host.endswith("since the extension is not built")
        monkeypatch.setattr(_host, "load", object)
        report = fastpeft.report(attached())
        assert report.host is None
        assert "calls that repeat" not in str(report)

    def test_two_numbers_in_a_path(self):
        """A model of experts: every layer has every expert."""
        rows = [(f"layers.{i}.experts.{j}.w", "a") for i in range(3) for j in (0, 1, 3)]
        assert folded(rows) == [("layers.0-2.experts.0-1,3.w", "a")]
        rows += [("layers.1.experts.2.w", "a"), ("layers.2.gate", "b")]
        assert folded(rows) == [
            ("layers.0-2.experts.0-1,3.w", "a"),
            ("layers.1.experts.2.w", "a"),
            ("layers.2.gate", "b"),
        ]
        assert folded([]) == []

    def test_a_table_for_notebooks(self):
        model = attached(targets=["q_proj", "out"])
        model.layers[0].out.base_layer.register_forward_hook(lambda *args: None)
        model.layers[0].out.__class__ = type("<b>", (LoraLinear,), {"fastpeft_report": lambda self: "<i>"})
        html = fastpeft.report(model)._repr_html_()
        assert "<div>5 of 6 LoRA layers fused</div>" in html
        assert html.count("<tr>") == 3
        assert "<code>layers.0-2.q_proj</code>" in html
        assert "not fused: &lt;i&gt;" in html
        assert "<table>" not in fastpeft.report(build())._repr_html_()

    def test_reasons(self):
        model = attached()
        model.layers[0].out.base_layer.register_forward_hook(lambda *args: None)
        with fastpeft.disable_adapter(model):
            assert fastpeft.report(model).fused == 0
        assert "  layers.0.out       fused beside its base (reference), since it has hooks" in str(
            fastpeft.report(model)
        )
        model.layers[1].out.set_adapter([])
        report = fastpeft.report(model)
        assert report.fused == len(report) - 1
        assert "  layers.1.out       not fused: no active adapter" in str(report)
        fastpeft.set_adapter(model, [])
        assert {row.status for row in fastpeft.report(model)} == {"no active adapter"}

    def test_a_backend_that_cannot_serve(self, monkeypatch):
        monkeypatch.setenv("FASTPEFT_BACKEND", "cuda")
        assert "cannot serve" in next(iter(fastpeft.report(attached()))).backend

    def test_peft_s_layers(self):
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))
        report = fastpeft.report(model)
        assert len(report) == 3
        assert report.fused == 0
        assert "not fused: Linear is PEFT's own layer; fastpeft.accelerate has not been called on it" in str(report)

    def test_peft_s_layers_without_a_fused_form(self):
        """The reason is the layer's kind, before and after accelerate."""
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        model = nn.Sequential(nn.Conv1d(9, 8, 1), nn.Linear(8, 8))
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"]))
        kept = "peft.tuners.lora.layer.Conv1d has no fused form"
        assert fastpeft.report(model).layers[0].status == kept
        assert [row.status for row in fastpeft.report(fastpeft.accelerate(model))] == [kept, "fused"]
