#!/usr/bin/env bash
# Write the table for eval_array.sbatch: every checkpoint on every benchmark; prints its size.
#   bash slurm/eval_tasks.sh WHERE OUTPUT [FLAGS of eval.zeroshot_seg...]
# WHERE: a run (LOGS/NAME: each of its checkpoints), its checkpoints folder, one checkpoint or saved
# model, or MODEL:TAG. OUTPUT takes tasks.tsv and a folder CHECKPOINT/BENCHMARK for each result.
# BENCHMARKS="voc20 ade20k" in the environment takes some; default all of configs/protocols.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
(($# >= 2)) || die "usage: bash slurm/eval_tasks.sh WHERE OUTPUT [FLAGS...]"
where=${1%/} output=${2%/}
shift 2
shopt -s nullglob
checkpoints=()
if [[ -e $where/open_clip_config.json ]]; then
  checkpoints=("$where")
elif [[ -d $where ]]; then
  folder=$where
  [[ ! -d $where/checkpoints ]] || folder=$where/checkpoints
  for one in "$folder"/*/; do
    # A folder that is still being written has another name, or is not sealed yet.
    if [[ ${one%/} =~ /step_[0-9]+$ && -e $one/manifest.json ]]; then checkpoints+=("${one%/}"); fi
  done
  ((${#checkpoints[@]})) || die "no checkpoint step_* in $folder"
elif [[ $where == ?*:?* ]]; then
  checkpoints=("$where")
else
  die "$where is no folder, nor MODEL:TAG"
fi
if [[ -n ${BENCHMARKS:-} ]]; then
  read -r -a names <<<"$BENCHMARKS"
else
  names=(configs/protocols/*.yaml)
  names=("${names[@]##*/}")
  names=("${names[@]%.yaml}")
fi
for word in "${checkpoints[@]}" "$output" "$@"; do
  [[ $word != *[[:space:]]* ]] || die "'$word' holds a blank, which a table cannot carry"
done
for name in "${names[@]}"; do
  [[ -e configs/protocols/$name.yaml || -e $name ]] || die "no benchmark $name in configs/protocols"
done

mkdir -p "$output"
{
  printf '# output\tmodule\tflags\n'
  for one in "${checkpoints[@]}"; do
    if [[ $one == "$where" && $one == *:* ]]; then
      model="--model ${one%%:*} --pretrained ${one#*:}" short=${one//[^A-Za-z0-9_.-]/-}
    else
      model="--model $one" short=${one##*/}
    fi
    for name in "${names[@]}"; do
      benchmark=$(basename "$name" .yaml)
      printf '%s\teval.zeroshot_seg\t--dataset %s %s %s\n' \
        "$output/$short/$benchmark" "$name" "$model" "$*"
    done
  done
} >"$output/tasks.tsv.part"
mv "$output/tasks.tsv.part" "$output/tasks.tsv"
count=$((${#checkpoints[@]} * ${#names[@]}))
echo "$output/tasks.tsv: ${#checkpoints[@]} checkpoints x ${#names[@]} benchmarks;" \
  "next: bash slurm/submit.sh eval_array.sbatch $output/tasks.tsv" >&2
echo "$count"
