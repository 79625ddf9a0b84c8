#!/usr/bin/env bash
# Write the table for eval_array.sbatch: every checkpoint on every benchmark; prints its size.
#   bash slurm/eval_tasks.sh [--cls SHARDS --classes FILE] WHERE OUTPUT [FLAGS of eval.zeroshot_seg...]
# WHERE: a run (LOGS/NAME: each of its checkpoints), its checkpoints folder, one checkpoint or saved
# model, MODEL:TAG or hf-hub:OWNER/MODEL. OUTPUT takes tasks.tsv and a folder CHECKPOINT/BENCHMARK
# for each result. BENCHMARKS="voc20 ade20k" in the environment takes some; default all of
# configs/protocols. With --cls each checkpoint is scored by eval.zeroshot_cls too.
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is too old for these scripts; put 4.4 or newer first on PATH" >&2
  exit 2
fi

die() {
  echo "error: $*" >&2
  exit 2
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
shards='' classes=''
while (($# >= 2)); do
  case $1 in
    --cls) shards=$2 ;;
    --classes) classes=$2 ;;
    *) break ;;
  esac
  shift 2
done
[[ ${shards:+1} == "${classes:+1}" ]] || die "--cls and --classes belong together; give both"
(($# >= 2)) && [[ $1 != -* ]] ||
  die "usage: bash slurm/eval_tasks.sh [--cls SHARDS --classes FILE] WHERE OUTPUT [FLAGS...]"
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
  die "$where is no folder, nor MODEL:TAG, nor hf-hub:OWNER/MODEL"
fi
if [[ -n ${BENCHMARKS:-} ]]; then
  read -r -a names <<<"$BENCHMARKS"
else
  names=(configs/protocols/*.yaml)
  names=("${names[@]##*/}")
  names=("${names[@]%.yaml}")
fi
for word in "${checkpoints[@]}" "$output" "$shards" "$classes" "$@"; do
  [[ $word != *[[:space:]]* ]] || die "'$word' holds a blank, which a table cannot carry"
done
for name in "${names[@]}"; do
  [[ -e configs/protocols/$name.yaml || -e $name ]] || die "no benchmark $name in configs/protocols"
done

mkdir -p "$output"
{
  printf '# output\tmodule\tflags\n'
  for one in "${checkpoints[@]}"; do
    model="--model $one" short=${one##*/}
    if [[ ! -d $one ]]; then
      short=${one//[^A-Za-z0-9_.-]/-}
      # The colon of hf-hub:OWNER/MODEL is part of the model's name.
      [[ $one == hf-hub:* ]] || model="--model ${one%%:*} --pretrained ${one#*:}"
    fi
    for name in "${names[@]}"; do
      benchmark=$(basename "$name" .yaml)
      printf '%s\teval.zeroshot_seg\t--dataset %s %s %s\n' \
        "$output/$short/$benchmark" "$name" "$model" "$*"
    done
    [[ -z $shards ]] || printf '%s\teval.zeroshot_cls\t--val-data %s --classes %s %s\n' \
      "$output/$short/cls" "$shards" "$classes" "$model"
  done
} >"$output/tasks.tsv.part"
mv "$output/tasks.tsv.part" "$output/tasks.tsv"
each=$((${#names[@]} + (${#shards} > 0)))
count=$((${#checkpoints[@]} * each))
echo "$output/tasks.tsv: ${#checkpoints[@]} checkpoints x $each benchmarks;" \
  "next: bash slurm/submit.sh eval_array.sbatch $output/tasks.tsv" >&2
echo "$count"
