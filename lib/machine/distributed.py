"""Several processes ("ranks") that train one model: join, shard or replicate, gather, and fail together."""
import contextlib
import datetime
import errno
import os
import time

import torch
import torch.distributed as dist

from configurator import UserError

# errors that tell about the disk or the network and not about a mistake in this program
OF_THE_MACHINE = {getattr(errno, name) for name in ('ENOSPC', 'EDQUOT', 'EROFS', 'EIO', 'ESTALE', 'ENOTCONN', 'EACCES',
                                                    'EPERM', 'ENOLCK', 'ETIMEDOUT', 'EHOSTDOWN', 'ENODEV', 'EMFILE')
                  if hasattr(errno, name)}


def rank_and_world():
    """Return (number of this process, number of processes), from torchrun's environment variables.

    Raises UserError if the variables are malformed or contradict each other.
    """
    rank, world_size = _env_number('RANK'), _env_number('WORLD_SIZE')
    if rank is None and world_size in (None, 1):
        return 0, 1
    if rank is None or world_size is None:
        have, lack = ('WORLD_SIZE', 'RANK') if rank is None else ('RANK', 'WORLD_SIZE')
        raise UserError(f'the environment has {have}={os.environ[have]} but no {lack}; {_REMEDY}')
    if rank >= world_size:
        raise UserError(f'the environment has RANK={rank} and WORLD_SIZE={world_size}, but ranks count from 0 to '
                        f'WORLD_SIZE - 1; {_REMEDY}')
    local_rank()
    if world_size > 1 and (missing := [n for n in ('LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT') if n not in os.environ]):
        raise UserError(f'the environment has WORLD_SIZE={world_size} but no {", no ".join(missing)}; {_REMEDY}')
    _env_number('MASTER_PORT')
    return rank, world_size


def local_rank():
    """Return the number of this process on its machine, which is the number of its GPU."""
    return _env_number('LOCAL_RANK') or 0


_REMEDY = 'start several processes with torchrun, which sets these variables, or unset them to run one process'


def _env_number(name):
    """Return an environment variable as an integer, None if it is not set; UserError if it is not a number."""
    word = os.environ.get(name)
    if word is None:
        return None
    if not (word.isdecimal() and len(word) < 10):
        raise UserError(f'the environment variable {name} is {word!r}, expected a number from 0; {_REMEDY}')
    return int(word)


def join(settings, device, rank, world_size):
    """Join the process group of `world_size` ranks; settings: backend and dist_timeout."""
    if 'backend' not in settings:
        raise UserError('this script runs in one process: start it with python instead of torchrun')
    backend = settings['backend'] if settings.was_set('backend') else 'nccl'
    limit = datetime.timedelta(seconds=settings['dist_timeout'])
    store, _, _ = next(dist.rendezvous('env://', timeout=limit))
    # After a restart torchrun's store still holds the addresses of the old ranks, so each attempt gets its own keys.
    # On several machines the restart counts may differ, so only a single machine does this.
    if os.environ.get('LOCAL_WORLD_SIZE') == str(world_size):
        store = dist.PrefixStore(f'attempt {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
    backends = f'cpu:gloo,cuda:{backend}' if device.type == 'cuda' else 'gloo'  # gloo reduces the host's numbers
    dist.init_process_group(backends, store=store, rank=rank, world_size=world_size, timeout=limit)


def finish():
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        _let_gloo_finish()
        dist.destroy_process_group()


@contextlib.contextmanager
def report_fatal_errors():
    """Turn out-of-memory and lost-connection errors into one line; with several ranks, errors name the rank.

    When a rank dies or hangs, each survivor prints which ranks do not respond.
    """
    rank, world_size = rank_and_world()
    try:
        yield
    except UserError as error:
        raise UserError(f'rank {rank}: {error.message}' if world_size > 1 else error.message) from error
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        raise UserError(f'{error.filename or "a file"}: {error.strerror}; the last checkpoint is intact: continue with '
                        '--init_from=auto') from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise UserError(f'out of memory ({first_line(error)}). To use less: a smaller --batch_size (with '
                            '--total_batch_tokens to keep the tokens per update), --checkpoint_activations, or '
                            '--parallel=fsdp on several GPUs') from error
        if not is_communication_error(error):
            raise
        silent = ', '.join(map(str, unresponsive_ranks(rank, world_size))) or 'none'
        raise UserError(f'rank {rank}: lost the connection to other ranks ({first_line(error)}); not responding: '
                        f'{silent}. The last checkpoint is intact: continue with --init_from=auto') from error
    finally:
        if dist.is_initialized():
            _let_gloo_finish()


def _let_gloo_finish():
    """Give gloo's threads time to release their tensors, for which they need the GIL.

    Without this, destroying the process group can deadlock (torch 2.13): its destructor holds the GIL and waits for
    those threads.
    """
    time.sleep(0.2)


def first_line(error):
    """Return the first line of an exception's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [''])[0][:200]


def is_communication_error(error):
    """Return whether `error` comes from a collective: a rank died or took longer than dist_timeout."""
    words = ('gloo', 'NCCL', 'Connection closed', 'Connection reset', 'pair closure')
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def unresponsive_ranks(rank, world_size, wait=3.0):
    """Return the ranks that do not also report a lost connection within `wait` seconds."""
    if not dist.is_initialized():
        return ['unknown']
    until = time.monotonic() + wait
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f'looking/{rank}', '')
        while True:
            silent = [r for r in range(world_size) if not store.check([f'looking/{r}'])]
            if not silent or time.monotonic() > until:
                return silent
            time.sleep(0.1)
    except Exception:  # the store ends with torchrun
        return ['unknown']


def shard_or_move(model, runtime, parallel):
    """Move `model` to the device; with parallel='fsdp' and several ranks, each rank keeps a shard of every tensor.

    FSDP2 (pytorch.org/docs, fully_shard) gathers one layer of a ModuleList at a time, when it is needed; in the dtype
    of matrix products, if it has no other parameters or the residual stream is in that dtype, too. Gradients are added
    up in float32.
    """
    if parallel == 'fsdp' and runtime.world_size > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # this import takes two seconds
        mesh = dist.init_device_mesh(runtime.device.type, (runtime.world_size,))
        half = MixedPrecisionPolicy(runtime.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layers in [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]:
            for layer in layers:
                in_half = getattr(model, 'residual_dtype', None) or _only_linear(layer)
                fully_shard(layer, mesh=mesh, **(dict(mp_policy=half) if in_half else {}))
        fully_shard(model, mesh=mesh)
    return model.to(runtime.device)


def _only_linear(layer):
    """Return whether Linear layers have all parameters of `layer`, so that the ranks may send them in their dtype.

    A norm with weights computes in float32. To shard it apart would break a compiled layer into pieces.
    """
    linear = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    return set(layer.parameters()) == {p for m in linear for p in m.parameters()}


def wrap_ddp(model, runtime, parallel, bf16_gradients=False):
    """Return `model` in DistributedDataParallel, which averages gradients; with one rank or FSDP, `model` unchanged.

    bf16_gradients: the ranks send them in bfloat16, and keep the mean in float32.
    """
    if runtime.world_size == 1 or parallel == 'fsdp':
        return model
    ids = [runtime.device.index] if runtime.device.type == 'cuda' else None
    ddp = torch.nn.parallel.DistributedDataParallel
    # buffers are constant tables, equal on all ranks; DDP would send them before every update
    ddp._set_params_and_buffers_to_ignore_for_model(model, [name for name, _ in model.named_buffers()])
    model = ddp(model, device_ids=ids, gradient_as_bucket_view=True)  # without a second copy of the gradients
    if bf16_gradients:
        model.register_comm_hook(None, _average_in_bfloat16)
    return model


def _average_in_bfloat16(group, bucket):
    """torch's hook for DDP, under another name: by its own name DDP refuses it where gradients are not on a GPU."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    return bf16_compress_hook(group, bucket)


def set_grad_sync(model, on):
    """Set whether the next backward pass averages gradients over the ranks; only the last micro-step needs it."""
    model = getattr(model, '_orig_mod', model)  # inside torch.compile's wrapper
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif hasattr(model, 'set_requires_gradient_sync'):  # FSDP keeps whole gradients until then
        model.set_requires_gradient_sync(on)


def full_tensor(tensor):
    """Gather a tensor that FSDP has sharded, on its device; return any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def full_state_dict(value, keep=True):
    """Return `value` with every tensor that FSDP has sharded gathered on the CPU. Every rank must call it.

    value: a tensor, or dicts and lists of tensors, as in a state_dict; or a model, whose tied weights are gathered
    once. keep: False on ranks that only take part in the gathering; they have one whole tensor at a time, and get None
    in place of those tensors.
    """
    if isinstance(value, torch.nn.Module):
        state, first = value.state_dict(), {}
        same = {name: first.setdefault(id(p), name) for name, p in value.named_parameters(remove_duplicate=False)
                if hasattr(p, 'full_tensor')}
        full = full_state_dict({name: t for name, t in state.items() if same.get(name, name) == name}, keep)
        return {name: full[same.get(name, name)] for name in state}
    if isinstance(value, dict):
        return {key: full_state_dict(inner, keep) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(full_state_dict(inner, keep) for inner in value)
    if hasattr(value, 'full_tensor'):
        value = value.full_tensor()
        return value.cpu() if keep else None
    return value


def shard_like(tensor, param):
    """Return this rank's shard of `tensor`, which every rank has in full, sharded as FSDP has sharded `param`.

    If `param` is not sharded or has another shape, return `tensor` unchanged.
    """
    if hasattr(param, 'full_tensor') and tensor.shape == param.shape:
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(tensor.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
    return tensor
