"""kernels/ is fastpeft.kernels however the package is installed, and never what transformers imports as `kernels`.

Everything runs on a copy of the checkout, so that builds leave nothing behind, through the hooks that pip itself calls.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {path.name for path in (ROOT / "kernels").glob("*.py")}

WHICH = """
import fastpeft.kernels.probe, sys
from fastpeft.kernels import probe
assert fastpeft.kernels.probe is probe is sys.modules["fastpeft.kernels.probe"]
assert "kernels" not in sys.modules
print(probe.__file__)
"""


def run(code: str, cwd: Path, *flags: str, **variables: str) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")} | variables
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a build needs, with a kernel file that imports nothing."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("fastpeft", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "kernels" / "probe.py").write_text("")
    return copy


def build(hook: str, checkout: Path, out: Path, settings: dict | None = None) -> Path:
    """What pip calls, without the CUDA kernels: they take their own time and their own test (test_cuda_build.py)."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}, {settings!r}))"
    return out / run(code, checkout, FASTPEFT_NO_CUDA="1").splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build("build_wheel", checkout, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_and_nothing_else(wheel, checkout):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = [*(checkout / "fastpeft").rglob("*.py"), checkout / "fastpeft" / "py.typed"]
    sources = {str(path.relative_to(checkout)) for path in package}
    assert {name for name in names if ".dist-info/" not in name} == sources | {
        f"fastpeft/kernels/{name}" for name in KERNELS | {"probe.py"}
    } | {f"fastpeft/csrc/{path.name}" for path in (checkout / "csrc/host").iterdir()} | {"fastpeft/without_C.txt"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "fastpeft/__init__.py").read_text(), re.M)
    assert f"fastpeft-{version}.dist-info/METADATA" in names


def test_sdist_builds_the_same_wheel(wheel, checkout, tmp_path):
    sdist = build("build_sdist", checkout, tmp_path)
    shutil.unpack_archive(sdist, tmp_path)
    again = build("build_wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    assert (tmp_path / sdist.name.removesuffix(".tar.gz") / "csrc" / "README.md").is_file()
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module", params=["wheel", "editable", "strict editable"])
def site(request, wheel, checkout, tmp_path_factory):
    """A kind of install, and a site-packages folder with it."""
    if request.param != "wheel":
        settings = {"editable_mode": "strict"} if "strict" in request.param else {}
        wheel = build("build_editable", checkout, tmp_path_factory.mktemp("editable"), settings)
    folder = tmp_path_factory.mktemp("site")
    shutil.unpack_archive(wheel, folder, "zip")
    return request.param, folder


def test_an_editable_install_is_a_path_that_type_checkers_follow(site, checkout):
    kind, folder = site
    hooks = [path.name for path in folder.glob("*.py")]
    paths = [line for path in folder.glob("*.pth") for line in path.read_text().splitlines()]
    assert hooks == []
    assert [Path(line) for line in paths if kind == "editable"] == ([checkout] if kind == "editable" else [])
    if kind == "wheel":
        assert (folder / "fastpeft" / "py.typed").is_file()


@pytest.mark.parametrize("root", [False, True], ids=["from /", "from the root"])
def test_kernels_import_installed(site, checkout, root):
    # -S leaves out this environment's own site-packages: the install under test is the only one.
    kind, folder = site
    found = Path(run(f"import site; site.addsitedir({str(folder)!r})" + WHICH, checkout if root else Path("/"), "-S"))
    # From the root the current folder comes first, so there even a wheel's user gets the checkout.
    live = root or "editable" in kind
    assert found.samefile((checkout if live else folder / "fastpeft") / "kernels" / "probe.py")


@pytest.mark.parametrize("root", [False, True], ids=["from /", "from the root"])
def test_kernels_import_uninstalled(checkout, root):
    path = {} if root else {"PYTHONPATH": str(checkout)}
    assert Path(run(WHICH, checkout if root else Path("/"), "-S", **path)) == checkout / "kernels" / "probe.py"


STUB = '''
"""Stands in for the package called `kernels`: decorators that change nothing, and a class for every other name."""
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name.startswith("use_"):
        return lambda *args, **kwargs: lambda decorated: decorated
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
'''

FORWARD = """
import fastpeft, torch, transformers, sys
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available())
config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=1, num_key_value_heads=1)
model = transformers.LlamaForCausalLM(config)
assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 8)
import fastpeft.kernels.probe
print(getattr(sys.modules.get("kernels"), "__file__", None))
"""


@pytest.fixture
def stub(tmp_path):
    """A stub distribution called kernels, of a version that this transformers accepts."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as version

    for path, text in {
        "kernels/__init__.py": STUB,
        f"kernels-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n",
    }.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    return tmp_path


def test_transformers_from_the_root(checkout):
    """Our folder alone is not taken for the package."""
    assert run(FORWARD, checkout).split()[0] == "False"


def test_transformers_from_the_root_with_the_kernels_package(checkout, stub):
    """With the package installed, transformers gets the package and we keep our folder."""
    assert run(FORWARD, checkout, PYTHONPATH=str(stub)).split() == ["True", str(stub / "kernels" / "__init__.py")]


@pytest.mark.thorough
def test_transformers_breaks_if_kernels_has_an_init(checkout, stub, tmp_path):
    """Why kernels/__init__.py is forbidden, and proof that the test above can fail."""
    copy = shutil.copytree(checkout, tmp_path / "copy")
    (copy / "kernels" / "__init__.py").write_text("")
    with pytest.raises(RuntimeError, match="cannot import name"):
        run(FORWARD, copy, PYTHONPATH=str(stub))


def make(*arguments: str) -> subprocess.CompletedProcess:
    """What make would run; nothing is run."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_make_takes_source_trees_of_peers():
    own, given = make("peft-suite").stdout, make("peft-suite", "PEFT=/tmp/peft").stdout
    assert "peer_suites/run.py peft .venv/peft-suite/source\n" in own
    assert "peer_suites/run.py peft /tmp/peft\n" in given
    assert all("--self-test" in text for text in (own, given))
    assert "adapters-suite: ADAPTERS is not given, expected a source tree" in make("adapters-suite").stderr
    assert "peer_suites/run.py adapters /tmp/hub\n" in make("adapters-suite", "ADAPTERS=/tmp/hub").stdout


def test_make_bench_shows_columns_that_one_slow_round_does_not_decide():
    """pytest-benchmark knows every column; a mean or a maximum is not among them."""
    (columns,) = (word for word in make("bench").stdout.split() if word.startswith("--benchmark-columns="))
    assert columns == "--benchmark-columns=min,median,iqr,rounds"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "bench/bench_lora_linear.py", columns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
