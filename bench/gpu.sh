#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes and without a network:
#
#     bash bench/gpu.sh OUT_DIR          (default: $OUT, or out/)
#     bash bench/gpu.sh --dry OUT_DIR    the same steps on the CPU, each cut to seconds: proves this script
#
# Installs the package into a throwaway folder, csrc/ included where nvcc is, prints `fastpeft env`, runs the CUDA
# kernels on their smallest grid, checks every op, runs the tests, then memcheck (and synccheck, for csrc/) on small ragged
# shapes, then the benchmarks. A step that fails stops no other; the table printed last names it and the exit
# code is 1. OUT_DIR gets 8 files at most: summary.txt, five logs, rows.jsonl and overhead.png.
#
# Variables: PYTHON (python3); BUILD_PATH, a folder with pybind11 and ninja where Python itself lacks them; STEPS, the names of the steps to run (all); BENCH_ARGS, further arguments of the benchmark;
# FASTPEFT_COMMIT, the commit that rows carry where the checkout came without its history.
set -uo pipefail

dry=
if [[ ${1:-} == --dry ]]; then
    dry=1
    shift
fi
out=${1:-${OUT:-out}}
python=${PYTHON:-python3}
deadline=570 # seconds for all steps together
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
rm -f "$out"/{summary.txt,install.log,env.log,tests.log,sanitizer.log,bench.log,rows.jsonl,overhead.png}

failed=0
note() { # step, result, seconds
    printf '%-10s %-28s %5s s\n' "$1" "$2" "$3" >>"$out/summary.txt"
}

step() { # name, seconds at most, log, command...
    local name=$1 limit=$2 log=$out/$3 start=$SECONDS code
    shift 3
    if [[ " ${STEPS:-$name} " != *" $name "* ]]; then return; fi
    if ((deadline - start < limit)); then limit=$((deadline - start)); fi
    if ((limit < 5)); then
        note "$name" "FAILED: no time left" 0
        failed=1
        return
    fi
    printf -- '--- %s\n' "$name" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    code=$?
    case $code in
    0) note "$name" ok $((SECONDS - start)) ;;
    124 | 137) note "$name" "FAILED: over $limit s" $((SECONDS - start)) ;;
    *) note "$name" "FAILED: exit code $code" $((SECONDS - start)) ;;
    esac
    if ((code)); then
        failed=1
        tail -n 12 "$log"
    fi
}

# The installed package before the checkout, which serves if the installation failed; -P keeps the current folder out of
# the first place, where Python knows it.
export PYTHONPATH=$work/site:$root HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET FASTPEFT_BACKEND
safe=()
"$python" -P -c '' 2>/dev/null && safe=(-P)

if [[ $dry ]]; then
    check=(--help)
    tests=(tests/test_layout.py -k law)
    bench=(--device cpu --quick --shape 128x96 --rows 64 --threads 1)
    serving=(--device cpu --quick --shape 128x96 --tokens 16)
    selective=(--device cpu --quick --case rows --shape 128x96 --rows 64)
    prompts=(--device cpu --quick --gate-only --no-compile)
    bottleneck=(--device cpu --quick --gate-only --no-compile)
    figure=()
else
    check=(--device cuda)
    # What needs no GPU ran elsewhere: the layout, packaging, every configuration compiled, this script.
    tests=(tests -m "gpu or not slow" --maxfail=30)
    for name in layout packaging targets cli demo bench; do tests+=(--ignore "tests/test_$name.py"); done
    bench=(--device cuda --total 150)
    serving=(--device cuda --total 80)
    selective=(--device cuda --total 40 --seconds 8)
    prompts=(--device cuda --total 40)
    bottleneck=(--device cuda --total 50 --seconds 8)
    figure=(--rows 8192)
    "$python" -c 'import xdist' 2>/dev/null && tests+=(-n 8 --dist loadgroup)
fi
read -r -a more <<<"${BENCH_ARGS:-}"

# From a copy, since a build writes into its source folder.
mkdir "$work/source" && cp -r pyproject.toml setup.py README.md LICENSE fastpeft kernels csrc "$work/source"
# A dry run leaves csrc/ out: its build has tests of its own, and takes longer than everything here.
step install 120 install.log env PYTHONPATH="${BUILD_PATH:+$BUILD_PATH:}$PYTHONPATH" FASTPEFT_NO_CUDA="${dry:-0}" \
    "$python" -m pip install --no-index --no-deps --no-build-isolation --target "$work/site" "$work/source"
step env 30 env.log "$python" "${safe[@]}" -m fastpeft.cli env
# A kernel that hangs must cost no more than its own step, so the smallest grid goes first, then ragged ones.
csrc=
if [[ ! $dry ]] && "$python" "${safe[@]}" -c 'from fastpeft import _C; _C.devices()[0] or exit(1)' 2>/dev/null; then
    csrc=1
    linear=(bench/bench_lora_linear.py --device cuda --gate-only --compile no)
    decode=(bench/bench_multi_lora.py --device cuda --gate-only --sites 1 --variant "ours, cuda")
    linear+=(--variant "frozen, csrc" --variant "ours, cuda" --variant "ours, cuda, S inside")
    step csrc 30 env.log "$python" "${decode[@]}" --shape 64x64 --tokens 1
    step csrc 30 env.log "$python" "${decode[@]}" --shape 200x136 --tokens 70 --rank mixed --adapters "half base"
    step csrc 30 env.log "$python" "${linear[@]}" --shape 64x64 --rows 16 --rank 8
    step csrc 40 env.log "$python" "${linear[@]}" --shape 200x136 --shape 1032x520 --rows 300 --rank 24
else
    why=${dry:+dry run}
    why=${why:-fastpeft._C does not load or sees no device}
    note csrc "skipped: $why" 0
fi
step check 90 env.log "$python" "${safe[@]}" -m fastpeft.cli check "${check[@]}"
step tests 150 tests.log "$python" "${safe[@]}" -m pytest -q -p no:cacheprovider "${tests[@]}"

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [[ ! $dry && -x $sanitizer ]]; then
    # Without the caching allocator, so that an access past a tensor is an access past an allocation. API errors are not
    # reported: torch probes the driver and expects some.
    step sanitizer 70 sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool memcheck --error-exitcode 9 --report-api-errors no \
        "$python" bench/bench_lora_linear.py --device cuda --gate-only --compile no --rows 130 --rank 5 \
        --shape 200x136 --shape 136x200+72 --variant ours --variant "ours, base dtype"
    step sanitizer 40 sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool memcheck --error-exitcode 9 --report-api-errors no \
        "$python" bench/bench_multi_lora.py --device cuda --gate-only --shape 200x136 --tokens 70 --variant ours
    for tool in ${csrc:+memcheck synccheck}; do
        step "$tool" 40 sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            "$sanitizer" --tool "$tool" --error-exitcode 9 --report-api-errors no \
            "$python" "${decode[@]}" --shape 200x136 --tokens 20 --rank mixed
        step "$tool" 40 sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            "$sanitizer" --tool "$tool" --error-exitcode 9 --report-api-errors no \
            "$python" "${linear[@]}" --shape 200x136 --rows 130 --rank 8
    done
else
    why=${dry:+dry run}
    why=${why:-no compute-sanitizer}
    note sanitizer "skipped: $why" 0
fi

step bench 200 bench.log "$python" bench/bench_lora_linear.py --out "$out/rows.jsonl" "${bench[@]}" "${more[@]}"
step serving 110 bench.log "$python" bench/bench_multi_lora.py --out "$out/rows.jsonl" "${serving[@]}"
step bottleneck 80 bench.log "$python" bench/bench_bottleneck.py --out "$out/rows.jsonl" "${bottleneck[@]}"
step prompts 70 bench.log "$python" bench/bench_prompt.py --out "$out/rows.jsonl" "${prompts[@]}"
if [[ $csrc ]]; then
    # What the kernels of csrc/ have to beat, at the sizes their estimates are for; decoding in a graph of a whole model.
    compared=(--variant "frozen linear" --variant "frozen, csrc" --variant "addmm form" --variant "ours, base dtype")
    compared+=(--variant "ours, cuda" --variant "ours, cuda, S inside")
    for rows in 4096 8192; do
        step gemm 40 bench.log "$python" bench/bench_lora_linear.py --out "$out/rows.jsonl" --device cuda --compile no \
            --shape "${rows}x$rows" --rows "$rows" --rank 16 --total 30 "${compared[@]}"
    done
    step decode 60 bench.log "$python" bench/bench_multi_lora.py --out "$out/rows.jsonl" --device cuda --sites 128 \
        --shape 4096x4096 --tokens 16 --adapters identical --adapters uniform --adapters distinct --total 50
fi
step selective 70 bench.log "$python" bench/bench_selective.py --out "$out/rows.jsonl" "${selective[@]}"
step plot 30 bench.log "$python" bench/plot.py "$out/rows.jsonl" "$out/overhead.png" "${figure[@]}"

sed -n '/ime over the frozen/,/^---/p' "$out/bench.log" | sed '/^---/d'
cat "$out/summary.txt"
exit $failed
