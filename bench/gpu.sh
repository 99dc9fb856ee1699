#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes and without a network:
#
#     bash bench/gpu.sh OUT_DIR          (default: $OUT, or out/)
#     bash bench/gpu.sh --dry OUT_DIR    the same steps on the CPU, each cut to seconds: proves this script
#     bash bench/gpu.sh --quick OUT_DIR  likewise on the GPU
#
# The steps, in order:
#     install     the package into a throwaway folder, csrc/ included where nvcc is
#     env         fastpeft env
#     csrc        the CUDA kernels on their smallest grid, then on ragged ones
#     sanitizer   memcheck, synccheck and racecheck of csrc/ on small ragged shapes; after the tests, memcheck of the rest
#     check       every op against float64
#     tests       those that run on the device
#     bench serving bottleneck prompts experts mlp dora quantised gemm decode selective    the benchmarks; gemm and decode are of csrc/
#     plot        the picture of lora_linear's rows
#
# A step that fails stops no other. At the end come the ratios of all rows, then the table of steps; the exit code is 1
# if one failed. The proofs end at half of the time, those of csrc/ at half of that, so that slow ones leave the others
# theirs, and each benchmark has its share of what is left. On a machine where csrc/ never ran, begin with
# STEPS="install env csrc sanitizer", which then have all the time of the proofs, and run the other steps in a second
# call. OUT_DIR gets 8 files at most: summary.txt, five logs, rows.jsonl and
# overhead.png; earlier ones of these names are removed.
#
# Variables: PYTHON (python3); BUILD_PATH, a folder with setuptools, pybind11 and ninja where Python itself lacks them;
# STEPS, the names of the steps to run (all); BENCH_ARGS, further arguments of the step bench; FASTPEFT_COMMIT, the
# commit that rows carry where the checkout came without its history.
set -uo pipefail

dry='' quick=''
case ${1:-} in
--dry) dry=1 quick=1 && shift ;;
--quick) quick=1 && shift ;;
esac
out=${1:-${OUT:-out}}
python=${PYTHON:-python3}
# Seconds by which the proofs of csrc/, all proofs and the last step are over; then 30 s at most for the ratios.
first_proofs=150 proofs=290 end=550
names="install env csrc sanitizer check tests bench serving bottleneck prompts experts mlp dora quantised gemm decode selective plot"
for name in ${STEPS:-}; do
    if [[ " $names " != *" $name "* ]]; then
        echo "gpu.sh: STEPS names $name, expected some of: $names" >&2
        exit 2
    fi
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2
work=$(mktemp -d || mktemp -d -p "$out") && trap 'rm -rf "$work"' EXIT || exit 2
rm -f "$out"/{summary.txt,install.log,env.log,tests.log,sanitizer.log,bench.log,rows.jsonl,overhead.png}

failed=0
note() { # step, result, seconds
    printf '%-10s %-28s %5s s\n' "$1" "$2" "$3" >>"$out/summary.txt"
}

asked() { # step: whether it is to run
    [[ " ${STEPS:-$1} " == *" $1 "* ]]
}

# SIGINT, so that pytest names what failed until then and a benchmark prints the rows it has; a shell that runs this in
# the background has it ignored.
interruptible=()
env --default-signal=INT true 2>/dev/null && interruptible=(env --default-signal=INT)

step() { # name, seconds at most, log, command...
    local name=$1 limit=$2 log=$out/$3 start=$SECONDS code
    shift 3
    asked "$name" || return 0
    if ((deadline - start < limit)); then limit=$((deadline - start)); fi
    if ((limit < 5)); then
        note "$name" "FAILED: no time left" 0
        failed=1
        return 1
    fi
    printf -- '--- %s\n' "$name" | tee -a "$log"
    "${interruptible[@]}" timeout --signal=INT --kill-after=8 "$limit" "$@" >>"$log" 2>&1 </dev/null
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
    return $code
}

# Shares of the time, as far as a step is to run.
races="bench:6 serving:4 bottleneck:2 prompts:2 experts:2 mlp:2 dora:2 quantised:2 gemm:2 decode:2 selective:2"
race() { # name, seconds at most, script, arguments...: a benchmark, which begins no case after 3/4 of its share
    local name=$1 most=$2 script=$3 pair mine=1 sum=0 seconds
    shift 3
    for pair in $races; do
        if [[ ${pair%:*} == "$name" ]]; then mine=${pair#*:} sum=0; fi
        if asked "${pair%:*}"; then sum=$((sum + ${pair#*:})); fi
    done
    seconds=$(((deadline - SECONDS) * mine / (sum ? sum : 1)))
    seconds=$((seconds < most ? seconds : most))
    step "$name" $((seconds * 5 / 4)) bench.log "$python" "${safe[@]}" -m "bench.$script" --out "$out/rows.jsonl" \
        --total $((seconds * 3 / 4)) "$@"
}

# The installed package before the checkout, which serves if the installation failed; -P keeps the current folder out of
# the first place, where Python knows it.
export PYTHONPATH=$work/site:$root HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET FASTPEFT_BACKEND
[[ -w ${HOME:-} ]] || export HOME=$work # Triton and matplotlib keep what they compile and find there
safe=()
"$python" -P -c '' 2>/dev/null && safe=(-P)
deadline=$proofs
if asked check || asked tests; then deadline=$first_proofs; fi

if [[ ! $dry ]] && ! timeout 120 "$python" -c 'import torch; torch.zeros(1, device="cuda").item()'; then
    echo "gpu.sh: $python has no torch that can use a GPU; nothing was run" >&2
    exit 2
fi
if [[ $quick ]]; then
    device=cuda
    [[ $dry ]] && device=cpu
    check=(--help)
    tests=(tests/tools/test_layout.py -k law)
    bench=(--device $device --quick --shape 128x96 --rows 64 --threads 1)
    serving=(--device $device --quick --shape 128x96 --tokens 16)
    selective=(--device $device --quick --case rows --case tokens --shape 128x96 --rows 64)
    prompts=(--device $device --quick --gate-only --no-compile)
    bottleneck=(--device $device --quick --gate-only --no-compile)
    experts=(--device $device --quick --shape 8x64x64 --tokens 64)
    mlp=(--device $device --quick --shape 64x96 --rows 64 --compile no)
    dora=(--device $device --quick --shape 128x96 --rows 64 --compile no)
    quantised=(--device $device --quick --shape 128x96 --rows 64 --compile no)
    figure=()
else
    check=(--device cuda)
    # What needs no GPU ran elsewhere, so only files that choose a device run here.
    tests=(-m "gpu or not slow" --maxfail=30)
    for file in $(grep -lE '\bDEVICE\b|\bbackends\b|cuda\.is_available' -r tests --include=test_*.py); do
        [[ $file =~ tools/|/test_(build|sass) ]] || tests+=("$file")
    done
    bench=(--device cuda --seconds 8)
    serving=(--device cuda --seconds 8)
    selective=(--device cuda --seconds 8)
    prompts=(--device cuda --seconds 8)
    bottleneck=(--device cuda --seconds 8)
    experts=(--device cuda --seconds 8)
    mlp=(--device cuda --seconds 8)
    dora=(--device cuda --seconds 8)
    quantised=(--device cuda --seconds 8)
    figure=(--rows 8192)
    "$python" -c 'import xdist' 2>/dev/null && tests+=(-n 8 --dist loadgroup)
fi
read -r -a more <<<"${BENCH_ARGS:-}"
wanted="triton peft transformers bitsandbytes adapters vllm sglang matplotlib"
# shellcheck disable=SC2086 # a name each
absent=$("$python" -c 'import importlib.util as i, sys
print(*(m for m in sys.argv[1:] if not i.find_spec(m)))' $wanted)
note peers "absent: ${absent:-none}" 0

# From a copy, since a build writes into its source folder. By setup.py alone: pip may be absent, and setuptools before 77
# cannot read our pyproject.toml. A quick run leaves csrc/ out: its build has tests of its own, and takes longer than
# everything here.
mkdir "$work/source" && cp -r setup.py fastpeft kernels csrc "$work/source"
step install 120 install.log env --chdir="$work/source" PYTHONPATH="${BUILD_PATH:-}" FASTPEFT_NO_CUDA="${quick:-0}" \
    "$python" setup.py -q build --build-lib "$work/site"
[[ $quick ]] || step host 120 install.log "$python" "${safe[@]}" -m fastpeft.cli build
step env 60 env.log "$python" "${safe[@]}" -m fastpeft.cli env
# A kernel that hangs must cost no more than its own step, so the smallest grid goes first, then ragged ones.
csrc=
sees='from fastpeft import _C; _C.devices()[0] or exit(1)'
if [[ ! $dry ]] && timeout 60 "$python" "${safe[@]}" -c "$sees" 2>/dev/null; then
    csrc=1
    linear=(-m bench.bench_lora_linear --device cuda --gate-only --compile no)
    decode=(-m bench.bench_multi_lora --device cuda --gate-only --sites 1 --variant "ours, cuda")
    linear+=(--variant "frozen, csrc" --variant "ours, cuda" --variant "ours, cuda, S inside")
    first() { # command...: csrc/ is taken out once it hangs, since every step after this would hang too
        [[ $csrc ]] || return 0
        step csrc 45 env.log "$python" "${safe[@]}" "$@"
        case $? in 124 | 137)
            rm -f "$work"/site/fastpeft/_C*
            csrc=
            note csrc "taken out: it hung" 0
            ;;
        esac
    }
    first "${decode[@]}" --shape 64x64 --tokens 1
    first "${decode[@]}" --shape 200x136 --tokens 70 --rank mixed --adapters "half base"
    first "${linear[@]}" --shape 64x64 --rows 16 --rank 8
    first "${linear[@]}" --shape 200x136 --shape 1032x520 --rows 300 --rank 24
else
    why=${dry:+dry run}
    why=${why:-fastpeft._C does not load or sees no device}
    note csrc "skipped: $why" 0
fi
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
# Without the caching allocator, so that an access past a tensor is an access past an allocation. API errors are not
# reported: torch probes the driver and expects some.
guard() { # tool, seconds at most, arguments of python...
    local tool=$1 limit=$2
    shift 2
    step sanitizer "$limit" sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool "$tool" --error-exitcode 9 --report-api-errors no "$python" "${safe[@]}" "$@"
}
if [[ $dry || ! -x $sanitizer ]]; then
    why=${dry:+dry run}
    note sanitizer "skipped: ${why:-no compute-sanitizer}" 0
    sanitizer=
fi
if [[ $sanitizer ]]; then
    for tool in ${csrc:+memcheck synccheck racecheck}; do
        guard "$tool" 40 "${decode[@]}" --shape 200x136 --tokens 20 --rank mixed
        guard "$tool" 40 "${linear[@]}" --shape 200x136 --rows 130 --rank 8
    done
fi

deadline=$proofs
step check 90 env.log "$python" "${safe[@]}" -m fastpeft.cli check "${check[@]}"
step tests 130 tests.log "$python" "${safe[@]}" -m pytest -q -p no:cacheprovider "${tests[@]}"
if [[ $sanitizer ]]; then
    guard memcheck 70 -m bench.bench_lora_linear --device cuda --gate-only --compile no --rows 130 --rank 5 \
        --shape 200x136 --shape 136x200+72 --variant ours --variant "ours, base dtype"
    guard memcheck 40 -m bench.bench_multi_lora --device cuda --gate-only --shape 200x136 --tokens 70 --variant ours
fi

deadline=$end
if [[ ! $csrc ]]; then races=${races/gemm:2 decode:2 /}; fi
if [[ " $absent " == *" bitsandbytes "* ]]; then races=${races/quantised:2 /}; fi
race bench 170 bench_lora_linear "${bench[@]}" "${more[@]}"
race serving 90 bench_multi_lora "${serving[@]}"
race bottleneck 70 bench_bottleneck "${bottleneck[@]}"
race prompts 60 bench_prompt "${prompts[@]}"
race experts 60 bench_experts "${experts[@]}"
race mlp 60 bench_mlp "${mlp[@]}"
race dora 60 bench_dora "${dora[@]}"
if [[ " $absent " == *" bitsandbytes "* ]]; then
    note quantised "skipped: no bitsandbytes" 0
else
    race quantised 60 bench_quantised "${quantised[@]}"
fi
if [[ $csrc ]]; then
    # What the kernels of csrc/ have to beat, at the sizes their estimates are for; decoding in a graph of a whole
    # model.
    compared=(--variant "frozen linear" --variant "frozen, csrc" --variant "addmm form" --variant "ours, base dtype")
    compared+=(--variant "ours, cuda" --variant "ours, cuda, S inside")
    for rows in 4096 8192; do
        race gemm 30 bench_lora_linear --device cuda --compile no --shape "${rows}x$rows" --rows "$rows" \
            --rank 16 "${compared[@]}"
    done
    # PEFT decides on the host in every call, and is in the step serving: a model of its layers takes longer to make
    # than all else to time.
    served=()
    for name in "frozen linear" ours "ours, cuda" "ours, cuda, reading ahead" "gather + bmm" grouped_mm \
        "vLLM's kernels" "SGLang's kernels"; do
        served+=(--variant "$name")
    done
    race decode 50 bench_multi_lora --device cuda --sites 128 --shape 4096x4096 --tokens 16 \
        --adapters identical --adapters uniform --adapters distinct "${served[@]}"
fi
race selective 60 bench_selective "${selective[@]}"
if [[ " $absent " == *" matplotlib "* ]]; then
    note plot "skipped: no matplotlib" 0
else
    step plot 30 bench.log "$python" "${safe[@]}" -m bench.plot "$out/rows.jsonl" "$out/overhead.png" "${figure[@]}"
fi

# Not from the benchmarks' own words, which one that was stopped may not have said.
[[ -f $out/rows.jsonl ]] && timeout 30 "$python" "${safe[@]}" -m bench.report "$out/rows.jsonl"
printf '\n'
cat "$out/summary.txt"
exit $failed
