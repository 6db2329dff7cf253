#!/usr/bin/env bash
# What is worth knowing of bdbench on a GPU, in ten minutes, the most valuable first.
#
#   benchmarks/gpu.sh                             one GPU; CIFAR-10 is downloaded if it is not in the cache
#   benchmarks/gpu.sh --data DIR                  DIR/cifar10 holds CIFAR-10 as Parquet shards
#   SECONDS_IN_ALL=280 benchmarks/gpu.sh ...      another limit for all of it (default 580)
#   DEVICE=cpu TINY=1 benchmarks/gpu.sh ...       a rehearsal: every step as short as it can be, in some minutes
#
# Needs bdbench and its dependencies in the Python that PYTHON names (default: python).
#
# 1. methods      every defense and every attack once, on the digits              methods.csv
# 2. speed-*      training, captured steps, several runs at once, stacked seeds   speed-GROUP.json
# 3. paper-*      CIFAR-10, BadNets, the papers' budgets: none, CBD, ABL, MCLDef  paper-METHOD/cifar10-paper.csv
# 4. dbd          DBD's self-supervision on ResNet-18, two of its epochs          dbd.json
# 5. attacks      the other attacks on CIFAR-10, undefended                       attacks/attacks.csv
#
# Each step has its own time limit, log (NAME.log) and result, in the folder $OUT (default: benchmarks/results/gpu).
# A step that fails or runs out of time stops none of the others. The same command goes on: steps that are done are left
# out, trainings go on from their last checkpoint. $OUT/steps.txt says how each step ended. Artifacts lie in $RUNS
# (default: runs/gpu): keep that folder between two calls, and copy back $OUT only.
set -u
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda}; TINY=${TINY:-}; OUT=${OUT:-benchmarks/results/gpu}; RUNS=${RUNS:-runs/gpu}
PYTHON=${PYTHON:-python}; SECONDS_IN_ALL=${SECONDS_IN_ALL:-580}; DATA=()
while [ $# -gt 0 ]; do
  case $1 in
    --data) DATA=(--data-root "$2"); shift 2 ;;
    *) sed -n '2,7p' "$0"; exit 2 ;;
  esac
done
mkdir -p "$OUT" "$RUNS"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
SHORT=${TINY:+--rehearsal}

left() { echo $((SECONDS_IN_ALL - SECONDS)); }

# step NAME LIMIT COMMAND...: run a command for LIMIT seconds at most, unless it is done already
step() {
  local name=$1 limit=$2 begun=$SECONDS code; shift 2
  if [ -e "$OUT/$name.done" ]; then return 0; fi
  if [ "$(left)" -lt 10 ]; then echo "$name: no time left" | tee -a "$OUT/steps.txt"; return 0; fi
  if [ "$limit" -gt "$(left)" ]; then limit=$(left); fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1
  code=$?
  if [ $code -eq 0 ] && ! grep -q "time is up" "$OUT/$name.log"; then touch "$OUT/$name.done"; fi
  echo "$name: exit code $code after $((SECONDS - begun)) of $limit s: $(tail -n 1 "$OUT/$name.log" | cut -c 1-160)" |
    tee -a "$OUT/steps.txt"
}

# limit FULL TINY: the limit of a step
limit() { if [ -n "$TINY" ]; then echo "$2"; else echo "$1"; fi; }

# 1. Every method once.
step methods "$(limit 120 150)" "$PYTHON" benchmarks/methods.py --device "$DEVICE" --runs "$RUNS/methods" --out "$OUT/methods.csv" $SHORT

# 2. Speed, one group of rows a step: one that hangs takes no other with it.
speed() {
  step "speed-$1" "$(limit "$2" 150)" "$PYTHON" benchmarks/speed.py --device "$DEVICE" ${SHORT:---quick} --seconds 20 \
    --only "$1" --json "$OUT/speed-$1.json"
}
speed train-wrn-16-1 40
speed train-compiled 110
speed jobs 60
speed stacked 45

# 3. The papers' budgets: all at once on one device, each with its own table; MCLDef mends the model of `none`.
BADNETS="$RUNS/cifar10-badnets-s0"
step poison "$(limit 60 200)" "$PYTHON" -m bdbench poison --dataset cifar10 "${DATA[@]}" --attack badnets --rate 0.1 --target 0 \
  --seed 0 --out "$BADNETS" --device "$DEVICE"
cell() {
  step "paper-$1" "$2" "$PYTHON" benchmarks/reproduce.py cifar10-paper "${DATA[@]}" --device "$DEVICE" --runs "$RUNS" \
    --results "$OUT/paper-$1" --only "cifar10-badnets-s0-paper-$1" --seconds "$(($2 - 20))"
}
budget=$(limit $(($(left) - 90)) 60)
if [ "$budget" -gt 30 ]; then
  for method in none cbd abl; do cell "$method" "$budget" & done
  wait
  if [ -e "$OUT/paper-none.done" ]; then cell mcldef "$(limit 60 60)"; fi
fi

# 4. How long DBD's longest phase takes.
EPOCHS=(--ssl-epochs 2 --head-epochs 1 --steps-per-epoch 16 --epochs 1)
FEW=(${TINY:+--ssl-batch-size 64})
if [ -z "$TINY" ]; then
  step dbd 60 "$PYTHON" -m bdbench defend "$BADNETS" --method dbd --model resnet-18 --preset paper "${EPOCHS[@]}" \
    --device "$DEVICE" --out "$RUNS/dbd-ssl" --json
else
  step dbd 150 "$PYTHON" -m bdbench defend "$RUNS/methods/badnets-defended" --method dbd --model convnet --preset paper \
    "${EPOCHS[@]}" "${FEW[@]}" --device "$DEVICE" --out "$RUNS/dbd-ssl" --json
fi
speed dbd-views 30
"$PYTHON" - "$RUNS/dbd-ssl" > "$OUT/dbd.json" 2> /dev/null << 'END' || true
import sys
from pathlib import Path
from bdbench.artifacts.model import ModelArtifact
print(ModelArtifact.open(Path(sys.argv[1])).history.to_json(orient="records", indent=1))
END

# 5. The other attacks, as many as there is time for.
rest=$(limit $(($(left) - 5)) 60)
if [ "$rest" -gt 30 ]; then
  step attacks "$rest" "$PYTHON" benchmarks/reproduce.py attacks "${DATA[@]}" --device "$DEVICE" --runs "$RUNS" \
    --results "$OUT/attacks" --seconds "$((rest - 20))"
fi
cat "$OUT/steps.txt"
