"""What a checkpoint may contain: checked once, when it is read, so that the rest of the program can trust it.

A file is not trusted with memory, either: sizes that it names are compared with the bytes that it has. Each function
returns a problem as part of a line, '' if there is none.
"""
import math
from dataclasses import fields

import torch

from lib.text.schema import spec_problem
from model import GPTConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LIMIT = 2**53  # whole numbers below it are exact as floats, too
LONGEST_ROPE = 2**22  # positions; unlike learned positions they take no bytes in a file


def _whole(value, least=0):
    return type(value) is int and least <= value < LIMIT


def _finite(value):
    return type(value) in (int, float) and abs(value) < LIMIT  # false for NaN and infinity


def _plain(value):
    return type(value) in (str, int, float, bool, type(None))


def _loss(value):
    return type(value) is float and value == math.inf or _finite(value)


def _history(value):
    return type(value) is list and all(
        type(entry) in (list, tuple) and len(entry) == 3 and _whole(entry[0]) and all(map(_finite, entry[1:]))
        for entry in value)


def _split(value):
    return type(value) in (list, tuple) and len(value) == 2 and _whole(value[0]) and type(value[1]) is str


def _data(value):
    return (type(value) is dict and type(value.get('name')) is str and _whole(value.get('vocab_size'))
            and _split(value.get('train')) and _split(value.get('val')))


def _random_states(value):
    if value is None:
        return True
    return type(value) is list and all(type(states) is dict and all(map(_random_state, states, states.values()))
                                       for states in value)


def _random_state(device, tensor):
    if tensor_problem(tensor, (torch.uint8,)) or tensor.dim() != 1:
        return False
    try:
        if device == 'cpu':
            torch.Generator().set_state(tensor)
    except RuntimeError:
        return False
    return device != 'cuda' or tensor.numel() == 16  # its seed and its offset


def _scaler(value):
    names = ('scale', 'growth_factor', 'backoff_factor', 'growth_interval', '_growth_tracker')
    return not value or type(value) is dict and all(_finite(value.get(name)) for name in names)


def _optimizer(value):
    if value == {}:
        return True
    return (type(value) is dict and type(value.get('state')) is dict and type(value.get('param_groups')) is list
            and all(type(moments) is dict for moments in value['state'].values())
            and all(type(group) is dict and type(group.get('params')) is list and all(map(_whole, group['params']))
                    for group in value['param_groups']))


STATE = {  # key of a checkpoint -> (is its value valid?, a name for valid values)
    'iter_num': (_whole, 'a whole number'),
    'tokens_seen': (_whole, 'a whole number'),
    'minutes': (lambda value: _finite(value) and value >= 0, 'a finite number of 0 or more'),
    'best_val_loss': (_loss, 'a number'),
    'history': (_history, 'a list of [step, train loss, val loss]'),
    'threads': (lambda value: type(value) is int and value < 2**16, 'a whole number'),
    'wandb_id': (lambda value: type(value) is str, 'text'),
    'config': (lambda value: type(value) is dict, 'a dictionary'),
    'origins': (lambda value: type(value) is dict and all(type(v) is str for kv in value.items() for v in kv),
                'a dictionary of texts'),
    'data': (_data, 'name, vocab_size, train and val of a dataset'),
    'chat': (lambda value: marks_problem(value) == '', 'the marks of dialogues'),
    'rng': (_random_states, 'a list of random states'),
    'scaler': (_scaler, 'the state of a GradScaler'),
    'optimizer': (_optimizer, 'the state of an optimizer'),
}


def marks_problem(marks):
    """Return what is wrong with the marks of dialogues from a file, None for a model of text."""
    names = ('user', 'assistant', 'end')
    if marks is None or type(marks) is dict and all(type(marks.get(name)) is str and marks[name] for name in names):
        return ''
    return f'expected texts for {", ".join(names)}'


def tensor_problem(tensor, dtypes=FLOATS):
    """Return what is wrong with a tensor from a file: its kind, its dtype, or elements that share memory."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f'is a {type(tensor).__name__}, not a tensor'
    if (tensor.layout != torch.strided or tensor.device.type != 'cpu' or tensor.is_quantized or tensor.is_nested
            or tensor.is_neg()):
        return 'is not a plain tensor'
    if tensor.dtype not in dtypes:
        return f'has dtype {_name(tensor.dtype)}, expected {" or ".join(map(_name, dtypes[:3]))}'
    needed = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride < needed:
            return f'has strides {tensor.stride()} for the shape {tuple(tensor.shape)}: its elements share memory'
        needed = max(needed, stride * size)
    return ''


def _name(dtype):
    return str(dtype).removeprefix('torch.')


def state_problem(state, n_bytes):
    """Return what is wrong with the checkpoint `state`, read from a file of n_bytes; '' if it can be used.

    In place: nanoGPT's tensor best_val_loss becomes a number, and settings that no setting can be are left out.
    """
    best = state.get('best_val_loss')
    if isinstance(best, torch.Tensor) and best.numel() == 1 and not tensor_problem(best):
        state['best_val_loss'] = float(best)
    for key, (valid, expected) in STATE.items():
        if key in state and not valid(state[key]):
            found = repr(state[key])[:40] if _plain(state[key]) else f'a {type(state[key]).__name__}'
            return f'{key} is {found}, expected {expected}'
    if any(step > state.get('iter_num', 0) for step, _, _ in state.get('history', ())):
        return f'history has evaluations after iter_num {state.get("iter_num", 0)}'
    if 'config' in state:
        state['config'] = {name: value for name, value in state['config'].items() if type(name) is str
                           and _plain(value) and (name != 'dataset' or type(value) is str)}
    if 'tokenizer' in state and (problem := spec_problem(state['tokenizer'])):
        return f'its tokenizer {problem}'
    size = 0
    for name, tensor in state['model'].items():
        if type(name) is not str:
            return 'model has a tensor without a name'
        if problem := tensor_problem(tensor):
            return f'{name} {problem}'
        size += tensor.numel() * tensor.element_size()
    if size > 2 * n_bytes:  # twice: an embedding that is also the head is counted twice
        return f'its tensors share memory: {size:,} bytes of tensors in a file of {n_bytes:,}'
    return ''


def model_problem(model_args, tensors):
    """Return why model_args do not describe a model with these tensors, as far as memory depends on it.

    Checked before a model is built: a number in a file must not decide how much memory is used.
    """
    default = {f.name: f.default for f in fields(GPTConfig)}
    for name, value in model_args.items():
        if name in default and (type(value) not in (type(default[name]), int)
                                or isinstance(value, (int, float)) and not _finite(value) and type(value) is not bool):
            return f'model_args have {name}={str(value)[:40]!r}'
    config = GPTConfig(**{name: value for name, value in model_args.items() if name in default})
    n_numbers = sum(tensor.numel() for tensor in tensors.values())
    if problem := size_problem(config, n_numbers, len(tensors)):
        return problem
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith('.lora_a') and tensor.dim() == 2]
    if ranks and max(ranks) * config.n_embd * config.n_layer > n_numbers:
        return f'its adapters do not have rank {max(ranks)} in all layers'
    return ''


def size_problem(config, n_numbers, n_tensors):
    """Return why a file of n_numbers numbers in n_tensors tensors cannot hold the model of `config`."""
    least = config.n_embd * (config.vocab_size + (config.block_size if config.pos == 'learned' else 0)
                             + 4 * config.n_layer * config.n_embd)
    if config.n_layer > n_tensors or least > n_numbers:
        return (f'a model of {config.n_layer:,} layers, {config.n_embd:,} channels, {config.vocab_size:,} tokens and '
                f'{config.block_size:,} positions has {least:,} weights or more; the file has {n_numbers:,}')
    if config.pos != 'learned' and config.block_size > LONGEST_ROPE:
        return f'block_size={config.block_size:,} is above {LONGEST_ROPE:,}'
    return ''


def optimizer_problem(optimizer, saved):
    """Return why the optimizer state `saved`, from a file, cannot be used by `optimizer`.

    The fused updates write as many numbers as a parameter has, whatever the size of the moment: a wrong shape would
    overwrite other memory.
    """
    if not saved:
        return 'is empty'
    now = optimizer.state_dict()['param_groups']
    if [group['params'] for group in saved['param_groups']] != [group['params'] for group in now]:
        return 'does not fit: was the setting optimizer changed?'
    owners = [(p, group) for group in optimizer.param_groups for p in group['params']]
    for i, moments in saved['state'].items():
        if not _whole(i) or i >= len(owners):
            return f'has a parameter number {str(i)[:40]}, the model has {len(owners)}'
        if not moments:  # saved before the first update
            continue
        (p, group), names = owners[i], {'exp_avg', 'exp_avg_sq'}
        if group.get('use_muon'):
            names = {'momentum'}
        if moments.keys() - {'step'} != names or 'step' not in moments and 'exp_avg' in names:
            return (f'has {", ".join(map(str, moments))[:60]} for parameter {i}, expected '
                    f'{", ".join(sorted(names))} and step: was the setting optimizer changed?')
        for name, value in moments.items():
            if name == 'step':
                number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
                if not _finite(number) or number < 0:
                    return f'has a wrong step for parameter {i}'
                continue
            if problem := tensor_problem(value, (torch.float32,)):
                return f'is wrong: {name} of parameter {i} {problem}'
            if value.shape != p.shape:
                return (f'is wrong: {name} of parameter {i} has the shape {tuple(value.shape)}, expected '
                        f'{tuple(p.shape)}')
    return ''
