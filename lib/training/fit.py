"""Smaller micro-batches where a training run would not fit its GPU, larger ones where a GPU has room for them.

What an update computes stays the same.
"""
import os
import sys

import torch

from lib.machine import device as devices
from lib.machine import distributed
from lib.training import plan

ROOM = 0.5  # fraction of a GPU that a larger micro-batch may fill: the need is an estimate, and a run that fits must
LARGE = 2**31  # logits of a micro-batch from which on torch.compile's kernels count in 64 bits, which is slower


def dtype_of(s):
    """Return the name of the dtype that training will use with Settings `s`, on a device that exists."""
    return s['dtype'] if s.was_set('dtype') else devices.pick_dtype(torch.device(s['device']))[0]


def fit_gpu(s, resumed, source, data):
    """Choose a batch_size that suits the GPUs, in the Settings `s` of train.py, if theirs does not; say so in one line.

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
    if not line and here == n_ranks:
        line = larger_batch(s, job, capacity)
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
    if may_change and not _given(s):
        return f'{found}; with {_use(s, job, best)} an update has the same tokens'
    flags = ' '.join(f'--{name}={value}' for name, value in _new_values(s, job, best).items())
    return f'{found}; for the same tokens per update: {flags}'


def larger_batch(s, job, capacity):
    """Raise batch_size in the Settings `s` of a plan.Job with several micro-batches per rank; return a line on it.

    Each micro-batch casts the weights and adds up their gradients once, so fewer of them take less time. The tokens per
    update stay, and the texts of an evaluation. '' if nothing is changed: if a flag has set batch_size or the number of
    micro-batches, or if a larger batch would need more than ROOM of `capacity` bytes.
    """
    most = 0 if _given(s) else plan.largest_batch(job, 'cuda', ROOM * capacity - plan.CUDA_CONTEXT)
    most = min(most, (LARGE - 1) // (job.config.block_size * job.config.vocab_size))
    per_rank, evaluated = job.sequences // job.gpus, s['eval_iters'] * job.batch_size
    best = max((n for n in range(1, most + 1) if per_rank % n == 0 and evaluated % n == 0), default=0)
    if best <= job.batch_size:
        return ''
    found = f'batch_size={job.batch_size} leaves most of the {plan.size(capacity)} of the GPU free'
    return f'{found}; with {_use(s, job, best)} an update has the same tokens'


def _given(s):
    return s.set_by_flag('batch_size') or s.set_by_flag('gradient_accumulation_steps')


def _new_values(s, job, batch_size):
    """Return the settings that change with batch_size, so that an update and an evaluation read what they did."""
    new = {'batch_size': batch_size, 'eval_iters': -(-s['eval_iters'] * job.batch_size // batch_size)}
    if not s['total_batch_tokens']:
        new['gradient_accumulation_steps'] = job.sequences // batch_size
    return new


def _use(s, job, batch_size):
    """Change the Settings `s` to `batch_size`; return the new values as text."""
    new = _new_values(s, job, batch_size)
    s.update(new)
    return ', '.join(f'{name}={value}' for name, value in new.items())
