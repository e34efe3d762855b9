"""From a name to a model and its tokenizer: what sample.py, evaluate.py, export.py and train.py have in common."""
import json
from pathlib import Path

import torch

from configurator import UserError, find_path
from lib.text import data_folder, tokenizer
from lib.weights import checkpoint, lora
from model import GPT, GPT2_SIZES, GPTConfig, gpt2_config


def build(state, path, dtype=torch.float32, **overrides):
    """Return the GPT of a checkpoint, in eval mode on the CPU, with weights of `dtype`.

    overrides: replace model_args (dropout, say). Raises UserError naming what does not fit.
    """
    try:
        config = GPTConfig(**{**state['model_args'], **overrides})
        model = GPT.empty(config, dtype)
        if rank := lora.rank_of(state['model']):
            lora.adapt(model, rank)
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


def open_model(init_from, out_dir, dtype=torch.float32):
    """Return (model in eval mode on the CPU, tokenizer, checkpoint) for any of sample.py's init_from.

    init_from: 'resume' reads out_dir/ckpt.pt; gpt2* and folders are read by GPT.from_pretrained, and the checkpoint
    returned is then empty. dtype: of the weights, which need only be converted as they come. UserError where there
    is no such model.
    """
    if init_from == 'resume':
        path = Path(out_dir) / 'ckpt.pt'
        if not path.exists():
            raise UserError(f'{path} not found; train a model first, or name its folder with --out_dir')
        state = checkpoint.load(path, mmap=True)
        if 'tokenizer' in state:
            spec = state['tokenizer']
        else:  # nanoGPT's: the tokenizer is known by the dataset's folder alone
            spec = data_folder.tokenizer_spec(data_folder.folder(state.get('config', {}).get('dataset', '')))
        return build(state, path, dtype), tokenizer.from_spec(spec), state
    if init_from in GPT2_SIZES or find_path(init_from).is_dir():
        return pretrained(init_from, dtype=dtype), tokenizer.from_spec(pretrained_tokenizer(init_from)), {}
    raise UserError(f'init_from={init_from!r}: expected resume, {", ".join(GPT2_SIZES)}, or a folder with '
                    'config.json and model.safetensors')


def _source(name):
    return name if name in GPT2_SIZES else find_path(name)


def pretrained(name, **overrides):
    """Return GPT-2 `name`, or the model in folder `name`, in eval mode on the CPU; UserError says what is wrong.

    overrides: dropout, block_size, dtype; see GPT.from_pretrained.
    """
    try:
        return GPT.from_pretrained(_source(name), **overrides).eval()
    except ValueError as error:
        raise UserError(f'init_from={name}: {error}') from error


def pretrained_config(name):
    """Return the GPTConfig of what `pretrained` would load, without loading it."""
    try:
        return gpt2_config(_source(name))
    except ValueError as error:
        raise UserError(f'init_from={name}: {error}') from error


def pretrained_tokenizer(name):
    """Return the tokenizer spec of what `pretrained` would load: GPT-2's, or what export.py left in the folder.

    UserError where the folder's vocabulary is neither.
    """
    if name in GPT2_SIZES:
        return {'kind': 'gpt2'}
    folder = find_path(name)
    try:
        if (path := folder / 'tokenizer_spec.json').exists():
            return json.loads(path.read_text(encoding='utf-8'))
        vocabulary = {}
        if (path := folder / 'vocab.json').exists():
            vocabulary = json.loads(path.read_text(encoding='utf-8'))
        elif (path := folder / 'tokenizer.json').exists():
            vocabulary = json.loads(path.read_text(encoding='utf-8'))['model']['vocab']
        known = vocabulary and vocabulary.items() >= {'\u0120the': 262, '\u0120gazed': 50255}.items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__}: {error})') from error
    if vocabulary and not known:
        raise UserError(f"{path} is another vocabulary than GPT-2's, which is all that this program reads")
    return {'kind': 'gpt2'}


def has_nan(model):
    """True where a parameter is not a number or infinite."""
    mine = (p.to_local() if hasattr(p, 'to_local') else p for p in model.parameters())  # under FSDP this rank's share
    wide = {torch.float16: torch.float32}  # whose sum may pass its largest number
    return any(not torch.isfinite(p.detach().sum(dtype=wide.get(p.dtype))) for p in mine)  # a sum needs no memory
