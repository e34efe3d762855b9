"""Time the updates of a training run on this machine, on random tokens, before the run."""
import os
import statistics
import time
from dataclasses import dataclass

import torch

from lib.machine.compiler import compile_or_fall_back
from lib.machine.device import peak_memory
from lib.machine.runtime import threads_are_given
from lib.training import plan
from lib.training.optim import decay_for_epochs, make_optimizer
from lib.weights import lora
from model import GPT


@dataclass
class Timing:
    """Seconds of one update at each context length, and of one evaluation."""
    updates: dict  # {context: seconds}
    evaluation: float
    sequences: int  # per timed micro-batch; fewer than batch_size if that is too slow to time


class _Clock:
    """Times calls, each until the device has finished."""

    def __init__(self, rt):
        self.rt = rt

    def once(self, function, *args):
        self.rt.synchronize()
        began = time.perf_counter()
        function(*args)
        self.rt.synchronize()
        return time.perf_counter() - began

    def median(self, function, *args, seconds):
        """Return the median seconds of a call, from calls until this many seconds are over; at least one."""
        times = [self.once(function, *args)]
        while sum(times) < seconds:
            times.append(self.once(function, *args))
        return statistics.median(times)


def time_run(job, rt, seconds=20.0):
    """Return the Timing of a plan.Job on a Runtime, in about `seconds`, without the time for compiling.

    A micro-batch that would take too long is timed with fewer sequences and scaled up.
    """
    model = GPT(job.config).to(rt.device).train()
    if job.lora_rank:
        lora.adapt(model, job.lora_rank)
    model.set_compute_dtype(rt.dtype)
    model.checkpoint_activations = job.checkpoint_activations
    opt = make_optimizer(job.optimizer, model.param_groups(0.1, muon=job.optimizer == 'muon'), 1e-4, 1e-4, (0.9, 0.95),
                         rt.device.type)
    generator, clock = torch.Generator().manual_seed(0), _Clock(rt)

    def tokens(sequences, context):
        return torch.randint(job.config.vocab_size, (sequences, context), generator=generator).to(rt.device)

    def micro_step(net, sequences, context):
        idx = tokens(sequences, context)
        loss = net(idx, idx)[1]
        loss.backward()
        return loss.detach()

    def optimize():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()

    def evaluate(sequences, context):
        model.eval()
        with torch.no_grad():
            idx = tokens(sequences, context)
            float(model(idx, idx)[1])
        model.train()

    net = compile_or_fall_back(model, rt, False, lambda net: micro_step(net, job.batch_size, job.config.block_size))
    began, updates = time.perf_counter(), {}
    full = max(context for _, context in job.contexts)
    micro_step(model, 1, full)
    optimize()  # the first call creates the state
    one = clock.once(micro_step, model, 1, full)
    limit = (seconds - (time.perf_counter() - began)) / (len(job.contexts) + 1)
    sequences = job.batch_size if rt.compile else max(1, min(job.batch_size, int(limit / 4 / one)))
    step = clock.median(optimize, seconds=limit / 2)
    for _, context in job.contexts:
        clock.once(micro_step, net, sequences, context)
        micro = clock.median(micro_step, net, sequences, context, seconds=limit * 0.7)
        updates[context] = micro * job.batch_size / sequences * job.micro_steps / job.gpus + step
    one_batch = clock.median(evaluate, sequences, full, seconds=limit / 4) * job.batch_size / sequences
    return Timing(updates, one_batch * 2 * job.eval_iters, sequences)


def probe(step, rt, model, opt):
    """Run a training micro-step twice before the run and undo it; return (seconds, bytes of memory at the peak).

    step(): one forward and backward pass. The second call is timed, or the first if it takes over two seconds. The
    memory includes the state that the optimizer `opt` is going to create. Weights, gradients and random numbers are
    as before. Every rank calls it.
    """
    states, clock = rt.rng_states(), _Clock(rt)
    seconds = clock.once(step)
    if seconds < 2:
        seconds = clock.once(step)
    model.zero_grad(set_to_none=True)
    rt.set_rng_state(states)
    peak = peak_memory(rt.device)
    if not peak:
        return seconds, 0
    state = sum((4 if group['use_muon'] else 8) * p.numel() for group in opt.param_groups for p in group['params']
                if not opt.state[p])
    return seconds, peak + state


def choose_threads(model, batch, rt, chosen, say):
    """Compute with fewer threads if other programs use the CPUs; return their number, or 0 for all of them.

    Each operation waits for its last thread, and on a busy machine that one waits for its turn. So one thread can be
    faster than two. Times steps on `batch`; not those of large models, which would take long and wait less. chosen:
    what this returned when the run began, which is kept, because another number of threads rounds otherwise;
    negative: to be chosen, unless OMP_NUM_THREADS or MKL_NUM_THREADS is set.
    """
    threads, load = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0.0
    fewer = max(1, threads - max(1, round(load)))
    if 0 < chosen < threads:
        torch.set_num_threads(chosen)
        say(f'computing with {chosen} of {threads} threads, as this run did before')
    large = model.flops_per_token(batch[0].size(1)) * batch[0].numel() > 5e10
    if (chosen >= 0 or rt.device.type != 'cpu' or rt.world_size > 1 or threads_are_given() or load < 0.3 or threads == 1
            or large):
        return max(0, chosen)
    states, clock, seconds = rt.rng_states(), _Clock(rt), {threads: [], fewer: []}

    def step():
        model(*batch)[1].backward()

    clock.once(step)  # the first one takes longer
    for number in 3 * [threads, fewer]:
        torch.set_num_threads(number)
        seconds[number].append(clock.once(step))
    model.zero_grad(set_to_none=True)
    rt.set_rng_state(states)
    slow = statistics.median(seconds[threads]) > 1.1 * statistics.median(seconds[fewer])
    torch.set_num_threads(fewer if slow else threads)
    if slow:
        say(f'other programs use the CPUs: {fewer} of {threads} threads is faster')
    return fewer if slow else 0


def announce(net, batch, settings, data, model, opt, rt, updates_done, say, warn):
    """Time a training micro-step on `batch` with `probe` and print what the run will take; warn if that is hours.

    net: the compiled form of `model`, or `model`.
    """
    seconds, n_bytes = probe(lambda: net(*batch)[1].backward(), rt, model, opt)
    job = plan.job_from(settings, model.config, rt.dtype, data, rt.world_size)
    minutes, epochs, line = plan.one_line(job, seconds * job.micro_steps / rt.world_size, n_bytes, updates_done)
    say(line)
    decay = decay_for_epochs(settings['weight_decay'], settings['epoch_decay'], epochs,
                             job.sequences * settings['block_size'])
    if decay > settings['weight_decay'] and not updates_done:
        say(f'weight decay: about {decay:.2g}, for {plan.about(epochs)} epochs '
            f'(epoch_decay={settings["epoch_decay"]:g})')
    if not job.max_minutes and (warning := plan.long_run_warning(minutes, job=job, device_type=rt.device.type)):
        warn(warning)
