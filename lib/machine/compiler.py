"""torch.compile, only where it works, computes the same as eager mode, and pays."""
import math
import sys
import time

import torch

from configurator import UserError
from lib.machine import distributed

SHORT = 180  # seconds; what a run of this length gains, compiling takes


def compile_or_fall_back(model, runtime, explicit, try_step, seconds_ahead=lambda step_seconds: math.inf):
    """Return `model` compiled if runtime.compile and it is worth it, else unchanged.

    try_step(model) runs the forward and backward passes of a training step, in all shapes and modes that training
    uses, and returns the loss. If the compiled step fails, or its loss or gradient differs from eager mode's, that is
    a UserError when the user asked for compile (`explicit`); otherwise one line gives the reason and the model is not
    compiled. Out of memory is neither: it is raised. seconds_ahead: a function from the seconds of a step in eager
    mode to those of the whole run; short runs are not compiled, unless asked for. The random state and the gradients
    are as before, and all ranks decide the same.
    """
    if not runtime.compile:
        return model
    states, say = runtime.rng_states(), _say if runtime.is_master else lambda line: None
    try_step(model)  # the first step of a process also pays for memory and libraries
    model.zero_grad(set_to_none=True)
    runtime.synchronize()
    began = time.perf_counter()
    eager = _measure(model, runtime, try_step)
    runtime.synchronize()
    (ahead,) = runtime.all_reduce_max(seconds_ahead(time.perf_counter() - began))
    again = _measure(model, runtime, try_step)  # dropout makes two steps differ
    failure, compiled = '', model
    if ahead <= SHORT and not explicit:
        say(f'not compiled: the run takes about {max(1, round(ahead))} s without; --compile=True compiles it')
    else:
        say('compiling, one to two minutes')
        failure, compiled = _compiled(model, runtime, try_step, eager, again)
    runtime.set_rng_state(states)
    if failure and explicit:
        raise UserError(f'compile=True: {failure}; leave it out')
    if failure:
        say(f'{failure}; continuing without it')
        torch._dynamo.reset()
        return model
    return compiled


def step_in_all_shapes(model, batches):
    """Return a try_step for compile_or_fall_back: training on each of the `batches`, and evaluation on the last."""
    def try_step(network):
        total = 0.0
        for idx, targets in batches:
            _, loss = network(idx, targets)
            loss.backward()
            total += float(loss.detach())
        with torch.no_grad():
            model.eval()
            network(*batches[-1])
            model.train()
        return total
    return try_step


def _compiled(model, runtime, try_step, eager, again):
    """Return (why the compiled step cannot be used or '', the compiled model)."""
    settings = torch._inductor.config.triton
    if _version() < (2, 11) and hasattr(settings, 'mix_order_reduction'):
        settings.mix_order_reduction = False  # wrong gradients: pytorch issues 190796 and 193061
    compiled, failure = torch.compile(model, dynamic=False), ''  # context_warmup has three shapes
    try:
        found = _measure(compiled, runtime, try_step, model)
        for name, x, y, z in zip(('loss', 'gradient'), eager, again, found):
            if not abs(z - x) <= 0.02 * abs(x) + 4 * abs(y - x):  # also if it is NaN
                failure = failure or f'the compiled model computes another {name} ({z:.4g}) than eager mode ({x:.4g})'
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure = f'compile failed ({type(error).__name__}: {distributed.first_line(error)})'
    model.zero_grad(set_to_none=True)
    if runtime.all_reduce_max(bool(failure))[0] and not failure:
        failure = 'compile failed on another rank'
    return failure, compiled


def _measure(network, runtime, try_step, model=None):
    """Return (loss, norm of the gradient) of one step; under FSDP of this rank's shards. The gradients are removed."""
    model = model or network
    loss = try_step(network)
    grads = [p.grad.to_local() if hasattr(p.grad, 'to_local') else p.grad for p in model.parameters()
             if p.grad is not None]
    norm = math.sqrt(sum(float(g.float().square().sum()) for g in grads))
    model.zero_grad(set_to_none=True)
    return float(loss), norm


def _version():
    return tuple(int(part) for part in torch.__version__.split('.')[:2])


def _say(line):
    print(line, file=sys.stderr, flush=True)
