#!/bin/bash
# One training run on several nodes of a SLURM cluster:  sbatch docs/slurm.sh
# Goes on by itself after the time limit or a preemption, until training is done. See clusters.md.
#SBATCH --job-name=stage1
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8       # one process a GPU: so JAX deals them out under SLURM
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180         # to all tasks, 3 minutes before the end: time for a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=stage1-%j.log

WORKDIR=/shared/runs/stage1       # on a file system that all nodes see, like data and weights
. /shared/venv/bin/activate

# As soon as one task fails, the others are ended too.
srun --kill-on-bad-exit=1 --label \
    python -m paligemma_med.train --config=configs/stage1_slake.py --workdir="$WORKDIR"
status=$?

# 143: stopped by SIGTERM with a checkpoint. The same command resumes from there.
[ "$status" = 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$status"
