"""From a name to a checked model and its tokenizer, for training, sampling, evaluation and export alike."""
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from configurator import UserError, find_path
from lib.text import data_folder, tokenizer
from lib.weights import checkpoint, gpt2, int8, lora, schema
from lib.weights.checkpoint import has_nan
from model import GPTConfig, Linear


@dataclass
class Run:
    """The best model of a run, as a beginning for another run; used like gpt2.Source."""
    name: str  # what the user typed as init_from
    path: Path  # of its ckpt.pt

    @cached_property
    def state(self):
        return checkpoint.load(self.path, mmap=True)

    def config(self):
        return model_from_checkpoint(self.state, self.path).config

    def tokenizer_spec(self):
        if 'tokenizer' in self.state:
            return self.state['tokenizer']
        # nanoGPT's checkpoint: only the dataset's folder knows the tokenizer
        return data_folder.tokenizer_spec(data_folder.folder(self.state.get('config', {}).get('dataset', '')))

    def load(self, dropout=0.0, block_size=0, dtype=torch.float32):
        """Return the GPT in eval mode on the CPU; block_size: the context to crop it to, 0 = all."""
        model = model_from_checkpoint(self.state, self.path, dtype, dropout=dropout)
        if block_size:
            gpt2.crop_block_size(model, block_size)
        return model


def find(init_from):
    """Return the source of weights that `init_from` names: a run's folder, or what gpt2.find knows; None if neither."""
    path = find_path(init_from) / 'ckpt.pt' if init_from else None
    return Run(init_from, path) if path and path.is_file() else gpt2.find(init_from)


def load_model(init_from, out_dir, dtype=torch.float32):
    """Return (model, tokenizer, checkpoint) for `init_from`; the model is in eval mode on the CPU.

    init_from: 'resume' reads out_dir/ckpt.pt, and the name of a run's folder reads its ckpt.pt; gpt2* and other
    folders are GPT-2 weights, whose checkpoint is {}, or {'chat': marks} if they answer questions. dtype: of the
    weights; int8 is for sampling only (int8.py). UserError if there is no such model, or if it cannot be used.
    """
    source = Run(init_from, Path(out_dir) / 'ckpt.pt') if init_from == 'resume' else find(init_from)
    if isinstance(source, Run):
        path = source.path
        if not path.exists():
            raise UserError(f'{path} not found; train a model first, or name its folder with --out_dir')
        state = source.state
        model, spec = model_from_checkpoint(state, path, dtype), source.tokenizer_spec()
    elif source:
        path, model, spec = init_from, source.load(dtype=dtype), source.tokenizer_spec()
        state = {'chat': source.read_json('chat.json')[1]} if source.folder else {}
        if problem := schema.marks_problem(state.get('chat')):
            raise UserError(f'{path}/chat.json: {problem}')
    else:
        raise UserError(f'init_from={init_from!r}: expected resume, {", ".join(gpt2.SIZES)}, or a folder with '
                        'ckpt.pt, or with config.json and model.safetensors')
    if has_nan(model):
        raise UserError(f'{path}: checkpoint contains NaN (iter {state.get("iter_num", "unknown")}); use another, or '
                        'train again with a lower learning_rate')
    tok = tokenizer.from_spec(spec)
    if tok.vocab_size > model.config.vocab_size:
        raise UserError(f'{path}: the model has {model.config.vocab_size} tokens, its tokenizer ({tok.kind}) has '
                        f'{tok.vocab_size}: they do not belong together')
    return model, tok, state


def model_from_checkpoint(state, path, dtype=torch.float32, assign=False, **overrides):
    """Return the GPT of a checkpoint, in eval mode on the CPU, with weights of `dtype`.

    assign: use the checkpoint's tensors instead of copying them, for a caller that copies what it keeps; mapped from
    a file, they need no memory. overrides: replace model_args (dropout, for example). UserError names what does not
    fit.
    """
    try:
        if problem := schema.model_problem(state['model_args'], state['model']):
            raise ValueError(problem)
        config = GPTConfig(**{**state['model_args'], **overrides})
        model = gpt2.uninitialized(config, dtype)
        if rank := lora.rank_of(state['model']):
            lora.adapt(model, rank)
        if dtype == torch.int8:
            int8.use_int8(model)
    except (TypeError, ValueError) as error:
        raise UserError(f'{path}: model_args do not describe a model of this program: {error}') from error
    if mismatch := state_dict_mismatch(model.state_dict(), state['model']):
        raise UserError(f'{path}: {mismatch}; was model_args changed?')
    if assign:  # the memory of the undefined weights has not been touched, so it was never taken
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state['model'].items()}, assign=True)
        if config.tie_weights:
            model.lm_head.weight = model.transformer.wte.weight
    else:
        model.load_state_dict(state['model'])
    return model.eval()


def cast_matrices(model, dtype):
    """Cast the matrices of a GPT that is not trained to `dtype`, once, and compute in it; embeddings are not changed.

    Its numbers are those of a model that casts at every forward pass. A tied head becomes a separate tensor.
    """
    model.requires_grad_(False).set_compute_dtype(dtype)
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.weight.dtype != dtype:
            for name, p in list(layer.named_parameters()):  # weight and bias
                setattr(layer, name, torch.nn.Parameter(p.to(dtype), requires_grad=False))
    return model


def state_dict_mismatch(want, have):
    """Return one line on how the tensors of `have` differ from those of `want`; '' if they fit."""
    differences = {'missing': [n for n in want if n not in have],
                   'unexpected': [n for n in have if n not in want],
                   'of another shape': [n for n in want if n in have and want[n].shape != have[n].shape]}
    for title, names in differences.items():
        if names:
            return f'{len(names)} tensors {title}, e.g. {", ".join(names[:3])}'
    return ''
