"""Smaller micro-batches where a training run would not fit its GPU; what an update computes stays the same."""
import os
import sys

import torch

from lib.machine import device as devices
from lib.machine import distributed
from lib.training import plan


def dtype_of(s):
    """Return the name of the dtype that training will use with Settings `s`, on a device that exists."""
    return s['dtype'] if s.was_set('dtype') else devices.pick_dtype(torch.device(s['device']))[0]


def fit_gpu(s, resumed, source, data):
    """Choose a batch_size that fits the GPUs, in the Settings `s` of train.py, if theirs does not; say so in one line.

    resumed, source: the checkpoint and the weights that the run begins with, or None; data: its Dataset. Only on CUDA.
    """
    device = torch.device(s['device'])
    if device.type != 'cuda' or s['eval_only']:
        return
    vocab_size = (resumed[1]['model_args'].get('vocab_size') if resumed else source.config().vocab_size if source
                  else None)
    config = plan.config_of({**s, 'init_from': 'scratch'}, data, vocab_size)
    rank, n_ranks = distributed.rank_and_world()
    here = int(os.environ.get('LOCAL_WORLD_SIZE', n_ranks))  # the ranks of this machine
    capacity = devices.gpu_memory(range(here) if n_ranks > 1 else [device.index or 0])
    # ranks of other machines may have other GPUs, and all ranks must choose the same
    job = plan.job_from(s, config, devices.DTYPES[dtype_of(s)], data, n_ranks)
    line = smaller_batch(s, job, capacity, may_change=here == n_ranks)
    if line and rank == 0:
        print(line, file=sys.stderr)


def smaller_batch(s, job, capacity, may_change=True):
    """Lower batch_size in the Settings `s` of a plan.Job that needs more than `capacity` bytes; return a line on it.

    The tokens per update stay, and so do the texts of an evaluation. Nothing is changed, and the line gives the flags,
    where a flag has set batch_size or the number of micro-batches, or unless `may_change`. '' if the run fits.
    """
    budget = plan.USABLE * capacity - plan.CUDA_CONTEXT
    needed = plan.memory(job, 'cuda').total
    if needed <= budget:
        return ''
    best = plan.largest_batch(job, 'cuda', budget)
    found = f'batch_size={job.batch_size} needs about {plan.size(needed)}, the GPU has {plan.size(capacity)}'
    if not best:
        return f'{found}; no batch_size fits: try --checkpoint_activations or --parallel=fsdp'
    new = {'batch_size': best, 'eval_iters': -(-s['eval_iters'] * job.batch_size // best)}
    if not s['total_batch_tokens']:
        new['gradient_accumulation_steps'] = job.sequences // best
    if may_change and not (s.set_by_flag('batch_size') or s.set_by_flag('gradient_accumulation_steps')):
        s.update(new)
        chosen = ', '.join(f'{name}={value}' for name, value in new.items())
        return f'{found}; with {chosen} an update has the same tokens'
    return f'{found}; for the same tokens per update: {" ".join(f"--{name}={value}" for name, value in new.items())}'
