"""The vLLM plug-in: what it relies on against released versions, and when it changes vLLM or leaves it alone."""

import importlib
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

import fastpeft
from fastpeft.integrations import _interface, vllm
from tests.support import small_vllm
from tests.support.engine_source import looker, present, recorded, said, tree_of

VERSIONS = recorded("vllm")
ROOT = Path(__file__).resolve().parents[3]


def test_recorded_versions_are_the_tested_ones():
    assert tuple(VERSIONS) == vllm.TESTED


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_version_has_the_interface(version):
    assert _interface.problems(vllm.INTERFACE, looker(VERSIONS[version])) == []


@pytest.mark.parametrize("version", vllm.TESTED_CPU)
def test_recorded_version_has_the_interface_of_cpus(version):
    assert _interface.problems(vllm.CPU_INTERFACE, looker(VERSIONS[version])) == []


@pytest.mark.parametrize("interface", ["INTERFACE", "CPU_INTERFACE"])
def test_source_has_the_interface(interface):
    tree = tree_of("vllm")
    if tree is None:
        pytest.skip("vLLM is not installed; FASTPEFT_VLLM_SOURCE may name an unpacked wheel or a checkout")
    assert _interface.problems(getattr(vllm, interface), lambda target: present(said(tree, target))) == []


ADD = "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.add_lora_linear"
WORKS = "(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices"


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (f"{WORKS}, *, buffer=None, **kwargs)", True),
        (f"{WORKS}, more=None)", True),
        (f"{WORKS}, more)", False),
        (f"{WORKS}, *, more)", False),
        ("(self, y, x, lora_a_stacked, lora_b_stacked, lora_bias_stacked, scale, output_slices)", False),
        ("(self, x, y, lora_a_stacked, lora_b_stacked, scale, output_slices)", False),
        ("property", False),
    ],
)
def test_a_difference_is_a_problem_and_an_addition_is_not(text, fits):
    found = _interface.problems(vllm.INTERFACE, looker(VERSIONS["0.33.0"] | {ADD: text}))
    assert [ADD in line for line in found] == ([] if fits else [True])


@pytest.mark.parametrize("interface", [vllm.INTERFACE, vllm.CPU_INTERFACE], ids=["CUDA", "CPU"])
def test_each_name_is_missed(interface):
    for target in interface:
        names = {name: text for name, text in VERSIONS["0.32.0"].items() if name != target}
        assert [line.split()[0] for line in _interface.problems(interface, looker(names))] == [target]


class Platform:
    """vLLM's Platform; ``CudaPlatform`` names the wrapper that vLLM builds."""

    def is_cuda(self):
        return False

    def is_cpu(self):
        return False

    @classmethod
    def get_punica_wrapper(cls):
        raise NotImplementedError


class LoRAKernelMeta:
    no_lora_flag_cpu: torch.Tensor


class Base(small_vllm.BaseLinearLayerWithLoRA):
    """Of its own, for the plug-in wraps the methods of the class that it finds."""

    def set_lora(self, index, lora_a, lora_b):
        self.lora_a_stacked[0][index] = 0

    def reset_lora(self, index):
        pass


@pytest.fixture
def engine(monkeypatch):
    """A package called vllm with the names that the plug-in relies on; returns its platform."""

    class CudaPlatform(Platform):
        def is_cuda(self):
            return True

        @classmethod
        def get_punica_wrapper(cls):
            return vllm.REPLACED

    wrapper = types.SimpleNamespace(PunicaWrapperBase=small_vllm.PunicaWrapperGPU)
    contents = {
        "vllm.envs": {"environment_variables": {}},
        "vllm.platforms": {"current_platform": CudaPlatform()},
        "vllm.platforms.interface": {"Platform": Platform},
        "vllm.lora.punica_wrapper.punica_base": vars(wrapper),
        "vllm.lora.punica_wrapper.punica_gpu": {"PunicaWrapperGPU": small_vllm.PunicaWrapperGPU},
        "vllm.lora.punica_wrapper.punica_cpu": {"PunicaWrapperCPU": small_vllm.PunicaWrapperCPU},
        "vllm.lora.ops.triton_ops.lora_kernel_metadata": {"LoRAKernelMeta": LoRAKernelMeta},
        "vllm.lora.layers.base_linear": {"BaseLinearLayerWithLoRA": Base},
    }
    for name, values in contents.items():
        for parent in [name[:i] for i, c in enumerate(name) if c == "."]:
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.setattr(sys.modules["vllm"], "lora", sys.modules["vllm.lora"], raising=False)
    monkeypatch.setattr(vllm, "_wrapper", vllm._wrapper.__wrapped__)  # nothing of this outlives the test
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("FASTPEFT_VLLM", raising=False)
    return CudaPlatform


@pytest.mark.parametrize(
    ("environment", "enabled"),
    [
        ({}, False),
        ({"FASTPEFT_VLLM": "0"}, False),
        ({"FASTPEFT_VLLM": ""}, False),
        ({"VLLM_PLUGINS": "other"}, False),
        ({"VLLM_PLUGINS": "other, fastpeft", "FASTPEFT_VLLM": "0"}, False),
        ({"FASTPEFT_VLLM": "1"}, True),
        ({"FASTPEFT_VLLM": "strict"}, True),
        ({"VLLM_PLUGINS": "other,fastpeft"}, True),
    ],
    ids=str,
)
def test_off_unless_asked_for(engine, monkeypatch, environment, enabled, caplog):
    caplog.set_level(logging.INFO, "vllm.fastpeft")
    before = vars(engine)["get_punica_wrapper"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    vllm.plugin()
    assert (vars(engine)["get_punica_wrapper"] is before) is not enabled
    expected = "fastpeft.integrations.vllm.FastPunicaWrapper" if enabled else vllm.REPLACED
    assert engine.get_punica_wrapper() == expected
    keys = {name: value() for name, value in sys.modules["vllm.envs"].environment_variables.items()}
    assert ("those of experts (MoE) keep vLLM's own kernels" in caplog.text) is enabled
    assert keys == ({"FASTPEFT_VLLM": fastpeft.__version__} if enabled else {}), "what keys vLLM's compiled models"


def test_the_ray_example_asks_for_it(monkeypatch):
    example = yaml.safe_load((ROOT / "examples" / "ray_serve_llm.yaml").read_text())
    (config,) = example["applications"][0]["args"]["llm_configs"]
    for name, value in config["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    assert vllm._setting() == "strict"
    assert config["engine_kwargs"]["enable_lora"] is True


@pytest.mark.parametrize(("group", "package"), [("vllm.general_plugins", "vllm"), ("sglang.srt.plugins", "sglang")])
def test_entry_points_name_the_plugins(group, package):
    line = f'[project.entry-points."{group}"]\nfastpeft = "fastpeft.integrations.{package}:plugin"\n'
    assert line in (ROOT / "pyproject.toml").read_text()
    assert callable(importlib.import_module(f"fastpeft.integrations.{package}").plugin)


def test_an_unknown_setting_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTPEFT_VLLM", "yes")
    with pytest.raises(ValueError, match="FASTPEFT_VLLM is 'yes', expected 0, 1 or strict"):
        vllm.plugin()


def test_vllm_builds_the_wrapper_and_a_second_call_changes_nothing(engine, monkeypatch):
    monkeypatch.setenv("FASTPEFT_VLLM", "1")
    vllm.plugin()
    first = vars(engine)["get_punica_wrapper"]
    vllm.plugin()
    assert vars(engine)["get_punica_wrapper"] is first
    module, _, name = engine.get_punica_wrapper().rpartition(".")
    built = getattr(sys.modules[module], name)(8, 2, "cpu", lora_config=types.SimpleNamespace(max_loras=2))
    assert isinstance(built, small_vllm.PunicaWrapperGPU)
    assert hasattr(Base.set_lora, "fastpeft")
    assert hasattr(Base.reset_lora, "fastpeft")


@pytest.fixture
def cpu_engine(engine, monkeypatch):
    """The same as vLLM's build for CPUs."""
    monkeypatch.setattr(engine, "is_cuda", lambda self: False)
    monkeypatch.setattr(engine, "is_cpu", lambda self: True)
    monkeypatch.setattr(engine, "get_punica_wrapper", classmethod(lambda cls: vllm.REPLACED_CPU))
    return engine


def test_vllm_builds_the_wrapper_of_cpus(cpu_engine, monkeypatch):
    monkeypatch.setenv("FASTPEFT_VLLM", "strict")
    vllm.plugin()
    module, _, name = cpu_engine.get_punica_wrapper().rpartition(".")
    built = getattr(sys.modules[module], name)(8, 2, "cpu", lora_config=types.SimpleNamespace(max_loras=2))
    assert isinstance(built, small_vllm.PunicaWrapperCPU)
    assert not isinstance(built, small_vllm.PunicaWrapperGPU)


def test_a_build_for_cpus_that_differs_is_left_alone(cpu_engine, monkeypatch):
    monkeypatch.setenv("FASTPEFT_VLLM", "strict")
    vllm.plugin()
    monkeypatch.setattr(small_vllm.PunicaWrapperCPU, "add_lora_linear", lambda self, y: None)
    with pytest.raises(RuntimeError, match=r"PunicaWrapperCPU.add_lora_linear is \(self, y\), expected \(self, y, x"):
        cpu_engine.get_punica_wrapper()


def broken(engine, monkeypatch, how):
    if how == "another wrapper":
        monkeypatch.setattr(engine, "get_punica_wrapper", classmethod(lambda cls: "other.Wrapper"))
        return "the platform's wrapper is other.Wrapper"
    if how == "not CUDA":
        monkeypatch.setattr(engine, "is_cuda", lambda self: False)
        return "the platform is CudaPlatform, expected CUDA or CPU"
    if how == "a name is gone":
        monkeypatch.delattr(LoRAKernelMeta, "__annotations__")
        return "LoRAKernelMeta.no_lora_flag_cpu is missing"
    monkeypatch.setattr(Base, "set_lora", lambda self, index, lora_a, lora_b, more: None)
    return "BaseLinearLayerWithLoRA.set_lora is (self, index, lora_a, lora_b, more), expected (self, index, lora_a"


@pytest.mark.parametrize("how", ["another wrapper", "not CUDA", "a name is gone", "another signature"])
@pytest.mark.parametrize("setting", ["1", "strict"])
def test_what_differs_is_said_and_vllm_left_alone(engine, monkeypatch, caplog, setting, how):
    reason = broken(engine, monkeypatch, how)
    own, wrapped = engine.get_punica_wrapper(), vars(Base)["set_lora"]
    monkeypatch.setenv("FASTPEFT_VLLM", setting)
    vllm.plugin()
    if setting == "strict":
        with pytest.raises(RuntimeError) as raised:
            engine.get_punica_wrapper()
        assert reason in str(raised.value)
    else:
        with caplog.at_level(logging.WARNING, "vllm.fastpeft"):
            assert engine.get_punica_wrapper() == own
        assert reason in caplog.text
    assert vars(Base)["set_lora"] is wrapped
    assert sys.modules["vllm.envs"].environment_variables == {}


def test_without_vllm_the_module_imports_and_says_what_is_missing():
    code = """
import os, sys
sys.modules["vllm"] = None
from fastpeft.integrations import vllm
vllm.plugin()
os.environ["FASTPEFT_VLLM"] = "1"
for use in (vllm.plugin, lambda: vllm.FastPunicaWrapper):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = "fastpeft.integrations.vllm: vllm does not import, expected vllm>=0.14"
    assert done.stdout.splitlines() == [line, line]
