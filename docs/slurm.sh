#!/bin/bash
# Train on several machines under SLURM: sbatch docs/slurm.sh config/train_gpt2.py
# The job saves and ends two minutes before its time limit and is put back into the queue; --init_from=auto resumes.
#SBATCH --job-name=minutegpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

gpus=${GPUS_PER_NODE:-8}
nodes=${SLURM_NNODES:-1}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Uncomment and name the fast network's interface (ip addr shows them) if the machines do not find each other.
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

srun torchrun --nnodes="$nodes" --nproc_per_node="$gpus" --rdzv_backend=c10d \
    --rdzv_endpoint="$first:${PORT:-29500}" --rdzv_id="${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}" --shutdown-timeout=110 \
    train.py "$@" --init_from=auto
status=$?

# at the time limit: continue from the checkpoint in a new job; other failures, such as a wrong setting, end here
if [ "$status" -ne 0 ] && [ -n "$SLURM_JOB_END_TIME" ] && [ "$(date +%s)" -ge $((SLURM_JOB_END_TIME - 300)) ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
