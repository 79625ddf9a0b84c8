#!/usr/bin/env bash
# Submit a script of this folder with the site's values:
#   bash slurm/submit.sh [--print] [SBATCH FLAGS...] SCRIPT.sbatch [WORDS...]
# Flags given here win over the site's; an array gets the size of its table, and a copy of it, which
# nobody changes while the array waits; --print only shows.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/lib.sh

usage="usage: bash slurm/submit.sh [--print] [SBATCH FLAGS...] SCRIPT.sbatch [WORDS...]"
show=
given=()
while (($#)) && [[ $1 != *.sbatch ]]; do
  case $1 in
    --help | -h)
      echo "$usage"
      echo "scripts and their words (docs/slurm.md):"
      echo "  train.sbatch FLAGS...                     one training; flags of training.main"
      echo "  finetune_array.sbatch TABLE.tsv FLAGS...  one training for each line of the table"
      echo "  eval_array.sbatch TABLE.tsv               one evaluation for each line of the table"
      exit 0
      ;;
    --print) show=1 ;;
    *) given+=("$1") ;;
  esac
  shift
done
(($#)) || die "$usage"
script=$1
shift
[[ -e $script ]] || script=slurm/$script
[[ -r $script ]] || die "no script $script; there are $(cd slurm && echo *.sbatch)"
kind=$(basename "$script" .sbatch)
[[ $kind != train ]] || name_of "$@" >/dev/null || exit 2
if [[ -z $show ]]; then
  type -P sbatch >/dev/null ||
    die "there is no sbatch on PATH; submit from a login node of the cluster, or add --print"
fi

options=()
option() {
  if [[ -n $2 ]]; then options+=("$1=$2"); fi
}
option --partition "$SITE_PARTITION"
option --account "$SITE_ACCOUNT"
option --qos "$SITE_QOS"
option --mem "$SITE_MEM"
if [[ $kind == eval_array ]]; then
  option --gres "$SITE_EVAL_GRES"
  option --cpus-per-task "$SITE_EVAL_CPUS"
  option --time "$SITE_EVAL_TIME"
else
  option --nodes "$SITE_NODES"
  option --gres "$SITE_GRES"
  option --cpus-per-task "$SITE_CPUS_PER_NODE"
  option --time "$SITE_TIME"
  option --signal "B:USR1@$SITE_SIGNAL_SECONDS"
fi
table=
copy=
if [[ $kind == *_array ]]; then
  table=${1:-}
  [[ -n $table ]] || die "usage: bash slurm/submit.sh $kind.sbatch TABLE.tsv"
  shift
  read_tasks "$table"
  least=2
  [[ $kind != finetune_array ]] || least=4
  for number in "${!tasks[@]}"; do
    check_columns "$least" "$table" "task $number" "${tasks[number]}"
  done
  # A table of the same content may have the same copy.
  read -r sum _ < <(cksum <"$table")
  copy=$SITE_LOGS/slurm/$(basename "$table" .tsv)-$sum.tsv
  option --array "0-$((${#tasks[@]} - 1))${SITE_AT_ONCE:+%$SITE_AT_ONCE}"
  option --output "$SITE_LOGS/slurm/%x-%A_%a.out"
else
  option --output "$SITE_LOGS/slurm/%x-%j.out"
fi
read -r -a more <<<"$SITE_SBATCH_MORE"
command=(sbatch "${options[@]}" "${more[@]}" "${given[@]}" "$script" ${copy:+"$copy"} "$@")
[[ -z $copy ]] || printf 'cp %q %q\n' "$table" "$copy" >&2
printf '%q ' "${command[@]}" >&2
echo >&2
[[ -z $show ]] || exit 0
# sbatch loses the output of a job whose folder for it does not exist.
mkdir -p "$SITE_LOGS/slurm" || die "SITE_LOGS $SITE_LOGS takes no folder; give another one"
if [[ -n $copy ]] && ! cmp -s "$table" "$copy"; then
  cp "$table" "$copy.$$"
  mv "$copy.$$" "$copy"
fi
exec "${command[@]}"
