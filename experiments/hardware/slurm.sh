#!/usr/bin/env bash
# A stage on a SLURM cluster, from the repository's folder; adapt the #SBATCH lines to yours:
#
#   sbatch experiments/hardware/slurm.sh exo2ego_7b stage1
#   sbatch --dependency=afterok:<job> experiments/hardware/slurm.sh exo2ego_7b stage2
#
# Before the time limit or a preemption, SLURM sends SIGUSR1 (or SIGTERM): the stage saves a checkpoint and exits with
# status 75, and the job is requeued and resumes from that step; trainer.max_time does the same. Any other status ends
# the job: a stage that is complete, or that could not save a checkpoint. It is also requeued when a node fails.
#SBATCH --job-name=exo2ego
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=14
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm_%x_%j.txt
set -u
experiment=$1 stage=$2
shift 2

srun --kill-on-bad-exit=1 .venv/bin/python -m lightning_modules fit "experiments/$experiment" "$stage" \
  "trainer.num_nodes=${SLURM_JOB_NUM_NODES:-1}" "trainer.devices=${SLURM_NTASKS_PER_NODE:-1}" "$@"
status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
