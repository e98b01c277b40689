#!/usr/bin/env bash
# Runs what `cargo xtask stage` gathered, on a machine with an NVIDIA GPU. docs/gpu-testing.md says more.
#
#   run.sh test | model | sanitize | bench | demo | capi | rust | python | experts | candle | candle_bench | all
#
# ANABRANCH_GOLDEN       folder of golden data (default: what golden.tar.xz beside this script holds)
# ANABRANCH_REQUIRE_GPU  1 (default here): a missing GPU is a failure; 0: tests that need one pass with a note
# ANABRANCH_CASES        cases of each property: 512 in test, 12 in sanitize
# PYTHON                 the interpreter of python and experts, with PyTorch and Transformers (default: python3); candle and
#                        candle_bench take CUDA's libraries from its packages where the machine has none
# RESULTS                where logs and criterion's results go (default: ./results)
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export ANABRANCH_REQUIRE_GPU=${ANABRANCH_REQUIRE_GPU:-1}
export RUST_BACKTRACE=${RUST_BACKTRACE:-1}
results=${RESULTS:-$PWD/results}
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)

# Programs and data are packed, because each program carries every kernel. They are unpacked for one run.
unpacked=$(mktemp -d) || exit 1
trap 'rm -rf "$unpacked"' EXIT

# Unpacks one of the archives beside this script. tar needs xz for that, Python does not.
unpack() {
  tar -C "$unpacked" -xf "$here/$1" 2>/dev/null ||
    "${PYTHON:-python3}" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$here/$1" "$unpacked" || {
    echo "cannot unpack $here/$1 into $unpacked: that takes xz, or Python, and room in TMPDIR" >&2
    return 1
  }
}

unpack programs.tar.xz || exit 1
programs=$unpacked/programs
if [ -z "${ANABRANCH_GOLDEN:-}" ]; then
  unpack golden.tar.xz || exit 1
  ANABRANCH_GOLDEN=$unpacked/golden
fi
export ANABRANCH_GOLDEN

# What libtest, or a program in C, reported in a log: "N passed, N failed". A log without a report is one failure.
summary() {
  awk '/^test result:/ { seen = 1; for (i = 1; i <= NF; i++) { if ($i == "passed;") p += $(i - 1); if ($i == "failed;") f += $(i - 1) } }
       /^[0-9]+ passed, [0-9]+ failed$/ { seen = 1; p += $1; f += $3 }
       END { if (!seen) f = 1; printf "%d passed, %d failed\n", p, f }' "$1"
}

describe() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi here"
  date -u '+%Y-%m-%d %H:%M UTC'
}

run_test() {
  describe | tee "$results/test.log"
  "$programs/gpu-tests" --include-ignored --test-threads 1 "$@" 2>&1 | tee -a "$results/test.log"
  local status=${PIPESTATUS[0]}
  summary "$results/test.log"
  return "$status"
}

# Whole models: the tests, with what they measured, and the command-line tool on a checkpoint and on random weights.
run_model() {
  local log=$results/model.log status=0
  describe | tee "$log"
  "$programs/model-tests" --include-ignored --test-threads 1 --show-output "$@" 2>&1 | tee -a "$log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
  summary "$log"
  generate --model "$ANABRANCH_GOLDEN/models/qwen3-moe" --max-new-tokens 16 || status=1
  generate --random-weights deepseek-moe-16b --max-new-tokens 128 || status=1
  return "$status"
}

generate() {
  echo "\$ anabranch generate $*"
  if "$programs/anabranch" generate --device cuda --prompt "The river" --stats "$@" 2>&1 | tee -a "$results/model.log"; then
    echo "1 passed, 0 failed"
  else
    echo "0 passed, 1 failed"
    return 1
  fi
}

run_sanitize() {
  local sanitizer
  sanitizer=$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer) || {
    echo "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin: install CUDA's sanitizer package"
    echo "0 passed, 1 failed"
    return 1
  }
  local passed=0 failed=0 tool
  export ANABRANCH_CASES=${ANABRANCH_CASES:-12}
  for tool in memcheck racecheck synccheck initcheck; do
    # A million tokens under instrumentation take minutes and show nothing that a thousand do not; failures are made on purpose.
    sanitized "$tool" --tool "$tool" "$programs/gpu-tests" --include-ignored --test-threads 1 --skip a_million --skip failures:: "$@"
  done
  # The C library's calls from several threads. What it asks CUDA about memory that is not a GPU's, it asks on purpose.
  [ $# -gt 0 ] || sanitized memcheck_capi --tool memcheck --report-api-errors no "$programs/capi/contracts"
  echo "$passed passed, $failed failed"
  [ "$failed" -eq 0 ]
}

# One run under the sanitizer, by the name of its log, counted in run_sanitize's variables.
sanitized() {
  local log=$results/$1.log
  if "$sanitizer" --error-exitcode 99 --print-limit 20 "${@:2}" >"$log" 2>&1; then
    passed=$((passed + 1))
    echo "$1: $(summary "$log"); $(grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$log" | tail -n 1)"
  else
    failed=$((failed + 1))
    echo "$1 FAILED; the end of $log:"
    tail -n 40 "$log"
  fi
}

run_bench() {
  describe | tee "$results/bench.log"
  CRITERION_HOME=$results/criterion "$programs/gpu-benches" --bench "$@" 2>&1 | tee -a "$results/bench.log"
  local status=${PIPESTATUS[0]}
  # One line a point: name, median time, bytes a second. What criterion says of a change since the last run is left out.
  awk 'function median(  parts) { match($0, /\[.*\]/); split(substr($0, RSTART + 1, RLENGTH - 2), parts, " "); return parts[3] " " parts[4] }
       /^Benchmarking/ { next }
       /change:/ { change = 2 }
       /(time|thrpt): / && change > 0 { change--; next }
       /time: / { name = $1 == "time:" ? last : $1; time = median() }
       /thrpt: / { printf "%-28s %12s %16s\n", name, time, median() }
       { last = $1 }' "$results/bench.log" | tee "$results/bench.txt"
  [ "$status" -eq 0 ] && [ -s "$results/bench.txt" ]
}

run_demo() {
  describe
  local tool=$programs/anabranch
  if "$tool" doctor && "$tool" generate --model "$ANABRANCH_GOLDEN/models/qwen3-moe" \
    --prompt "The river" --max-new-tokens 16; then
    echo "1 passed, 0 failed"
  else
    echo "0 passed, 1 failed"
    return 1
  fi
}

# The C library: its contracts, then the example.
run_capi() {
  describe | tee "$results/capi.log"
  local passed=0 failed=0 program
  for program in contracts moe_layer; do
    if "$programs/capi/$program" 2>&1 | tee -a "$results/capi.log"; then
      passed=$((passed + 1))
    else
      failed=$((failed + 1))
    fi
  done
  echo "$passed passed, $failed failed"
  [ "$failed" -eq 0 ]
}

# An engine in Rust with its own stream and memory.
run_rust() {
  describe | tee "$results/rust.log"
  "$programs/embed_stream" 2>&1 | tee -a "$results/rust.log"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] && echo "1 passed, 0 failed" || echo "0 passed, 1 failed"
  return "$status"
}

with_python() {
  ANABRANCH_LIBRARY=$programs/lib/libanabranch.so.1 ANABRANCH_HEADER=$here/include/anabranch.h \
    PYTHONPATH=$here/python:$here/python/tests PYTHONDONTWRITEBYTECODE=1 "${PYTHON:-python3}" "$@"
}

# The Python package: its tests, those that need PyTorch or Transformers skipped where that is missing.
run_python() {
  describe | tee "$results/python.log"
  local modules=("$@")
  [ ${#modules[@]} -gt 0 ] || modules=(test_library test_torch test_transformers)
  with_python -m unittest -v "${modules[@]}" 2>&1 | tee -a "$results/python.log"
  local status=${PIPESTATUS[0]}
  awk '/^Ran [0-9]+ test/ { ran = $2 } /^(OK|FAILED)/ { n = split($0, parts, /[(,)]/); for (i = 1; i <= n; i++) if (split(parts[i], pair, "=") == 2) count[pair[1]] += pair[2]; seen = 1 }
       { gsub(/ /, "", $0) } END { f = count["failures"] + count["errors"] + count[" errors"]; s = count["skipped"] + count[" skipped"]
       if (!seen) f = 1; printf "%d passed, %d failed, %d skipped\n", ran - f - s, f, s }' "$results/python.log"
  return "$status"
}

# Transformers' experts: anabranch beside its own backends.
run_experts() {
  describe | tee "$results/experts.log"
  with_python "$here/python/bench_experts.py" --json "$results/experts.json" "$@" 2>&1 | tee -a "$results/experts.log"
  return "${PIPESTATUS[0]}"
}

# A program of crates/candle. They link CUDA's libraries: where those are not installed, PyTorch's are taken.
with_candle() {
  local program=$unpacked/candle/$1 libraries
  [ -x "$program" ] || unpack candle.tar.xz || return 1
  libraries=$("${PYTHON:-python3}" -c 'import glob, sys; print(":".join(sum((glob.glob(p + "/nvidia/*/lib") for p in sys.path if p), [])))')
  libraries=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries
  if LD_LIBRARY_PATH=$libraries ldd "$program" | grep 'not found'; then
    echo "$1 links these: they are the driver's (libcuda) and CUDA 13's cuBLAS, cuRAND, NVRTC and runtime, which PyTorch brings too (PYTHON)"
    return 1
  fi
  LD_LIBRARY_PATH=$libraries "$program" "${@:2}"
}

# The layer on candle's tensors: beside candle's own, then in candle's Qwen3-MoE.
run_candle() {
  describe | tee "$results/candle.log"
  with_candle tests --include-ignored --test-threads 1 "$@" 2>&1 | tee -a "$results/candle.log"
  local status=${PIPESTATUS[0]}
  summary "$results/candle.log"
  if with_candle qwen3_moe 2>&1 | tee -a "$results/candle.log"; then
    echo "1 passed, 0 failed"
  else
    echo "0 passed, 1 failed"
    status=1
  fi
  return "$status"
}

run_candle_bench() {
  describe | tee "$results/candle_bench.log"
  with_candle bench_moe "$@" 2>&1 | tee -a "$results/candle_bench.log"
  return "${PIPESTATUS[0]}"
}

case ${1:-} in
  test | model | sanitize | bench | demo | capi | rust | python | experts | candle | candle_bench)
    command=$1
    shift
    "run_$command" "$@"
    ;;
  all)
    worst=0
    for command in test model sanitize bench demo capi rust python candle; do
      echo "== $command"
      "run_$command" || worst=1
    done
    exit "$worst"
    ;;
  *)
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
