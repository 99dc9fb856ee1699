"""The emulated GPU itself: each kind of operation once, and programs in which it must find the fault."""

import pytest

from tests.cuda.emulator import build

pytestmark = [
    pytest.mark.skipif(build.missing() is not None, reason=f"nothing to emulate with: {build.missing()}"),
    pytest.mark.thorough,
]


@pytest.mark.parametrize("sanitizer", [(), ("-g", "-O1", "-fsanitize=thread")], ids=["plain", "tsan"])
def test_smoke(tmp_path, sanitizer):
    done = build.run(build.build(build.HERE / "smoke.cpp", tmp_path / "smoke", *sanitizer))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
