"""PEFT's own tests with our layer in place of theirs: every test must end as it does without.

    python tests/integrations/peft_suite/run.py PATH_TO_PEFT_SOURCE [-k EXPRESSION] [-n WORKERS] [--tests FILE]

PATH_TO_PEFT_SOURCE is a checkout of https://github.com/huggingface/peft; its src/ is what is tested. The suite runs
twice, first as it is, then with ``fastpeft.register`` applied to every LoraConfig. Exit code 1 if any test's outcome
differs, if none ran, or if no call was fused. PEFT's tests need diffusers, datasets and parameterized as well.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a PEFT source tree")
    parser.add_argument("-k", default="MLP-LoraConfig", help="which tests (default: %(default)s)")
    parser.add_argument("-n", default="2", help="xdist workers (default: %(default)s)")
    parser.add_argument(
        "--tests", default="tests/test_custom_models.py", help="file in the tree (default: %(default)s)"
    )
    options = parser.parse_args()
    for needed in ("src/peft/__init__.py", options.tests):
        if not (options.source / needed).exists():
            parser.error(f"{options.source} has no {needed}, expected a PEFT source tree")

    vanilla, _ = suite("vanilla", options)
    fused, calls = suite("fused", options)
    for name, outcomes in (("vanilla", vanilla), ("fused", fused)):
        counts = collections.Counter(outcomes.values())
        print(f"{name:8}" + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    print(f"calls of the layer: {calls.total()}, of which")
    for reason, count in calls.most_common():
        print(f"{count:8} {reason}")
    different = {test for test in vanilla.keys() | fused.keys() if vanilla.get(test) != fused.get(test)}
    for test in sorted(different):
        print(f"{test}: {vanilla.get(test)} without our layer, {fused.get(test)} with it")
    print(f"{len(different)} of {len(vanilla)} tests end differently")
    return 1 if different or not calls["fused"] else 0


def suite(mode: str, options: argparse.Namespace) -> tuple[dict[str, str], collections.Counter]:
    """Each test's outcome, and how often the layer was served by the op or, for which reason, by PEFT."""
    source = options.source.resolve()
    path = os.pathsep.join(map(str, (source / "src", HERE, HERE.parents[2])))
    with tempfile.TemporaryDirectory() as out:
        env = dict(os.environ, PYTHONPATH=path, FASTPEFT_SUITE=mode, FASTPEFT_SUITE_OUT=out, HF_HUB_OFFLINE="1")
        # PEFT's addopts ask for plugins that we do not need.
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "fused_everywhere", "--tb=short"]
        subprocess.run([*command, "-n", options.n, "-k", options.k, options.tests], cwd=source, env=env, check=False)
        outcomes = json.loads(Path(out, "outcomes.json").read_text())
        calls = collections.Counter()
        for part in Path(out).glob("calls-*.json"):
            calls.update(json.loads(part.read_text()))
    return outcomes, calls


if __name__ == "__main__":
    sys.exit(main())
