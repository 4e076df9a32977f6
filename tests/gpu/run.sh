#!/usr/bin/env bash
# All GPU tests in parallel processes on one GPU (most of their time is compilation on the CPU).
#   tests/gpu/run.sh [SECONDS_A_PROCESS] [FOLDER_OF_LOGS]
# Prints a line for each process, then what failed. Exit status 1 if any process failed or ran out of time.
set -uo pipefail
cd "$(dirname "$0")/../.."
limit=${1:-300} logs=${2:-$(mktemp -d)}
mkdir -p "$logs"
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2
pids=()
run() {
  local name=$1 status; shift
  timeout "$limit" python3 -m pytest -p no:cacheprovider -q --tb=short --show-capture=no -W ignore "$@" > "$logs/$name.txt" 2>&1
  status=$?
  echo "$name: exit $status, $(tail -n 1 "$logs/$name.txt" | cut -c 1-120)"
  # 5: nothing to run here, a package is missing.
  [ $status -eq 5 ] || return $status
}
start() { run "$@" & pids+=($!); }

sets=tests/gpu/test_sets.py
for family in "mamba or samba or phi" falcon_h1 granite nemotron "bamba or jamba or (tiny and not granite)" "lfm or olmo" \
  "qwen or gemma" "kimi or ling" "zamba or zaya" "minimax or xlstm or rwkv"; do
  start "sets ${family%% *}" $sets -k "($family) and not compiled"
done
for family in "falcon_h1 or samba or phi" "granite or bamba or tiny" "nemotron or jamba" "mamba and not bamba and not samba" \
  "lfm or olmo or qwen or gemma or minimax or xlstm or rwkv" "kimi or ling" "zamba or zaya"; do
  start "compiled ${family%% *}" $sets -k "compiled and ($family)"
done
ops=tests/gpu/test_mamba2_ops.py conv=tests/gpu/test_triton_conv.py fla=tests/gpu/test_fla_parts.py
walks=tests/gpu/test_fla_scans.py mamba3=tests/gpu/test_mamba3.py
start "ops scan" $ops -k "triton and test_scan"
start "ops core" $ops -k "triton and test_core"
start "ops rest" $ops -k "triton and not (test_scan or test_core)"
start "ops mamba_ssm" $ops -k mamba_ssm
start "conv shapes" $conv -k test_any_shape
start "conv rest" $conv -k "not test_any_shape"
for rule in gated kimi; do
  start "fla $rule bfloat16" $fla -k "$rule and test_scan and bfloat16"
  start "fla $rule rest" $fla -k "$rule and not (test_scan and bfloat16)"
done
start "fla conv" $fla -k "not gated and not kimi"
for scan in rg_lru wkv4; do start "walks $scan" $walks -k "$scan"; done
start "walks rest" $walks -k "not rg_lru and not wkv4"
start "mamba3 layers" $mamba3 -k test_layer
start "mamba3 models" $mamba3 -k "test_a_model or training_step"
start "mamba3 rest" $mamba3 -k "not test_layer and not test_a_model and not training_step"
for file in tests/gpu/test_*.py; do
  case $file in $sets | $ops | $conv | $fla | $walks | $mamba3) ;; *) start "$(basename "$file" .py)" "$file" ;; esac
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
grep -hE '^(FAILED|ERROR)' "$logs"/*.txt | cut -c 1-200 | sort -u
exit $failed
