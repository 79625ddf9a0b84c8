# shellcheck shell=bash disable=SC2034
# All that differs from site to site. Every script here reads this file, at submission and on the
# nodes; a variable of the same name in the environment wins (SITE_NODES=4 bash slurm/submit.sh ...).
# To keep your own values out of the checkout, copy the file and export LAZYCLIP_SITE=/path/to/copy.

# --- what submit.sh asks sbatch for (an empty value asks for nothing) -----------------------------
SITE_PARTITION=${SITE_PARTITION:-}          # --partition
SITE_ACCOUNT=${SITE_ACCOUNT:-}              # --account
SITE_QOS=${SITE_QOS:-}                      # --qos
SITE_NODES=${SITE_NODES:-1}                 # nodes of one training
SITE_GPUS_PER_NODE=${SITE_GPUS_PER_NODE:-4} # processes of a training on each node
SITE_GRES=${SITE_GRES-gpu:$SITE_GPUS_PER_NODE} # --gres, on each node; such as gpu:a100:4
SITE_CPUS_PER_NODE=${SITE_CPUS_PER_NODE:-32}   # cores of a training on each node
SITE_MEM=${SITE_MEM:-}                      # --mem, on each node
SITE_TIME=${SITE_TIME:-24:00:00}            # --time of one start; a training goes on in the next
SITE_EVAL_GRES=${SITE_EVAL_GRES-gpu:1}      # an evaluation takes one GPU ...
SITE_EVAL_CPUS=${SITE_EVAL_CPUS:-8}
SITE_EVAL_TIME=${SITE_EVAL_TIME:-04:00:00}
SITE_AT_ONCE=${SITE_AT_ONCE:-}              # tasks of an array that run at the same time; empty: all
SITE_SBATCH_MORE=${SITE_SBATCH_MORE:-}      # further words for sbatch, such as "--constraint=a100"

# --- how a node is made ready -----------------------------------------------------------------------
SITE_MODULES=${SITE_MODULES:-}              # names for `module load`
SITE_VENV=${SITE_VENV-.venv}                # its bin/ goes first on PATH where it exists
SITE_CONTAINER=${SITE_CONTAINER:-}          # words before each command: "apptainer exec --nv clip.sif"
SITE_SRUN_MORE=${SITE_SRUN_MORE:-}          # further words for srun: "--container-image=clip.sqsh";
#   srun then starts evaluations and training.requeue too, not only trainings

# --- how a training is started, and when it is given up ---------------------------------------------
SITE_LOGS=${SITE_LOGS:-logs}                # runs, and in slurm/ below it the jobs' own output
SITE_LAUNCH=${SITE_LAUNCH:-${LAUNCH:-torchrun}} # torchrun, or srun for one task of srun per process
SITE_MASTER=${SITE_MASTER:-}                # address of the first node; empty: its name
SITE_PORT=${SITE_PORT:-}                    # of the rendezvous; empty: made from the job's number
SITE_SIGNAL_SECONDS=${SITE_SIGNAL_SECONDS:-300} # before the time limit a training is asked to save
SITE_SAVE_SECONDS=${SITE_SAVE_SECONDS:-240} # so long processes may take to save and end
SITE_STARTS=${SITE_STARTS:-3}               # starts without a new checkpoint after which it is over
SITE_EVAL_STARTS=${SITE_EVAL_STARTS:-10}    # starts of an evaluation that the time limit cuts short

# --- exports that the network or the file system needs ----------------------------------------------
# export NCCL_SOCKET_IFNAME=ib0
