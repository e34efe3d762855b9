"""All that can be known to be wrong before a model is built, found first and told together."""
import math
import os

import torch

from configurator import UserError
from lib.machine import runtime
from lib.text import dataset, tokenizer
from lib.weights import checkpoint, gpt2, lora
from model import CHOICES, GPTConfig

SETTING_CHOICES = {
    **CHOICES,
    'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
    'parallel': ('ddp', 'fsdp'),
    'optimizer': ('adamw', 'muon'),
    'lr_schedule': ('cosine', 'wsd'),
    'data_order': ('epochs', 'random'),
}
AT_LEAST = {
    1: ('dist_timeout', 'eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps', 'batch_size'),
    0: ('max_iters', 'warmup_iters', 'lr_decay_iters', 'patience', 'max_minutes', 'total_batch_tokens', 'peak_tflops',
        'lora_rank', 'sample_interval', 'learning_rate', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip', 'spike_skip',
        'seed'),
}
ARCHITECTURE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'pos', 'norm', 'mlp', 'qk_norm', 'tie_weights',
                'softcap', 'smear')

# What does not combine: (condition on the settings, why).
CONFLICTS = (
    (lambda s: s['dtype'] == 'float16' and not s['device'].startswith('cuda'),
     'dtype=float16 needs the gradient scaling that only CUDA has here; use bfloat16 or float32'),
    (lambda s: s['eval_only'] and s['init_from'] in ('scratch', 'auto'),
     'eval_only needs a model: --init_from=resume or gpt2*'),
    (lambda s: s['parallel'] == 'fsdp' and s['optimizer'] == 'muon',
     'optimizer=muon needs whole matrices, which parallel=fsdp shares out; use adamw, or ddp'),
    (lambda s: s['parallel'] == 'fsdp' and _dtype(s) == 'float16',
     'parallel=fsdp supports bfloat16 and float32, not float16'),
    (lambda s: s['spike_skip'] and _dtype(s) == 'float16',
     'spike_skip cannot be used with float16, whose gradient scaler decides by itself; use bfloat16 or float32'),
    (lambda s: s['lora_rank'] > 0 and s['init_from'] == 'scratch',
     'lora_rank adapts a trained model: --init_from=gpt2* or a folder; to continue a run --init_from=resume'),
    (lambda s: s['lora_rank'] > 0 and s['parallel'] == 'fsdp', 'lora_rank works with parallel=ddp only'),
    (lambda s: s['lora_rank'] > 0 and s['optimizer'] == 'muon',
     'lora_rank trains thin matrices, which muon is not for; use --optimizer=adamw'),
    (lambda s: s['context_warmup'] and s['block_size'] % 4, 'context_warmup needs a block_size divisible by 4'),
    (lambda s: s['decay_lr'] and s.given('lr_decay_iters') and 0 < s['lr_decay_iters'] <= s['warmup_iters'],
     'warmup_iters must be below lr_decay_iters, or the learning rate never decays'),
)


def _dtype(s):
    """Return the name of the dtype that training will use; the device is known to be there."""
    return s['dtype'] if s.given('dtype') else runtime.pick_dtype(torch.device(s['device']))[0]


def values(s):
    """Return what is wrong with the values of the Settings `s` by themselves, a line each."""
    found = [f'{name} must be at least {least}, got {s[name]}'
             for least, names in AT_LEAST.items() for name in names if not s[name] >= least]
    found += [f'{name} must be one of {", ".join(choices)}; got {s[name]!r}'
              for name, choices in SETTING_CHOICES.items() if s[name] not in choices]
    found += [f'{name} must be at least 0 and below 1, got {s[name]}'
              for name in ('beta1', 'beta2', 'muon_momentum') if not 0 <= s[name] < 1]
    found += [f'{name} must be a finite number, got {value}' for name, value in s.items()
              if isinstance(value, float) and not math.isfinite(value) and name not in ('grad_clip', 'spike_skip')]
    if s['seed'] >= 2**63:
        found.append(f'seed must be below 2**63, got {s["seed"]}')
    if not 0 < s['cooldown_frac'] <= 1:
        found.append(f'cooldown_frac must be above 0 and at most 1, got {s["cooldown_frac"]}')
    if not 0 <= s['context_warmup'] <= 1:
        found.append(f'context_warmup must be at least 0 and at most 1, got {s["context_warmup"]}')
    config = GPTConfig(vocab_size=1, dropout=s['dropout'], **{name: s[name] for name in ARCHITECTURE})
    found += [problem for problem in config.validate() if problem.split()[0] not in CHOICES]
    if s['init_from'] not in ('scratch', 'resume', 'auto') and not _is_pretrained(s):
        found.append(f'init_from={s["init_from"]!r}: expected scratch, resume, auto, {", ".join(gpt2.SIZES)}, or a '
                     'folder with config.json and model.safetensors')
    problem = runtime.device_problem(s['device'])
    found += [problem] if problem else [why for wrong, why in CONFLICTS if wrong(s)]
    return found + _batch_problems(s)


def _batch_problems(s):
    ranks, accumulation = int(os.environ.get('WORLD_SIZE', 1)), s['gradient_accumulation_steps']
    unit, total = s['batch_size'] * s['block_size'] * ranks, s['total_batch_tokens']
    if total:
        if unit > 0 and total % unit:
            return [f'total_batch_tokens={total} is not divisible by batch_size x block_size x ranks = {unit}; '
                    f'the nearest is {max(1, round(total / unit)) * unit}']
    elif accumulation % ranks:
        below = accumulation // ranks * ranks
        near = f'{below} or {below + ranks}' if below else f'{ranks}'
        return [f'gradient_accumulation_steps={accumulation} is not divisible by {ranks} ranks; use {near}']
    return []


def adopt(s, state, path):
    """Take the architecture of the checkpoint `state` over into the Settings `s`; returns what contradicts it."""
    default = vars(GPTConfig())
    have = {**default, **state['model_args']}
    found = [f'{path} is not a checkpoint of this program: its model_args have {name}={value!r}'
             for name, value in have.items() if name in default and type(value) not in (type(default[name]), int)]
    if found:
        return found
    for name in ARCHITECTURE:
        if s.by_flag(name) and s[name] != have[name]:
            found.append(f'{name}={s[name]} but the checkpoint {path} has {have[name]}; drop the flag')
        elif s[name] != have[name]:
            s[name], s.origins[name] = have[name], str(path)
    return found


def _adopt_pretrained(s):
    """Take over the architecture of the GPT-2 that init_from names; a smaller block_size that was given crops it."""
    try:
        config = gpt2.find(s['init_from']).config()
    except UserError as error:
        return [error.message]
    if s.given('block_size') and s['block_size'] > config.block_size:
        return [f'block_size={s["block_size"]} but {s["init_from"]} has {config.block_size} positions; lower it']
    if s.given('block_size'):
        config.block_size = s['block_size']
    return adopt(s, {'model_args': vars(config)}, s['init_from'])


def _adopt_lora(s, state, path):
    """Take over the rank of a checkpoint's adapters, without which its optimizer state means nothing."""
    rank = lora.rank_of(state['model'])
    if s['eval_only'] or s['lora_rank'] == rank:
        return []
    if s.given('lora_rank'):
        return [f'lora_rank={s["lora_rank"]} but the checkpoint {path} has {f"rank {rank}" if rank else "no adapters"}'
                f'; {"drop it" if rank else "to adapt its model, export it and name the folder with --init_from"}']
    s['lora_rank'], s.origins['lora_rank'] = rank, str(path)
    return []


def check(s, opened):
    """Return what `_check` finds, a line each, naming the rank where there are several."""
    rank, world_size = runtime.rank_and_world()
    found = _check(s, opened)
    return [f'rank {rank}: {line}' for line in found] if world_size > 1 else found


def _check(s, opened):
    """Return all that is wrong with a training run's Settings, and leave in `opened` what was read on the way.

    opened: gets 'data' (a Dataset) and, when resuming, 'resume' (path, checkpoint). Automatic settings that follow
    others are filled in, and a checkpoint's architecture is taken over.
    """
    found = []
    opened['resume'] = None
    if s['init_from'] in ('resume', 'auto'):
        try:
            if s['eval_only']:
                path = f'{s["out_dir"]}/ckpt.pt'
                opened['resume'] = path, checkpoint.load(path)
            else:
                opened['resume'] = checkpoint.newest(s['out_dir'])
        except UserError as error:
            found.append(error.message)
        else:
            if opened['resume']:
                path, state = opened['resume']
                found += adopt(s, state, path) + _adopt_lora(s, state, path)
            elif s['lora_rank'] > 0:
                found.append('lora_rank adapts a trained model, and there is no checkpoint to go on from; '
                             'say --init_from=gpt2* or a folder')
            elif s['init_from'] == 'resume':
                found.append(f'no checkpoint in {s["out_dir"]}/ to resume; use --init_from=auto to start fresh')
    elif _is_pretrained(s):
        found += _adopt_pretrained(s)
    if not s.given('lr_decay_iters'):
        s['lr_decay_iters'] = s['max_iters']
    if not s.given('min_lr'):
        s['min_lr'] = s['learning_rate'] / 10
    found += values(s)
    if not s['eval_only'] and (problem := checkpoint.folder_problem(s['out_dir'])):
        found.append(problem)
    try:
        opened['data'] = dataset.open_dataset(s['dataset'], max(1, s['block_size']))
    except UserError as error:
        first = ('' if s.given('dataset') or 'not found' not in error.message else '; for a first model: python '
                 'data/python_char/prepare.py && python train.py config/train_python_char.py')
        return found + [error.message + first]
    if opened['resume'] and not found:
        found += _foreign_data(*opened['resume'], opened['data'])
    if _is_pretrained(s) and not found:
        found += foreign_weights(s['init_from'], opened['data'])
    return found


def _is_pretrained(s):
    return gpt2.find(s['init_from']) is not None


def foreign_weights(name, data):
    """Return why GPT-2 `name` cannot read dataset `data`, in a list that is empty when it can."""
    try:
        source = gpt2.find(name)
        spec, size = source.tokenizer_spec(), source.config().vocab_size
    except UserError as error:
        return [error.message]
    if spec != data.tokenizer:
        advice = f'; prepare it with --tokenizer={spec["kind"]}' if spec['kind'] in ('gpt2', 'byte') else ''
        return [f'dataset {data.name} does not fit {name}: {tokenizer.difference(data.tokenizer, spec)}{advice}']
    return [f'dataset {data.name} has {data.vocab_size} tokens, {name} {size}'] * (data.vocab_size > size)


def _foreign_data(path, state, data):
    """Return why the dataset cannot continue the checkpoint's run, in a list that is empty when it can."""
    saved, size = state.get('tokenizer'), state['model_args'].get('vocab_size', 0)
    if data.vocab_size > size:
        return [f'checkpoint {path} has vocab_size {size}, dataset {data.name!r} has {data.vocab_size}']
    if saved is not None and saved != data.tokenizer:
        return [f'checkpoint {path} was trained with another tokenizer than dataset {data.name!r} has: '
                f'{tokenizer.difference(data.tokenizer, saved)}; choose another --out_dir, or train from scratch']
    return []


def changes(state, s, data):
    """Return a line for each thing a resumed run does otherwise: its architecture, its data, changed settings."""
    lines = [f'{name}: {s[name]}, as in the checkpoint' for name in ARCHITECTURE
             if s.origins[name].endswith('.pt')]
    apart = {*ARCHITECTURE, 'init_from', 'out_dir', 'device', 'eval_only'}
    lines += [f'{name}: checkpoint {old}, now {s[name]}' for name, old in state.get('config', {}).items()
              if name in s and name not in apart and s[name] != old
              and not (name in ('dtype', 'compile') and not s.given(name))]
    if 'data' in state and state['data'] != data.fingerprint():
        lines.append(f'dataset {data.name} is not the data of the checkpoint: {state["data"]["name"]} of '
                     f'{state["data"]["train"][0]:,} tokens, now {len(data.train):,}')
    return lines
