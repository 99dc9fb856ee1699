"""The SGLang plug-in: what it relies on against released versions, and what it adds to SGLang."""

import argparse
import subprocess
import sys
import types

import pytest

from fastpeft.integrations import _interface, sglang
from tests.support import small_sglang
from tests.support.engine_source import looker, present, recorded, said, tree_of

VERSIONS = recorded("sglang")


def test_recorded_versions_are_the_tested_ones():
    assert tuple(VERSIONS) == sglang.TESTED


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_version_has_the_interface(version):
    assert _interface.problems(sglang.INTERFACE, looker(VERSIONS[version])) == []


def test_source_has_the_interface():
    tree = tree_of("sglang")
    if tree is None:
        pytest.skip("SGLang is not installed; FASTPEFT_SGLANG_SOURCE may name an unpacked wheel or a checkout")
    assert _interface.problems(sglang.INTERFACE, lambda target: present(said(tree, target))) == []


@pytest.mark.parametrize("target", sglang.INTERFACE)
def test_each_name_is_missed(target):
    names = {name: text for name, text in VERSIONS["0.5.23"].items() if name != target}
    assert [line.split()[0] for line in _interface.problems(sglang.INTERFACE, looker(names))] == [target]


def test_stand_ins_are_like_sglang():
    """What the arithmetic is tested on has the signatures that SGLang has."""
    own = {
        name: target
        for target in sglang.INTERFACE
        if (name := target.rpartition(".")[2]) and target.split(":")[1].startswith(("ChunkedSgmv", "LoRAMemoryPool"))
    }
    assert len(own) == 8
    for name, target in own.items():
        owner = getattr(small_sglang, target.split(":")[1].split(".")[0])
        assert _interface.problems({f"{small_sglang.__name__}:{owner.__name__}.{name}": sglang.INTERFACE[target]}) == []


@pytest.fixture
def engine(monkeypatch):
    """A package called sglang with a registry and arguments; returns the registry and the arguments' class."""
    registry = {"csgmv": None}

    def register_lora_backend(name):
        return lambda create: registry.__setitem__(name, create)

    class ServerArgs:
        @staticmethod
        def add_cli_args(parser):
            parser.add_argument("--lora-backend", choices=["triton", "csgmv"], default="csgmv")

    contents = {
        "sglang.srt.lora.backend.lora_registry": {"register_lora_backend": register_lora_backend},
        "sglang.srt.server_args": {"ServerArgs": ServerArgs},
    }
    for name, values in contents.items():
        for i, c in enumerate(name):
            if c == ".":
                monkeypatch.setitem(sys.modules, name[:i], sys.modules.get(name[:i], types.ModuleType(name[:i])))
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return registry, ServerArgs


def test_the_plugin_adds_a_backend_and_a_choice(engine):
    registry, arguments = engine
    sglang.plugin()
    first = arguments.add_cli_args
    sglang.plugin()
    assert arguments.add_cli_args is first
    assert registry == {"csgmv": None, "fastpeft": sglang.create_backend}
    parser = argparse.ArgumentParser()
    arguments.add_cli_args(parser)
    assert parser.parse_args(["--lora-backend", "fastpeft"]).lora_backend == "fastpeft"
    assert parser.parse_args([]).lora_backend == "csgmv", "installed is not chosen"
    with pytest.raises(SystemExit):
        parser.parse_args(["--lora-backend", "another"])


def test_choosing_it_where_sglang_differs_is_an_error(engine):
    """This SGLang has a registry and nothing else."""
    sglang.plugin()
    with pytest.raises(RuntimeError, match="choose another --lora-backend: .*forward_with_base is missing"):
        engine[0]["fastpeft"]()


def test_without_sglang_the_module_imports_and_says_what_is_missing():
    code = """
import sys
sys.modules["sglang"] = None
from fastpeft.integrations import sglang
try:
    sglang.plugin()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "fastpeft.integrations.sglang: sglang does not import, expected sglang>=0.5.23\n"
