"""One process: where it computes, how it starts, and its clock. Nothing here is about GPT."""
import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configurator import UserError
from lib.machine import distributed
from lib.machine.cpus import usable_cpus
from lib.machine.device import DTYPES, pick_dtype


@dataclass
class Runtime:
    """Where and how this process computes. `dtype` is the dtype of matrix products."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    description: str  # one phrase for the banner: how device, dtype and compile were chosen
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    interrupted: Callable = bool  # returns whether a signal asks this rank to end

    @property
    def is_master(self):
        return self.rank == 0

    def synchronize(self):
        """Wait for the device, so that a timer read afterwards is accurate."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        elif self.device.type == 'mps':
            torch.mps.synchronize()

    def to_device(self, *tensors):
        """Return CPU tensors moved to the device; on CUDA from pinned memory, without waiting."""
        if self.device.type == 'cuda':
            return tuple(t.contiguous().pin_memory().to(self.device, non_blocking=True) for t in tensors)
        return tuple(t.to(self.device) for t in tensors)

    def all_reduce_max(self, *numbers):
        """Return the maximum of each number over all ranks. Ranks agree in this way on a clock, signal or failure."""
        return self._all_reduce(numbers, dist.ReduceOp.MAX)

    def all_reduce_sum(self, *numbers):
        """Return the sum of each number over all ranks."""
        return self._all_reduce(numbers, dist.ReduceOp.SUM)

    def _all_reduce(self, numbers, op):
        if self.world_size == 1:
            return numbers
        reduced = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(reduced, op=op)
        return tuple(reduced.tolist())

    def pad_to_longest_rank(self, batches):
        """Yield this rank's batches, then None until every rank has run out.

        Under FSDP all ranks must run the same number of forward passes. Ends early when `interrupted`.
        """
        batches = iter(batches)
        while True:
            batch = None if self.interrupted() else next(batches, None)
            if not self.all_reduce_max(batch is not None)[0]:
                return
            yield batch

    def assert_same_on_all_ranks(self, what, value):
        """Raise UserError if `value` differs between ranks: then `what` is not on storage that they share."""
        if self.world_size == 1:
            return
        everyone = [None] * self.world_size
        dist.all_gather_object(everyone, value)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise UserError(f'{what} differs: rank 0 has {everyone[0]}, rank {rank} has {other}; every machine '
                                'must see the same files')

    def rng_states(self):
        """Return the random states of all ranks for a checkpoint: one dict of ByteTensors per rank.

        Every rank must call it.
        """
        mine = {'cpu': torch.get_rng_state()}
        if self.device.type == 'cuda':
            mine['cuda'] = torch.cuda.get_rng_state(self.device)
        if self.device.type == 'mps':
            mine['mps'] = torch.mps.get_rng_state()
        if self.world_size == 1:
            return [mine]
        everyone = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def set_rng_state(self, states):
        """Restore this rank's random state from a checkpoint's list; return whether all that is needed was there."""
        mine = states[self.rank] if states and self.rank < len(states) else {}
        if 'cpu' in mine:
            torch.set_rng_state(mine['cpu'])
        if 'cuda' in mine and self.device.type == 'cuda':
            torch.cuda.set_rng_state(mine['cuda'], self.device)
        if 'mps' in mine and self.device.type == 'mps':
            torch.mps.set_rng_state(mine['mps'])
        return {'cpu', self.device.type} <= mine.keys() and len(states) == self.world_size


def _age():
    """Return for how many seconds this process has been running, or 0.0 if the system does not say."""
    try:
        with open('/proc/self/stat', encoding='utf-8') as f:
            started = int(f.read().rsplit(')', 1)[1].split()[19])  # ticks after the machine started
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf('SC_CLK_TCK')
        return age if 0 <= age < 600 else 0.0  # some containers count from another machine's start
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


_STARTED = time.monotonic() - _age()  # when the process began, imports included; no change of the date affects it


def minutes_running():
    """Return the minutes since this process began. Setting the date, or sleep of the machine, does not change them."""
    return (time.monotonic() - _STARTED) / 60


def tune_malloc():
    """Make glibc keep freed memory in the process, so that the next step does not page it in again.

    Page faults cost 20% of a training step on a CPU. The price: the process never shrinks.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has other options
        libc = ctypes.CDLL('libc.so.6')
        for option, value in ((-3, 1 << 30), (-1, -1), (-2, 64 << 20)):  # M_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD
            libc.mallopt(option, value)


def threads_are_given():
    """True if the environment says how many threads to use."""
    return bool({'OMP_NUM_THREADS', 'MKL_NUM_THREADS'} & os.environ.keys())


def limit_threads():
    """Let torch use no more threads than the process may use CPUs; OMP_NUM_THREADS and MKL_NUM_THREADS win."""
    if not threads_are_given() and usable_cpus() < torch.get_num_threads():
        torch.set_num_threads(usable_cpus())


def start(settings, trains=False):
    """Set up this process and return its Runtime; joins the other ranks if torchrun started it.

    settings: device, dtype, compile, seed and, in train.py, backend and dist_timeout.
    trains: whether this is a training run, which compiles by default on devices where it pays; an explicit `compile`
    wins.
    """
    rank, world_size = distributed.rank_and_world()
    local_rank = distributed.local_rank()
    device = torch.device(settings['device'])
    if device.type == 'cuda':  # set_device wants an index
        device = torch.device('cuda', local_rank if world_size > 1 else device.index or 0)
        if device.index >= torch.cuda.device_count() > 0:
            raise UserError(f'LOCAL_RANK is {local_rank}, but this machine has {torch.cuda.device_count()} CUDA '
                            'devices, counted from 0; start one process per device')
    if world_size > 1:
        distributed.join(settings, device, rank, world_size)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        if not (settings.was_set('dtype') and settings['dtype'] == 'float32'):
            torch.set_float32_matmul_precision('high')  # TF32, which is as precise as what surrounds these products
        if not trains:  # cuDNN builds a plan for each length, which in generation is every token
            torch.backends.cuda.enable_cudnn_sdp(False)
    name, reason = (settings['dtype'], 'as asked') if settings.was_set('dtype') else pick_dtype(device)
    if settings.was_set('compile'):
        compiled = settings['compile']
    else:  # Triton needs compute capability 7.0; on CPU and MPS, compiling takes longer than a short run gains
        compiled = (trains and device.type == 'cuda' and os.name != 'nt'
                    and torch.cuda.get_device_capability(device)[0] >= 7)
    if device.type == 'cpu':
        tune_malloc()
    limit_threads()
    torch.manual_seed(settings['seed'])
    description = f'{device}, {name} ({reason}), compile {"on" if compiled else "off"}'
    compute_dtype = torch.bfloat16 if name == 'int8' else DTYPES[name]  # int8 weights multiply bfloat16 activations
    return Runtime(device, compute_dtype, compiled, description, rank, local_rank, world_size)


class DelayedReader:
    """Reads small tensors from the device: at once on a CPU, one call late on CUDA, so that no call waits.

    delay: how many calls late, 0 or 1. The first call on CUDA has nothing to return yet and returns zeros.
    """

    def __init__(self, device):
        self.delay, self.previous = int(device.type == 'cuda'), None

    def __call__(self, tensor):
        """Return `tensor` (n,), or that of the previous call, as a list of floats."""
        if not self.delay:
            return tensor.tolist()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        previous, self.previous = self.previous, (host, copied)
        if previous is None:
            return [0.0] * len(tensor)
        previous[1].synchronize()
        return previous[0].tolist()
