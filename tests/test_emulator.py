"""The emulated GPU itself: each kind of operation once, and programs in which it must find the fault."""

import subprocess

import pytest
from emulator import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"nothing to emulate with: {build.missing()}")


@pytest.mark.parametrize("sanitizer", [(), ("-g", "-O1", "-fsanitize=thread")], ids=["plain", "tsan"])
def test_smoke(tmp_path, sanitizer):
    program = build.build(build.HERE / "smoke.cpp", tmp_path / "smoke", *sanitizer)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
