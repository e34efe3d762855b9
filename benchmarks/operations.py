"""Count the tensor operations of an update and of a generated token. The counts are the same on every machine.

The scripts themselves run under torch's profiler, twice with different lengths; the difference is that of the
additional updates or tokens, so start-up, evaluations and saving cancel out.
"""
import collections
import os
import runpy
import sys

import torch

# Operations that only describe a tensor anew, allocate or fill one, or read a number from it
NO_WORK = set('''
    _local_scalar_dense _reshape_alias _to_copy _unsafe_view alias as_strided broadcast_tensors chunk clone contiguous
    detach detach_ empty empty_like empty_strided expand expand_as fill_ flatten full full_like is_nonzero item
    lift_fresh mT movedim narrow new_empty new_empty_strided new_full new_zeros numpy_T ones ones_like permute
    positive ravel requires_grad_ reshape resize_ resolve_conj resolve_neg result_type select set_ size slice
    split split_with_sizes squeeze stride t to transpose type_as unbind unflatten unfold unsqueeze view view_as
    zero_ zeros zeros_like
'''.split())
COPIES = {'copy_'}  # counted in addition to the product or sum that they prepare


def by_kind(events):
    """Return a Counter of the operations that do work among the profiler's events, by name.

    A composite operation (linear, mean) is counted as what it calls. Custom operators count like torch's own.
    """
    counts = collections.Counter()
    for event in events:
        namespace, _, name = event.name.rpartition('::')
        if not namespace or namespace.startswith(('autograd', 'c10d')) or name in NO_WORK:
            continue
        if not _calls_work(event):
            counts[name] += 1
    return counts


def _calls_work(event):
    """True if an operation is carried out by others that it calls, other than by copies."""
    for child in event.cpu_children:
        name = child.name.rpartition('::')[2]
        if '::' in child.name and (name not in NO_WORK | COPIES or _calls_work(child)):
            return True
    return False


def profiled(script, argv):
    """Run a script with the arguments `argv` under torch's profiler; returns `by_kind` of its operations."""
    before, sys.argv = sys.argv, [script, *argv]
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            runpy.run_path(script, run_name='__main__')
    finally:
        sys.argv = before
    return by_kind(profile.events())


def per_unit(script, argv, setting, short, long):
    """Return {kind: operations for each unit of `setting`} of a script, largest first.

    setting: what sets the length, such as --max_iters; it is `short` in one run and `long` in another.
    """
    few, many = (profiled(script, [*argv, f'{setting}={n}']) for n in (short, long))
    found = {kind: (many[kind] - few[kind]) / (long - short) for kind in many if many[kind] != few[kind]}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def count(root, training_argv, sampling_argv):
    """Return {quantity: number} of an update of train.py and of a token of sample.py in the folder `root`."""
    sys.path.insert(0, root)
    torch.set_num_threads(1)
    # the code may choose its path by what the processor can do: let every processor be one with bfloat16
    torch.cpu._is_avx512_bf16_supported = lambda: True
    torch.cpu._is_amx_tile_supported = lambda: False
    sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # the scripts' lines
    try:
        update = per_unit(os.path.join(root, 'train.py'), training_argv, '--max_iters', 2, 4)
        token = per_unit(os.path.join(root, 'sample.py'), sampling_argv, '--max_new_tokens', 16, 32)
    finally:
        sys.stdout = sys.__stdout__
    return {'operations per update': sum(update.values()), 'operations per token': sum(token.values()),
            **{f'{kind} per update': n for kind, n in update.items()},
            **{f'{kind} per token': n for kind, n in token.items()}}
