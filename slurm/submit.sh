#!/usr/bin/env bash
# Submit a script of this folder with the site's values:
#   bash slurm/submit.sh [--print] [SBATCH FLAGS...] SCRIPT.sbatch [WORDS...]
# Flags given here win over the site's; an array gets the size of its table; --print only shows.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/lib.sh

show=
given=()
while (($#)) && [[ $1 != *.sbatch ]]; do
  if [[ $1 == --print ]]; then show=1; else given+=("$1"); fi
  shift
done
(($#)) || die "usage: bash slurm/submit.sh [--print] [SBATCH FLAGS...] SCRIPT.sbatch [WORDS...]"
script=$1
shift
[[ -e $script ]] || script=slurm/$script
[[ -r $script ]] || die "no script $script; there are $(cd slurm && echo *.sbatch)"
kind=$(basename "$script" .sbatch)

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
if [[ $kind == *_array ]]; then
  table=${1:-}
  [[ -n $table ]] || die "usage: bash slurm/submit.sh $kind.sbatch TABLE.tsv"
  read_tasks "$table"
  option --array "0-$((${#tasks[@]} - 1))${SITE_AT_ONCE:+%$SITE_AT_ONCE}"
  option --output "$SITE_LOGS/slurm/%x-%A_%a.out"
else
  option --output "$SITE_LOGS/slurm/%x-%j.out"
fi
read -r -a more <<<"$SITE_SBATCH_MORE"
command=(sbatch "${options[@]}" "${more[@]}" "${given[@]}" "$script" "$@")
printf '%q ' "${command[@]}" >&2
echo >&2
[[ -z $show ]] || exit 0
# sbatch loses the output of a job whose folder for it does not exist.
mkdir -p "$SITE_LOGS/slurm"
exec "${command[@]}"
