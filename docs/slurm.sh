#!/usr/bin/env bash
# Train on 2 machines of 8 GPUs until the recipe is done, across time limits and preemptions.
# sbatch docs/slurm.sh
#SBATCH --job-name=bkd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500
export BKD_CACHE=$PWD/cache OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK   # on a file system that all machines see

# One process per GPU and no launcher between: the signal, 300 s before the time limit, goes to the processes themselves.
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec bkd train sd15/sd-small data.shards=latents train.mixed_precision=bf16 -o runs/sd-small'
code=$?
# 75: stopped on request with everything saved.
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
