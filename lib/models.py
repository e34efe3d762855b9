"""From a name to a model and its tokenizer: what sample.py, evaluate.py, export.py and train.py have in common."""
from pathlib import Path

import torch

from configurator import UserError, find_path
from lib import checkpoint, dataset, tokenizer
from model import GPT, GPT2_SIZES, GPTConfig


def build(state, path, **overrides):
    """Return the GPT of a checkpoint, in eval mode on the CPU; `overrides` replace model_args (dropout, say).

    Raises UserError naming what does not fit.
    """
    try:
        config = GPTConfig(**{**state['model_args'], **overrides})
        model = GPT(config, init=False)
    except (TypeError, ValueError) as error:
        raise UserError(f'{path}: model_args do not describe a model of this program: {error}') from error
    wrong = problems(model.state_dict(), state['model'])
    if wrong:
        raise UserError(f'{path}: {wrong}; was model_args changed?')
    model.load_state_dict(state['model'])
    return model.eval()


def problems(want, have):
    """Return one line on how the tensors of `have` differ from those of `want`, '' where they fit."""
    for title, names in (('missing', [n for n in want if n not in have]),
                         ('unexpected', [n for n in have if n not in want]),
                         ('of another shape', [n for n in want if n in have and want[n].shape != have[n].shape])):
        if names:
            return f'{len(names)} tensors {title}, e.g. {", ".join(names[:3])}'
    return ''


def open_model(init_from, out_dir, **overrides):
    """Return (model in eval mode on the CPU, tokenizer, checkpoint) for any of sample.py's init_from.

    init_from: 'resume' reads out_dir/ckpt.pt; gpt2* and folders are read by GPT.from_pretrained, and the checkpoint
    returned is then empty. UserError where there is no such model.
    """
    if init_from == 'resume':
        path = Path(out_dir) / 'ckpt.pt'
        if not path.exists():
            raise UserError(f'{path} not found; train a model first, or name its folder with --out_dir')
        state = checkpoint.load(path, mmap=True)
        if 'tokenizer' in state:
            spec = state['tokenizer']
        else:  # nanoGPT's: the tokenizer is known by the dataset's folder alone
            spec = dataset.tokenizer_spec(dataset.folder(state.get('config', {}).get('dataset', '')))
        return build(state, path, **overrides), tokenizer.from_spec(spec), state
    if init_from in GPT2_SIZES or find_path(init_from).is_dir():
        model = pretrained(init_from, **overrides)
        return model, tokenizer.from_spec({'kind': 'gpt2'}), {}
    raise UserError(f'init_from={init_from!r}: expected resume, {", ".join(GPT2_SIZES)}, or a folder with '
                    'config.json and model.safetensors')


def pretrained(name, **overrides):
    """Return GPT-2 `name` or the model in a local folder in Hugging Face's GPT-2 layout."""
    raise UserError(f'init_from={name}: loading GPT-2 weights is not built yet')


def has_nan(model):
    """True where a parameter is not a number or infinite."""
    return any(not torch.isfinite(p).all() for p in model.parameters())
