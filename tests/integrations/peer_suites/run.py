"""Peers' own tests with our layers in place of theirs: every test must end as it does without, and every call agree.

    python tests/integrations/peer_suites/run.py {peft,adapters} SOURCE [--mode MODE] [-k EXPRESSION] [--tests FILE ...]

SOURCE is a source tree of PEFT (its sdist has the tests) or of https://github.com/adapter-hub/adapters; SOURCE/src is
what is tested. The suite runs as it is, then in each mode: for PEFT ``register`` (every LoraConfig) and ``accelerate``
(after every injection), for adapters ``accelerate`` (after every added adapter). There every fused call, forward and
gradients, is also computed by the library's own layer on the same input, with trained parameters that are not zero, and
the two must differ by no more than rounding can (``comparison.py``). Dropout is off in that comparison. Tests that need
the hub end alike in both.

Exit code 1 if a test ends differently, if a call differs, or if nothing was compared. ``--self-test`` makes our
low-rank term 5 % too large in the comparison alone: then 95 % of the comparisons must notice.
"""

import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTICED = 0.95
PEERS = {
    "peft": (
        "peft_everywhere",
        ("register", "accelerate"),
        [
            "tests/test_custom_models.py",
            "tests/test_initialization.py",
            "tests/test_lora_variants.py",
            "tests/test_tuners_utils.py",
            "tests/test_low_level_api.py",
            "tests/test_mixed.py",
            "tests/test_target_parameters.py",
        ],
        # The test that is left out counts the calls of PEFT's parametrisation, which a fused layer has none of.
        "(lora or Repr or Status or target_parameters) and not multiple_parameters_on_same_module",
    ),
    "adapters": ("adapters_everywhere", ("accelerate",), ["tests/test_methods/test_on_gpt2.py"], ""),
}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("source", type=Path, help="a source tree of the library, with its tests")
    parser.add_argument("--mode", action="append", help="default: all that the peer has")
    parser.add_argument("-k", help="which tests")
    parser.add_argument("-n", default="2", help="xdist workers (default: %(default)s)")
    parser.add_argument("--tests", nargs="+", help="files in the tree")
    parser.add_argument("--self-test", action="store_true", help="with our low-rank term 5 %% too large")
    options = parser.parse_args(arguments)
    plugin, modes, tests, expression = PEERS[options.peer]
    options.plugin, options.tests = plugin, options.tests or tests
    options.k = expression if options.k is None else options.k
    for needed in ("src", *options.tests):
        if not (options.source / needed).exists():
            parser.error(f"{options.source} has no {needed}, expected a source tree of {options.peer}")
    if options.self_test:
        return max([_self_test(mode, options) for mode in options.mode or modes])
    vanilla, _ = suite("vanilla", options)
    print(f"{'vanilla':12}{_counts(vanilla)}", flush=True)
    return max([_against(vanilla, mode, options) for mode in options.mode or modes])


def _against(vanilla: dict[str, str], mode: str, options: argparse.Namespace) -> int:
    outcomes, compared = suite(mode, options)
    different = {test for test in vanilla.keys() | outcomes.keys() if vanilla.get(test) != outcomes.get(test)}
    print(f"{mode:12}{_counts(outcomes)}")
    _print_compared(compared)
    for test in sorted(different):
        print(f"  {test}: {vanilla.get(test)} without our layer, {outcomes.get(test)} with it")
    print(f"  {len(different)} of {len(vanilla)} tests end differently", flush=True)
    return 1 if different or compared["problems"] or not compared["counts"]["compared"] else 0


def _self_test(mode: str, options: argparse.Namespace) -> int:
    _, compared = suite(mode, options, FASTPEFT_SUITE_WRONG="1")
    counts = compared["counts"]
    share = counts["noticed"] / max(counts["compared"], 1)
    print(f"{mode:12}5 % too large: {counts['noticed']} of {counts['compared']} comparisons noticed ({share:.1%})")
    for missed in compared["problems"]:
        print(f"  {missed}")
    return 0 if share >= NOTICED else 1


def _print_compared(compared: dict) -> None:
    for reason, count in compared["counts"].most_common():
        print(f"  {count:8} {reason}")
    print(f"  the largest difference is {compared['worst']:.2g} of its bound")
    for problem in compared["problems"][:20]:
        print(f"  {problem}")


def _counts(outcomes: dict[str, str]) -> str:
    counts = collections.Counter(outcomes.values())
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


def suite(mode: str, options: argparse.Namespace, **variables: str) -> tuple[dict[str, str], dict]:
    """Each test's outcome, and what was compared."""
    source = options.source.resolve()
    path = os.pathsep.join(
        filter(None, [str(source / "src"), str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH")])
    )
    with tempfile.TemporaryDirectory() as out:
        env = dict(
            os.environ, PYTHONPATH=path, FASTPEFT_SUITE=mode, FASTPEFT_SUITE_OUT=out, HF_HUB_OFFLINE="1", **variables
        )
        # Their addopts ask for plugins that we do not need.
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", options.plugin, "--tb=short"]
        command += ["-n", options.n, "-k", options.k, "-W", "ignore", "-p", "no:benchmark", *options.tests]
        # In a copy, as a package: an sdist leaves the tests' __init__.py out.
        shutil.copytree(source / "tests", Path(out, "tree", "tests"))
        Path(out, "tree", "tests", "__init__.py").touch()
        done = subprocess.run(command, cwd=Path(out, "tree"), env=env, check=False, capture_output=True, text=True)
        if done.returncode > 1 or not Path(out, "outcomes.json").exists():
            raise SystemExit(f"{mode}: the suite did not run\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
        outcomes = json.loads(Path(out, "outcomes.json").read_text())
        compared = {"counts": collections.Counter(), "worst": 0.0, "problems": []}
        for part in Path(out).glob("compared-*.json"):
            found = json.loads(part.read_text())
            compared["counts"].update(found["counts"])
            compared["worst"] = max(compared["worst"], found["worst"])
            compared["problems"] += found["problems"]
    return outcomes, compared


if __name__ == "__main__":
    sys.exit(main())
