"""Check everything that can be checked before a model is built, and report all errors at once."""
import math
import os
from dataclasses import fields

from configurator import UserError, configure
from lib.machine import cpus, distributed
from lib.machine import device as devices
from lib.text import dataset, tokenizer
from lib.training.fit import dtype_of, fit_gpu
from lib.weights import checkpoint, gpt2, load_model, lora
from model import CHOICES, GPTConfig

ARCHITECTURE = [f.name for f in fields(GPTConfig) if f.name not in ('vocab_size', 'dropout')]
AUTOMATIC = ('device', 'dtype', 'compile', 'lr_decay_iters', 'min_lr')  # if of origin default
OF_THIS_PROCESS = {'init_from', 'out_dir', 'device', 'eval_only'}  # never taken over from a checkpoint

SETTING_CHOICES = {
    **CHOICES,
    'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
    'parallel': ('ddp', 'fsdp'),
    'optimizer': ('adamw', 'muon'),
    'lr_schedule': ('cosine', 'wsd'),
}
AT_LEAST = {
    1: ('dist_timeout', 'eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps', 'batch_size'),
    0: ('max_iters', 'warmup_iters', 'lr_decay_iters', 'patience', 'max_minutes', 'total_batch_tokens', 'peak_tflops',
        'lora_rank', 'sample_interval', 'learning_rate', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip', 'seed',
        'epoch_decay'),
}
# Settings that do not work together: (condition, error message, in which {name} is the value of a setting).
CONFLICTS = (
    (lambda s: s['dtype'] == 'float16' and not s['device'].startswith('cuda'),
     'dtype=float16 needs gradient scaling, which is available on CUDA only; use bfloat16 or float32'),
    (lambda s: s['eval_only'] and s['init_from'] in ('scratch', 'auto'),
     'eval_only needs a model: --init_from=resume or gpt2*'),
    (lambda s: s['parallel'] == 'fsdp' and dtype_of(s) == 'float16',
     'parallel=fsdp supports bfloat16 and float32, not float16'),
    (lambda s: s['lora_rank'] > 0 and s['init_from'] == 'scratch',
     'lora_rank adapts a trained model: --init_from=gpt2* or a folder; to continue a run --init_from=resume'),
    (lambda s: s['lora_rank'] > 0 and s['parallel'] == 'fsdp', 'lora_rank works with parallel=ddp only'),
    (lambda s: s['bf16_gradients'] and s['parallel'] == 'fsdp', 'bf16_gradients works with parallel=ddp only'),
    (lambda s: s['lora_rank'] > 0 and s['optimizer'] == 'muon',
     'lora_rank trains thin matrices, which muon is not for; use --optimizer=adamw'),
    (lambda s: s['context_warmup'] and s['block_size'] % 4, 'context_warmup needs a block_size divisible by 4'),
    (lambda s: s['decay_lr'] and s.was_set('lr_decay_iters') and 0 < s['lr_decay_iters'] <= s['warmup_iters'],
     'warmup_iters={warmup_iters} must be below lr_decay_iters={lr_decay_iters}, or the learning rate never decays; '
     'lower it with --warmup_iters, or leave lr_decay_iters out: it follows max_iters'),
)


def open_run(namespace):
    """Configure train.py from the command line and open what it needs; return (settings, dataset, resumed).

    namespace: train.py's globals, which get the settings. resumed: (path, checkpoint), or None for a new run. A
    checkpoint's architecture and flags are taken over, and automatic settings that follow others are filled in.
    Mistakes of the user end the program, all reported at once, with the rank if there are several.
    """
    opened = {}

    def check(settings):
        rank, world_size = distributed.rank_and_world()
        errors, opened['data'], opened['resumed'] = _check(settings)
        return [f'rank {rank}: {error}' for error in errors] if world_size > 1 else errors

    settings = configure(namespace, early={'device': devices.pick_device}, check=check)
    return settings, opened['data'], opened['resumed']


def _check(s):
    """Return (errors, dataset, resumed) for a training run's Settings, in which automatic values are filled in."""
    errors, source, resumed = [], load_model.find(s['init_from']), None
    if s['init_from'] in ('resume', 'auto'):
        try:
            resumed = _find_checkpoint(s)
        except UserError as error:
            errors.append(error.message)
        else:
            errors += _use_checkpoint(s, *resumed) if resumed else _nothing_to_resume(s)
    elif source:
        errors += _use_source_architecture(s, source)
    if s.set_by_flag('max_iters') and not s.set_by_flag('max_minutes'):
        s['max_minutes'] = 0.0  # an explicit --max_iters makes updates the schedule's axis
    if s.set_by_flag('max_iters') and not s.set_by_flag('context_warmup'):
        s['context_warmup'] = 0.0
    if not s.was_set('lr_decay_iters'):
        s['lr_decay_iters'] = s['max_iters']
    if not s.was_set('min_lr'):
        s['min_lr'] = s['learning_rate'] / 10
    errors += check_values(s)
    if not errors and (problem := _memory_problem(s)):
        errors.append(problem)
    if not s['eval_only'] and (problem := checkpoint.folder_problem(s['out_dir'])):
        errors.append(problem)
    try:
        data = dataset.open_dataset(s['dataset'], max(1, s['block_size']))
    except UserError as error:
        hint = '' if s.was_set('dataset') or 'not found' not in error.message else (
            '; for a first model: python data/python_char/prepare.py && python train.py config/train_python_char.py')
        return [*errors, error.message + hint], None, None
    if data.marks:
        s['context_warmup'] = 0.0  # a window begins at a dialogue and is read whole
    if resumed and not errors:
        errors += _tokenizer_mismatch(*resumed, data)
    if source and not errors:
        errors += source_mismatch(source, data)
    if not errors:
        fit_gpu(s, resumed, source, data)
    return errors, data, resumed


def _memory_problem(s):
    """Return why the weights of the model, in float32, cannot be in this machine's memory; '' if they may fit."""
    memory = cpus.physical_memory()
    n_params = s['n_embd'] * (s['block_size'] + 12 * s['n_layer'] * s['n_embd'])  # and the embedding of the tokens
    needed = 4 * n_params + 20_000 * s['n_layer']  # bytes; the second part is for Python's objects
    if not memory or needed < memory:
        return ''
    return (f'n_layer={s["n_layer"]}, n_embd={s["n_embd"]}, block_size={s["block_size"]} make {n_params:,} parameters '
            f'or more: {needed / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f} GiB of memory')


def check_values(s):
    """Return a list of errors in the values of the Settings `s`."""
    errors = [f'{name} must be at least {least}, got {s[name]}'
              for least, names in AT_LEAST.items() for name in names if not s[name] >= least]
    errors += [f'{name} must be one of {", ".join(choices)}; got {s[name]!r}'
               for name, choices in SETTING_CHOICES.items() if s[name] not in choices]
    errors += [f'{name} must be at least 0 and below 1, got {s[name]}'
               for name in ('beta1', 'beta2', 'muon_momentum') if not 0 <= s[name] < 1]
    errors += [f'{name} must be a finite number, got {value}' for name, value in s.items()
               if isinstance(value, float) and not math.isfinite(value) and name != 'grad_clip']
    if s['seed'] >= 2**63:
        errors.append(f'seed must be below 2**63, got {s["seed"]}')
    if not 0 < s['cooldown_frac'] <= 1:
        errors.append(f'cooldown_frac must be above 0 and at most 1, got {s["cooldown_frac"]}')
    if not 0 <= s['context_warmup'] <= 1:
        errors.append(f'context_warmup must be at least 0 and at most 1, got {s["context_warmup"]}')
    config = GPTConfig(vocab_size=1, dropout=s['dropout'], **{name: s[name] for name in ARCHITECTURE if name in s})
    errors += [error for error in config.validate() if error.split()[0] not in CHOICES]
    if s['init_from'] not in ('scratch', 'resume', 'auto') and not load_model.find(s['init_from']):
        errors.append(f'init_from={s["init_from"]!r}: expected scratch, resume, auto, {", ".join(gpt2.SIZES)}, or a '
                      'folder with ckpt.pt, or with config.json and model.safetensors')
    if problem := devices.device_problem(s['device']):
        return [*errors, problem, *_batch_errors(s)]
    return [*errors, *(message.format_map(s) for applies, message in CONFLICTS if applies(s)), *_batch_errors(s)]


def _batch_errors(s):
    ranks, accumulation = int(os.environ.get('WORLD_SIZE', 1)), s['gradient_accumulation_steps']
    unit, total = s['batch_size'] * s['block_size'] * ranks, s['total_batch_tokens']
    if total:
        if unit > 0 and total % unit:
            return [f'total_batch_tokens={total} is not divisible by batch_size x block_size x ranks = {unit}; '
                    f'the nearest is {max(1, round(total / unit)) * unit}']
    elif accumulation % ranks:
        below = accumulation // ranks * ranks
        nearest = f'{below} or {below + ranks}' if below else f'{ranks}'
        return [f'gradient_accumulation_steps={accumulation} is not divisible by {ranks} ranks; use {nearest}']
    return []


# ---- resuming ----------------------------------------------------------------------------------------------------

def _find_checkpoint(s):
    if s['eval_only']:
        path = f'{s["out_dir"]}/ckpt.pt'
        return path, checkpoint.load(path)
    # every rank reads the whole file: mapped, they have it in memory once; what they keep is copied
    mapped = distributed.rank_and_world()[1] > 1 and (s['device'].startswith('cuda') or s['parallel'] == 'fsdp')
    return checkpoint.find_latest(s['out_dir'], mmap=mapped)


def _nothing_to_resume(s):
    if s['lora_rank'] > 0:
        return ['lora_rank adapts a trained model, and there is no checkpoint to resume; '
                'use --init_from=gpt2* or a folder']
    if s['init_from'] == 'resume':
        return [f'no checkpoint in {s["out_dir"]}/ to resume; use --init_from=auto to start fresh']
    return []


def _use_checkpoint(s, path, state):
    """Take over from a checkpoint what stays in force when a run is resumed; return a list of errors.

    Its architecture always; its flags, unless this command line gives them anew; and all other settings if this
    command line names no config file.
    """
    state.setdefault('iter_num', 0)
    state['overridden'] = [name for name in ARCHITECTURE if name in s and s.origins[name].kind == 'config']
    errors = _use_architecture(s, state['model_args'], path) + _use_lora_rank(s, state, path)
    origins, has_config = state.get('origins', {}), any(origin.kind == 'config' for origin in s.origins.values())
    for name, value in state.get('config', {}).items():
        if name not in s or name in (*OF_THIS_PROCESS, *ARCHITECTURE, 'lora_rank') or s.on_command_line(name):
            continue
        if type(value) is not type(s[name]) or (name in AUTOMATIC and origins.get(name, 'default') == 'default'):
            continue
        if origins.get(name) == 'flag':
            s.put(name, value, 'flag', path)
        elif not has_config:
            s.put(name, value, 'checkpoint', path)
    return errors


def _use_architecture(s, model_args, path):
    """Take the architecture in `model_args` over into the Settings `s`; return a list of contradicting flags."""
    default = vars(GPTConfig())
    have = {**default, **model_args}
    errors = [f'{path} is not a checkpoint of this program: its model_args have {name}={value!r}'
              for name, value in have.items() if name in default and type(value) not in (type(default[name]), int)]
    if errors:
        return errors
    for name in ARCHITECTURE:
        if name not in s or s[name] == have[name]:
            continue
        if s.on_command_line(name):
            errors.append(f'{name}={s[name]} but the checkpoint {path} has {have[name]}; drop the flag')
        else:
            s.put(name, have[name], 'checkpoint', path)
    return errors


def _use_source_architecture(s, source):
    """Take over the architecture of GPT-2 weights; a smaller block_size that was given crops them."""
    try:
        config = source.config()
    except UserError as error:
        return [error.message]
    if s.was_set('block_size') and s['block_size'] > config.block_size:
        return [f'block_size={s["block_size"]} but {source.name} has {config.block_size} positions; lower it']
    if s.was_set('block_size'):
        config.block_size = s['block_size']
    return _use_architecture(s, vars(config), source.name)


def _use_lora_rank(s, state, path):
    """Take over the rank of a checkpoint's adapters; its optimizer state fits no other."""
    rank = lora.rank_of(state['model'])
    if s['eval_only'] or s['lora_rank'] == rank:
        return []
    if s.on_command_line('lora_rank'):
        found = f'rank {rank}' if rank else 'no adapters'
        advice = 'drop it' if rank else 'to adapt its model, export it and name the folder with --init_from'
        return [f'lora_rank={s["lora_rank"]} but the checkpoint {path} has {found}; {advice}']
    s.put('lora_rank', rank, 'checkpoint', path)
    return []


def source_mismatch(source, data):
    """Return why GPT-2 weights cannot read the dataset `data`, in a list that is empty if they can."""
    try:
        spec, size = source.tokenizer_spec(), source.config().vocab_size
    except UserError as error:
        return [error.message]
    if spec != data.tokenizer:
        advice = f'; prepare it with --tokenizer={spec["kind"]}' if spec['kind'] in ('gpt2', 'byte') else ''
        difference = tokenizer.describe_mismatch(data.tokenizer, spec)
        return [f'dataset {data.name} does not fit {source.name}: {difference}{advice}']
    if data.vocab_size > size:
        return [f'dataset {data.name} has {data.vocab_size} tokens, {source.name} {size}']
    return []


def _tokenizer_mismatch(path, state, data):
    """Return why the dataset cannot continue the checkpoint's run, in a list that is empty if it can."""
    saved, size = state.get('tokenizer'), state['model_args'].get('vocab_size', 0)
    if data.vocab_size > size:
        return [f'checkpoint {path} has vocab_size {size}, dataset {data.name!r} has {data.vocab_size}']
    if saved is not None and saved != data.tokenizer:
        return [f'checkpoint {path} was trained with another tokenizer than dataset {data.name!r} has: '
                f'{tokenizer.describe_mismatch(data.tokenizer, saved)}; choose another --out_dir, or train from '
                'scratch']
    return []


def other_data(state, data):
    """Return whether a checkpoint was trained on other data than `data`."""
    return 'data' in state and state['data'] != data.fingerprint()


def resume_changes(state, s, data):
    """Return one line for each difference between a checkpoint's run and this one: architecture, settings, data."""
    lines = [f'{name}: {s[name]}, as in the checkpoint' for name in state.get('overridden', ())  # of a config file
             if s.origins[name].kind == 'checkpoint']
    for name, old in state.get('config', {}).items():
        if name not in s or name in ARCHITECTURE or name in OF_THIS_PROCESS - {'device'} or s[name] == old:
            continue
        if name not in ('dtype', 'compile') or s.was_set(name):
            lines.append(f'{name}: checkpoint {old}, now {s[name]}')
    if other_data(state, data):
        old, new = state['data'], data.fingerprint()
        splits = ', '.join(f'{split}.bin of {old[split][0]:,} tokens (sha256 {str(old[split][1])[:8]}), now '
                           f'{new[split][0]:,} ({str(new[split][1])[:8]})' for split in ('train', 'val')
                           if old[split] != new[split])
        lines.append(f'dataset {data.name} is not the data of the checkpoint ({old["name"]}): {splits or "renamed"}; '
                     'the best validation loss starts anew')
    return lines
