#!/usr/bin/env bash
# The one command for a CUDA machine without network: install, kernel tests, timings beside torch, within 9 minutes.
#
#   bash benchmarks/gpu.sh OUT [--seconds 540] [--commit HASH] [--device cuda] [--smoke]
#
# OUT gets a few flat files: log.txt, tests.log, junit-*.xml, rows.jsonl (a row the moment it is measured),
# gpu.json (all rows and where they come from), crossover.md (what the `auto` table needs), and suites.json where
# pytest-benchmark is installed. A failing test stops the timings of its kernel. Every part runs under a time
# limit, so a hang or a slow compiler costs its part only.
#   --commit   what to record where the checkout came without its .git
#   --device   cpu runs every line of this script and of gpu.py without a GPU: `--device cpu --smoke`, a minute
#   --smoke    tiny sizes, nothing is installed; failing tests are shown but stop nothing: no kernel is timed
set -uo pipefail

usage() { sed -n '3,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 1 ] || usage
case $1 in -*) usage ;; esac
out=$1; shift
seconds=540 commit='' device=cuda smoke=''
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=$2; shift 2 ;;
    --commit) commit=$2; shift 2 ;;
    --device) device=$2; shift 2 ;;
    --smoke) smoke=--smoke; shift ;;
    *) usage ;;
  esac
done

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit 2
python=${PYTHON:-python3}
left() { echo $((seconds - SECONDS)); }
# within SHARE RESERVE COMMAND...: run it for at most SHARE seconds, and never into the RESERVE kept for later.
within() {
  local limit=$1 rest=$(($(left) - $2)); shift 2
  [ "$limit" -le "$rest" ] || limit=$rest
  [ "$limit" -gt 0 ] || { echo "skipped, no time left: $*"; return 124; }
  timeout -k 5 "$limit" "$@"
}
say() { printf '\n== %4ss  %s\n' "$SECONDS" "$*"; }
exec > >(tee "$out/log.txt") 2>&1
tee_pid=$!

say "install, without dependencies"
if [ -z "$smoke" ] && within 60 $((seconds * 2 / 3)) "$python" -m pip install -q --no-deps --no-build-isolation -e . 2>&1 | tail -n 4 \
    && within 30 $((seconds / 2)) env -C / "$python" -c 'import fastseq'; then
  echo "installed"
else
  echo "not installed (${smoke:-the reason is above}): running from the source folder"
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
fi
within 60 60 "$python" -c "
import torch, fastseq
print('torch', torch.__version__, 'cuda', torch.version.cuda, 'fastseq', fastseq.__version__)
print(torch.cuda.get_device_name() if '$device' == 'cuda' else 'no GPU wanted')
" || { say "nothing can run here"; exit 1; }

has_benchmark=$("$python" -c 'import importlib.util as u; print(int(u.find_spec("pytest_benchmark") is not None))')
test_seconds=180 warm_seconds=90 suite_seconds=30
[ -z "$smoke" ] || { test_seconds=100 warm_seconds=40 suite_seconds=60; }
[ "$has_benchmark" = 1 ] || suite_seconds=0

say "kernel tests, all files at a time: they wait for the compiler, and nothing is timed"
: > "$out/tests.log"
# run_tests NAME ARGUMENTS...: gpu.py reads OUT/tests.log and times no kernel that failed there.
run_tests() {
  local name=$1 part=$out/tests.$1.part code; shift
  echo "#file $name" > "$part"
  # The project's own addopts name an option of pytest-benchmark, which may be absent.
  within "$test_seconds" $((seconds / 4)) "$python" -m pytest "$@" -v --tb=short -p no:cacheprovider \
    -o addopts=--strict-markers -o faulthandler_timeout=60 --junitxml="$out/junit-$name.xml" >> "$part" 2>&1
  code=$?
  printf '\n#code %s\n' "$code" >> "$part"
  echo "$name: exit code $code; $(grep -aE '^=.* (passed|failed|errors?|no tests|deselected)' "$part" | tail -n 1)"
  grep -aE '^(FAILED|ERROR) ' "$part" | tail -n 12
}
shopt -s nullglob
rest=() running=()
for file in tests/test_kernels_*.py; do
  rest+=("--ignore=$file")
  run_tests "$(basename "$file" .py)" "$file" & running+=($!)
done
run_tests marked_gpu tests -m gpu "${rest[@]}" & running+=($!)
wait "${running[@]}"
cat "$out"/tests.*.part >> "$out/tests.log" && rm "$out"/tests.*.part

gpu=("$python" benchmarks/gpu.py "$out" --device "$device" $smoke ${commit:+--commit "$commit"})
say "compile the kernels, many at a time (results are not kept, only the compiler's cache)"
within "$warm_seconds" $((suite_seconds + seconds / 5)) "${gpu[@]}" --warm
[ $? -ne 124 ] || echo "cut short: what is left compiles when it is timed"

say "timings"
# 75: a case hung or broke the device's context; it has its row, and a new process goes on after it.
code=124
while [ "$(left)" -gt $((suite_seconds + 25)) ]; do
  within "$seconds" $((suite_seconds + 10)) "${gpu[@]}" --seconds $(($(left) - suite_seconds - 20))
  code=$?
  [ "$code" -eq 75 ] || break
done
echo "timings: exit code $code"

if [ "$suite_seconds" -gt 0 ]; then
  say "pytest-benchmark suites"
  within "$suite_seconds" 10 "$python" -m pytest benchmarks/test_cells.py -q --on "$device" \
    -p no:cacheprovider -o addopts= --benchmark-max-time=0.1 --benchmark-json="$out/suites.json"
  echo "suites: exit code $?"
else
  say "pytest-benchmark is not installed: gpu.py above timed the same cases"
fi

say "summary"
within 30 0 "${gpu[@]}" --finish
finish=$?
say "done"
[ "$code" -eq 0 ] || [ "$code" -eq 124 ] || finish=1
exec >&- 2>&-
wait "$tee_pid"
exit "$finish"
