# shellcheck shell=bash
# What the batch scripts share: the site's values, the environment of a node, launching, signals,
# requeueing. Sourced with the checkout as the working directory. Not here: what a task is.

# Older ones take an empty array for a name that is not set.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is too old for these scripts; put 4.4 or newer first on PATH" >&2
  exit 2
fi
site=${LAZYCLIP_SITE:-slurm/site.sh}
if [[ ! -r $site ]]; then
  echo "error: LAZYCLIP_SITE $site cannot be read; give the path of your copy of slurm/site.sh" >&2
  exit 2
fi
# shellcheck source=slurm/site.sh
source "$site"

read -r -a inside <<<"$SITE_CONTAINER"
read -r -a srun_more <<<"$SITE_SRUN_MORE"
# Before a single process. A container that srun makes is not there without srun.
once=("${inside[@]}")
if ((${#srun_more[@]})); then
  once=(srun --nodes 1 --ntasks 1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"}
    "${srun_more[@]}" "${inside[@]}")
fi
child=     # process of the work that runs in the background
asked=     # the signal by which this job was asked to end
passed=    # whether the work has got it
pass_on=   # what the work gets for USR1
tasks=()   # of a table
index=     # of the task in it
line=      # of the table

die() {
  echo "error: $*" >&2
  exit 2
}

# Modules and virtual environment.
activate() {
  local name
  for name in $SITE_MODULES; do
    set +u # the functions of environment modules use names that are not set
    module load "$name"
    set -u
  done
  if [[ -n $SITE_VENV && -d $SITE_VENV/bin ]]; then
    PATH=$(cd "$SITE_VENV/bin" && pwd):$PATH
    export PATH
  fi
}

# flag_value FLAG WORDS...: the last value of a flag, in either spelling; fails where it is absent.
flag_value() {
  local flag=$1 found='' seen=1 word
  shift
  while (($#)); do
    word=$1
    shift
    case $word in
      "$flag") found=${1-} seen=0 ;;
      "$flag"=*) found=${word#*=} seen=0 ;;
    esac
  done
  printf '%s' "$found"
  return "$seen"
}

# has_flag FLAG WORDS...
has_flag() {
  flag_value "$@" >/dev/null
}

# read_tasks TABLE: fills `tasks`; empty lines and lines that start with # do not count.
read_tasks() {
  [[ -r $1 ]] || die "no table $1 in $PWD"
  mapfile -t tasks < <(grep -v -e '^#' -e '^[[:space:]]*$' -- "$1" | tr -d '\r')
  ((${#tasks[@]})) || die "$1 holds no task"
}

# check_columns NUMBER TABLE WHERE LINE: dies unless the line holds so many columns.
check_columns() {
  local columns
  IFS=$'\t' read -r -a columns <<<"$4"
  ((${#columns[@]} >= $1)) ||
    die "$3 of $2 has ${#columns[@]} of the $1 columns it needs at least; separate them by TABs:" \
      "${4//$'\t'/<TAB>}"
}

# task_line TABLE: fills `index` and `line` with the task of this array index.
task_line() {
  read_tasks "$1"
  index=${SLURM_ARRAY_TASK_ID:-}
  [[ -n $index ]] || die "no array index; use sbatch --array=0-$((${#tasks[@]} - 1)), or submit.sh"
  ((index < ${#tasks[@]})) ||
    die "array index $index, and $1 has ${#tasks[@]} tasks; use --array=0-$((${#tasks[@]} - 1))"
  # shellcheck disable=SC2034 # for the script that sources this
  line=${tasks[index]}
}

# take_signals NAME: from here on USR1 means "the time limit is near" and reaches the work as NAME.
# TERM is not passed on: SLURM sends it to every step itself, and a second one a moment later ends
# a training before it has saved.
take_signals() {
  pass_on=$1
  trap on_request USR1
  trap 'asked=${asked:-TERM}' TERM
}

on_request() {
  asked=USR1
  echo "USR1: the time limit is near"
  pass_signal
}

pass_signal() {
  [[ -n $child ]] || return 0
  passed=1
  kill -s "$pass_on" "$child" 2>/dev/null || true
}

# Wait for the work; bash comes back early from each trap. Returns the work's exit code.
wait_for_child() {
  local code=0
  # The signal may have come after the work was started and before its number was known.
  if [[ $asked == USR1 && -z $passed ]]; then pass_signal; fi
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=
  return "$code"
}

# again WHY: put this job back into the queue under its number; the same script begins again. A job
# that is cancelled, or that SLURM puts back itself, is no longer running and is left alone. A
# controller that is away for a moment is asked some times.
again() {
  local state='' tries=6 own=$SLURM_JOB_ID
  # The number of an array's job may mean all of its tasks.
  [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || own=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  until state=$(squeue --noheader --jobs "$own" --format %T); do
    if ((--tries == 0)); then
      echo "error: squeue does not answer, so the job was not put back ($*); submit the same" \
        "command again, or: scontrol requeue $own" >&2
      exit 75
    fi
    sleep 5
  done
  if [[ $state != RUNNING ]]; then
    echo "left to SLURM, which says the job is $state: $*"
    exit 75
  fi
  echo "requeue: $*"
  scontrol requeue "$own" && exit 0
  echo "error: this cluster lets no job requeue itself; submit the same command again" >&2
  exit 75
}

# launch FLAGS...: start training.main on all nodes of the job, in the background.
launch() {
  local hosts master port world cores=()
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  master=${SITE_MASTER:-${hosts[0]}}
  # Jobs that share a node must not meet at one port.
  port=${SITE_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  world=$((SLURM_NNODES * SITE_GPUS_PER_NODE))
  # srun does not inherit the job's cores per task.
  local each=${SLURM_CPUS_PER_TASK:-}
  [[ $SITE_LAUNCH != srun || -z $each ]] || each=$((each / SITE_GPUS_PER_NODE))
  [[ -z $each ]] || cores=(--cpus-per-task "$((each ? each : 1))")
  # One process that ends first is no reason to kill the others while they still save.
  local start=(srun --nodes "$SLURM_NNODES" --kill-on-bad-exit=0 --wait="$SITE_SAVE_SECONDS"
    "${cores[@]}" "${srun_more[@]}")
  case $SITE_LAUNCH in
    torchrun)
      # Else torchrun kills after 30 s what still saves; as a flag older releases refuse it.
      export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SITE_SAVE_SECONDS
      # Without the `--` torchrun takes our --logs for an abbreviation of its own --logs-specs.
      "${start[@]}" --ntasks "$SLURM_NNODES" --ntasks-per-node 1 "${inside[@]}" \
        torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SITE_GPUS_PER_NODE" \
        --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
        --rdzv-backend c10d --rdzv-endpoint "$master:$port" \
        --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" -m -- training.main "$@" &
      ;;
    srun)
      MASTER_ADDR=$master MASTER_PORT=$port \
        "${start[@]}" --ntasks "$world" --ntasks-per-node "$SITE_GPUS_PER_NODE" "${inside[@]}" \
        python -m training.main "$@" &
      ;;
    *) die "SITE_LAUNCH $SITE_LAUNCH is not known; use torchrun or srun" ;;
  esac
  child=$!
}

# decide begin|end WORDS...: ask training.requeue; fills `verdict` and `why`.
decide() {
  local said
  said=$("${once[@]}" python -m training.requeue "$1" --starts "$SITE_STARTS" "${@:2}") ||
    die "training.requeue failed; its line stands above"
  verdict=${said%% *} why=${said#* }
}

# name_of FLAGS...: the training's name.
name_of() {
  local name
  name=$(flag_value --name "$@") || die "give the training a --name: by it the next start finds it"
  [[ -n $name && $name != -* ]] || die "--name has no value; write the training's name behind it"
  printf '%s' "$name"
}

# train_task FLAGS...: one training from wherever it stands to its end, or back into the queue.
train_task() {
  local words=("$@") logs name code=0
  name=$(name_of "$@") || exit 2
  if ! logs=$(flag_value --logs "$@"); then
    logs=$SITE_LOGS
    words+=(--logs "$logs")
  fi
  if has_flag --dry-run "$@"; then
    launch "${words[@]}"
    wait_for_child || exit $?
    exit 0
  fi
  if ! has_flag --resume "$@"; then
    words+=(--resume latest)
  elif ((${SLURM_RESTART_COUNT:-0})) && compgen -G "$logs/$name/checkpoints/step_*/manifest.json" >/dev/null; then
    # This job has begun before: going back to the same named checkpoint each time would never end.
    words+=(--resume latest)
  fi
  decide begin "$logs" "$name" -- "${words[@]}"
  [[ $verdict != refused ]] || die "$name: $why"
  echo "$name: $verdict: $why"
  case $verdict in
    start) ;;
    finished) exit 0 ;;
    stop) exit 1 ;;
    *) die "training.requeue did not answer but said the line above" ;;
  esac
  if [[ -z $asked ]]; then
    launch "${words[@]}"
    wait_for_child || code=$?
  fi
  decide end "$logs" "$name" --code "$code" ${asked:+--asked}
  case $verdict in
    finished) exit 0 ;;
    requeue) again "$name: $why" ;;
    refused) die "$name: $why" ;;
  esac
  echo "$name: $verdict: $why"
  exit $((code ? code : 1))
}
