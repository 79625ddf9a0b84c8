"""A checkout with stand-ins for the cluster's commands. Not here: what is run in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")
# training.requeue is the real one, but for the flags behind `--`: reading them imports torch. Every
# other command is written down and ends as the test says.
PYTHON = f'''
if [[ $2 == training.requeue ]]; then
  printf "%s|" "$@" >> requeue.txt
  if [[ $3 == begin && -n $STUB_REFUSED ]]; then echo "refused $STUB_REFUSED"; exit; fi
  words=()
  for word in "$@"; do [[ $word != -- ]] || break; words+=("$word"); done
  exec "{sys.executable}" "${{words[@]}}"
fi
printf "%s|" "$@" >> calls.txt; exit "${{STUB_CODE:-0}}"'''


def stub(folder: Path, name: str, body: str) -> None:
    """Write a stand-in for a command."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


def make_checkout(folder: Path) -> Path:
    """Make a folder that looks like a checkout, with stand-ins for the cluster's commands."""
    for name in ("slurm", "configs", "training"):
        (folder / name).symlink_to(ROOT / name)
    stub(folder / "bin", "python", PYTHON)
    stub(folder / "bin", "scontrol", 'if [[ $1 == show ]]; then printf "n1\\nn2\\n"; '
         'else echo "$@" >> scontrol.txt; fi')  # fmt: skip
    stub(folder / "bin", "squeue", 'echo "$@" >> squeue.txt; echo "${STUB_STATE:-RUNNING}"')
    stub(folder / "bin", "srun", 'if [[ " $* " == *" training.requeue "* ]]; then\n'
         '  while [[ $1 != python ]]; do shift; done; exec "$@"; fi\n'
         'printf "%s\\n" "$@" > srun.txt; env > env.txt\n'
         'if [[ -e left.json ]]; then mkdir -p logs/a; cp left.json logs/a/status.json; fi\n'
         'exit "${STUB_CODE:-0}"')  # fmt: skip
    stub(folder / "bin", "sbatch", 'printf "%s\\n" "$@"')
    stub(folder / "bin", "sleep", 'echo "$@" >> sleep.txt')
    return folder


def run_script(
    script: str, words: list[str], folder: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of slurm/ as a job of two nodes, started elsewhere than in the checkout."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SITE", "LAZY"))
    }
    env = {
        **kept,
        "PATH": f"{folder / 'bin'}:{kept['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "17",
        **env,
    }
    # Started elsewhere, as SLURM runs a copy of the script from its own spool folder.
    return subprocess.run(
        [str(BASH), str(ROOT / "slurm" / script), *words],
        cwd="/", env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
