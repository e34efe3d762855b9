"""Work out what a training run will take before it starts: memory, time, epochs, money. Nothing is trained.

    python plan.py config/train_gpt2.py                            on this machine, which is timed for 20 seconds
    python plan.py config/train_gpt2.py --on=a100 --gpus=8         on cards that are elsewhere
    python plan.py config/train_gpt2.py --on=3090 --price=0.3      and what that costs
    python plan.py config/train_shakespeare_char.py --device=cpu --n_embd=256

Takes every setting of train.py, which `python train.py --help` lists, and those below. Time on a card that is not here
is an estimate: its peak times the fraction of the peak that a similar training has reached, which is printed.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch

import train
from configurator import UserError, configure, describe, literals, resolve
from lib.machine import cards, runtime
from lib.machine import device as devices
from lib.machine.console import counted
from lib.text import dataset
from lib.training import plan, preflight, trial
from lib.training.log import duration, human_number
from lib.weights import gpt2

on = 'here'  # here (measured) | a card: 3090 | t4 | a100 | h100 | "gtx 1060" ...
gpus = 1  # cards, or processes, that share the work
price = 0.0  # money per card and hour; 0 = not counted
memory = 0.0  # GB of the card; 0 = of the table, or of this machine
mfu = 0.0  # fraction of the card's peak that training reaches; 0 = of the table
vocab_size = 0  # 0 = the dataset's, or GPT-2's if it is not prepared

OWN = literals(globals())


def check(s):
    """Return the errors in the Settings `s`, with the automatic values filled in; those of a dataset are not errors."""
    errors = [f'{name} must be {words}, got {s[name]}' for name, wrong, words in (
        ('gpus', s['gpus'] < 1, 'at least 1'), ('price', not s['price'] >= 0, 'at least 0'),
        ('memory', not s['memory'] >= 0, 'at least 0'), ('mfu', not 0 <= s['mfu'] <= 1, 'between 0 and 1'),
        ('vocab_size', s['vocab_size'] < 0, 'at least 0')) if wrong]
    if s['on'] != 'here':
        try:
            cards.find_card(s['on'])
        except UserError as error:
            errors.append(error.message)
    if not s.was_set('lr_decay_iters'):
        s['lr_decay_iters'] = s['max_iters']
    here = {} if s['on'] == 'here' else {'device': 'cpu', 'dtype': 'float32'}  # the checks are about this machine
    checked = resolve(dict(s), [])
    checked.origins = s.origins
    checked.update(here)
    errors += preflight.check_values(checked)
    unit = s['batch_size'] * s['block_size'] * s['gpus']
    if s['total_batch_tokens'] and s['total_batch_tokens'] % max(1, unit):
        errors.append(f'total_batch_tokens={s["total_batch_tokens"]} is not divisible by batch_size x block_size x '
                      f'gpus = {unit}')
    elif not s['total_batch_tokens'] and s['gradient_accumulation_steps'] % max(1, s['gpus']):
        errors.append(f'gradient_accumulation_steps={s["gradient_accumulation_steps"]} is not divisible by '
                      f'gpus={s["gpus"]}')
    return errors


def card_dtype(s, card):
    """Return the torch dtype for a card that is not here: what pick_dtype would choose there, unless given."""
    half, full = devices.PEAK_TFLOPS[card]
    old = card.startswith(('T4', 'V100', 'RTX 20'))  # compute capability 7: no bfloat16
    name = 'float32' if half == full else 'float16' if old else 'bfloat16'
    return devices.DTYPES[s['dtype'] if s.was_set('dtype') else name]


def show(title, *lines):
    """Print a part of the page: its title, and lines beside it."""
    for i, line in enumerate(lines):
        print(f'{title if i == 0 else "":<12} {line}')


def show_size(job):
    parts, c = plan.parameters_by_part(job.config), job.config
    show('parameters', f'{sum(parts.values()):,}', *(f'{number:>13,}  {part}' for part, number in parts.items()))
    extra = ''.join(f', {words}' for words, true in (('recomputed activations', job.checkpoint_activations),
                                                     ('frozen weights', job.lora_rank)) if true)
    lines = [f'{human_number(plan.flops_per_token(job))} per token{extra}: 6 N + 12 L C T (PaLM, arXiv:2204.02311, '
             f'appendix B), L = {c.n_layer}, C = {c.n_embd}, T = {c.block_size}']
    if job.optimizer == 'muon':
        lines.append(f'{plan.muon_flops(job):.3g} per update for Muon')
    if job.max_iters:
        lines.append(f'{plan.run_flops(job):.3g} for {counted(job.max_iters, "update")} of '
                     f'{job.tokens_per_update:,.0f} tokens, with evaluations')
    show('FLOPs', *lines)


def show_memory(job, device_type, capacity, pretrained):
    """Print what memory holds at the peak, whether it fits, and what other settings would change."""
    fixed = plan.CUDA_CONTEXT if device_type == 'cuda' else 0
    budget = plan.USABLE * capacity - fixed
    found = plan.memory(job, device_type, with_logits=True)
    lines = [f'{plan.size(found.total)} of tensors at the peak: weights {plan.size(found.weights)}, gradients '
             f'{plan.size(found.gradients)}, optimizer {plan.size(found.optimizer)}, activations '
             f'{plan.size(found.activations - found.logits)}, logits {plan.size(found.logits)}']
    if fixed:
        lines.append(f'about {plan.size(fixed)} for CUDA itself; torch.compile usually needs less for activations')
    else:
        lines.append('besides, Python and torch take about 0.3 GB, and the C library keeps freed memory')
    if capacity:
        fits = 'fits' if found.total <= budget else 'does not fit'
        lines.append(f'{fits} {plan.size(capacity)}, of which tensors can fill {plan.size(budget)}')
        choices = [('as set', job)]
        if not job.checkpoint_activations:
            choices.append(('--checkpoint_activations', replace(job, checkpoint_activations=True)))
        if pretrained and not job.lora_rank:
            choices.append(('--lora_rank=8', replace(job, lora_rank=8)))
        if job.gpus > 1 and job.parallel == 'ddp' and not job.lora_rank:
            choices.append(('--parallel=fsdp', replace(job, parallel='fsdp')))
        for name, other in choices:
            best = plan.largest_batch(other, device_type, budget)
            accumulation = f' --gradient_accumulation_steps={job.sequences // best}' if best else ''
            lines.append(f'{name}: {plan.size(plan.memory(other, device_type).total)}; ' + (
                f'largest batch with the same tokens per update: --batch_size={best}{accumulation}' if best else
                'no batch_size fits'))
    show('memory', *lines)


def show_time(job, device_type, minutes, source, s):
    lines = [f'{duration(minutes)} {source}']
    if s['price']:
        lines.append(f'{s["price"] * job.gpus * minutes / 60:,.2f} at {s["price"]:g} per card and hour')
    if warning := plan.long_run_warning(minutes, job=job, device_type=device_type):
        lines.append(warning)
    show('time', *lines)


def measured(job, rt):
    """Return (minutes, updates, a phrase on the source) from timing this machine."""
    print('timing this machine for 20 seconds ...', file=sys.stderr)
    timing = trial.time_run(job, rt)
    return *plan.minutes_from(job, timing.updates, timing.evaluation), (
        f'from {timing.sequences} sequences timed here: ' +
        ', '.join(f'{1000 * seconds:,.0f} ms per update' + f' at context {context}' * (len(timing.updates) > 1)
                  for context, seconds in timing.updates.items()))


def estimated(job, card, s):
    """Return (minutes, updates, a phrase on the source) for a card that is not here."""
    half, full = devices.PEAK_TFLOPS[card]
    peak = full if job.dtype == torch.float32 else half
    row = cards.mfu_of(card, plan.count(job.config))
    fraction, source = (s['mfu'], 'given by --mfu') if s['mfu'] else (row.mfu, row.source)
    rate = fraction * peak * 1e12 * job.gpus
    per_update = {context: (job.sequences * context * plan.flops_per_token(job, context)) / rate +
                  plan.muon_flops(job) / rate * job.gpus for _, context in job.contexts}
    return *plan.minutes_from(job, per_update, plan.eval_flops(job) / rate), (
        f'at {fraction:.0%} of {job.gpus} x {peak:g} TFLOP/s ({source})')


def main():
    argv = sys.argv[1:]
    train_settings = literals(vars(train))
    if '--help' in argv or '-h' in argv:
        print(describe(Path(__file__).read_text(encoding='utf-8'), OWN))
        print('\n' + describe(Path(train.__file__).read_text(encoding='utf-8'), train_settings, doc='From train.py'))
        return
    flags = [word for word in argv if not word.endswith('.py')]
    elsewhere = resolve({**train_settings, **OWN}, flags)['on'] != 'here'
    s = configure({**train_settings, **OWN, '__file__': __file__}, check=check,
                  early={'device': lambda: 'cuda' if elsewhere else devices.pick_device()})
    try:
        data, problem = dataset.open_dataset(s['dataset'], s['block_size']), ''
    except UserError as error:
        data, problem = None, error.message
    config = plan.config_of(s, data, s['vocab_size'])
    if elsewhere:
        card = cards.find_card(s['on'])
        job = plan.job_from(s, config, card_dtype(s, card), data, s['gpus'])
        device_type, capacity = 'cuda', 1e9 * (s['memory'] or cards.MEMORY_GB[card])
        print(f'{job.gpus} x {card}, {plan.size(capacity)}, {str(job.dtype).removeprefix("torch.")}\n')
    else:
        rt = runtime.start(s, trains=True)
        job = plan.job_from(s, config, rt.dtype, data, s['gpus'])
        device_type, capacity = rt.device.type, 1e9 * s['memory'] or devices.free_memory(rt.device)
        print(f'this machine: {rt.description}\n')
    show_size(job)
    show_memory(job, device_type, capacity, bool(gpt2.find(s['init_from'])))
    show('checkpoint', f'{plan.size(plan.checkpoint_bytes(job))}, up to three of them in out_dir')
    if elsewhere:
        minutes, updates, source = estimated(job, card, s)
    elif capacity and plan.memory(job, device_type).total > capacity:
        minutes, updates, source = 0, job.max_iters, ''
        show('time', 'not measured, since the run does not fit this machine')
    else:
        minutes, updates, source = measured(job, rt)
    if source:
        show_time(job, device_type, minutes, source, s)
    if not job.max_iters:
        show('updates', f'about {updates:,.0f} in {job.max_minutes:g} minutes')
    show('data', plan.data_sentence(job, updates * job.tokens_per_update))
    if problem:
        assumed = '' if s['vocab_size'] or gpt2.find(s['init_from']) else '; a vocabulary of 50,304 is assumed'
        show('', f'epochs are unknown{assumed}: {problem}')


if __name__ == '__main__':
    main()
