"""Export a checkpoint as a folder that Hugging Face's transformers, and programs built on it, can load.

    python export.py --out_dir=out-shakespeare                       writes out-shakespeare/hf
    python export.py --out_dir=out-shakespeare --to=my-gpt2          writes my-gpt2
    python sample.py --init_from=my-gpt2                             train.py and evaluate.py read it, too

The folder holds config.json, model.safetensors and the tokenizer. Only GPT-2's architecture can be exported: the
options pos, norm, qk_norm, tie_weights, softcap, smear and most of mlp do not exist in transformers' GPT-2 class.
config/gpt2_classic.py after another config trains a model that can be exported.
"""
import json
import math
import sys
from pathlib import Path

import torch

from configurator import UserError, configure
from lib.machine.files import atomic_write
from lib.text import dialogue
from lib.weights.load_model import load_model
from model import NANOGPT_ARGS

init_from = 'resume'  # resume (OUT_DIR/ckpt.pt) | gpt2 ... gpt2-xl | a run's folder or one with GPT-2 weights
out_dir = 'out'  # folder of the training run, relative to the working directory
to = ''  # folder to write; '' = OUT_DIR/hf

EXPRESSIBLE = {'mlp': ('gelu_tanh',)}  # options beside the default ones that transformers' GPT-2 class has


def hf_config(config, tok):
    """Return the content of config.json for a GPTConfig; UserError names the options that transformers' GPT-2 lacks."""
    lacking = [f'{name}={value}' for name, value in config.model_args().items()  # options that are not the default
               if name not in NANOGPT_ARGS and value not in EXPRESSIBLE.get(name, ())]
    if lacking:
        raise UserError(f"{', '.join(lacking)}: transformers' GPT-2 class does not have this, so the model cannot be "
                        'exported; train one with config/gpt2_classic.py after your config, which can')
    return {
        'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'vocab_size': config.vocab_size,
        'n_positions': config.block_size, 'n_embd': config.n_embd, 'n_layer': config.n_layer, 'n_head': config.n_head,
        'activation_function': 'gelu_new' if config.mlp == 'gelu_tanh' else 'gelu', 'layer_norm_epsilon': 1e-5,
        'resid_pdrop': config.dropout, 'embd_pdrop': config.dropout, 'attn_pdrop': config.dropout,
        'bos_token_id': tok.eot, 'eos_token_id': tok.eot, 'tie_word_embeddings': True, 'dtype': 'float32',
    }


def hf_tensors(model):
    """Return the weights under transformers' names: matrices are transposed to (in, out), missing biases are zero."""
    tensors = {}
    for name, p in model.named_parameters():
        p = p.detach().float()
        in_block = name.startswith('transformer.h.') and p.dim() == 2
        tensors[name] = (p.t() if in_block else p).contiguous()
        if not model.config.bias and (in_block or '.ln_' in name):
            tensors[name.removesuffix('weight') + 'bias'] = torch.zeros(len(p))
    return tensors


def halves(token, ranks):
    """Return the two tokens that byte pair encoding merged into `token` (bytes); ranks: {token: its rank}."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def hf_tokenizer(tok):
    """Return `tok` as a Tokenizer of the package tokenizers, with the same ids for the same text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    if tok.kind == 'char':
        made = Tokenizer(models.BPE({char: i for i, char in enumerate(tok.chars)}, []))
        made.decoder = decoders.Fuse()
        return made
    # the library writes each byte as a letter: printable Latin-1 as itself, the others from U+0100 on, in order
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    hidden = sorted(set(range(256)) - set(map(ord, letters)))
    letter_of = {ord(c) if ord(c) < 256 else hidden[ord(c) - 256]: c for c in letters}
    ids = {tok.decode_bytes([i]): i for i in range(tok.vocab_size) if i != tok.eot}
    written = {token: ''.join(letter_of[byte] for byte in token) for token in ids}
    merges = [tuple(written[half] for half in halves(token, ids)) for token in ids if len(token) > 1]
    vocabulary = {written[token]: i for token, i in ids.items()}
    if tok.eot is not None:
        vocabulary[tok.separator] = tok.eot
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if tok.eot is not None:
        made.add_special_tokens([tok.separator])
    return made


def write_json(path, value):
    with atomic_write(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=2)


def write_tokenizer(tok, folder, marks=None):
    """Write tokenizer.json and the other files that transformers reads into the folder.

    marks: those of dialogues, for a chat template; None if there are none.
    """
    special = {} if tok.eot is None else {f'{name}_token': tok.separator for name in ('bos', 'eos', 'unk')}
    if marks:
        special['chat_template'] = dialogue.chat_template(marks)
    made = hf_tokenizer(tok)
    with atomic_write(folder / 'tokenizer.json') as temporary:
        made.save(str(temporary))
    kind = 'PreTrainedTokenizerFast' if tok.kind == 'char' else 'GPT2TokenizerFast'
    write_json(folder / 'tokenizer_config.json', {'tokenizer_class': kind, **special})
    if tok.eot is not None:
        made.model.save(str(folder))  # vocab.json and merges.txt, which older programs read


# What this writes. config.json is written last and removed first: a folder without it is not complete.
FILES = ('config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt',
         'chat.json', 'tokenizer_spec.json')


def clear(folder):
    """Remove an earlier export from the folder; UserError if its files are not those of an earlier export.

    Stale shards or a tokenizer of another model would be read together with the new weights.
    """
    found = sorted(p.name for p in folder.iterdir() if p.name in FILES or p.match('*.safetensors*')
                   or p.match('pytorch_model*'))
    if foreign := [name for name in found if name not in FILES or not (folder / 'tokenizer_spec.json').is_file()]:
        raise UserError(f'{folder} holds {foreign[0]}, which export.py has not written there; name another folder with '
                        '--to')
    for name in sorted(found, key=FILES.index):
        (folder / name).unlink()


def main(argv=None):
    configure(globals(), argv)
    from safetensors.torch import save_file
    folder = Path(to or Path(out_dir) / 'hf')
    model, tok, state = load_model(init_from, out_dir)
    marks = state.get('chat')
    config = hf_config(model.config, tok)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        write_json(folder / 'tokenizer_spec.json', tok.spec)  # what this program reads
        with atomic_write(folder / 'model.safetensors') as temporary:
            save_file(hf_tensors(model), temporary, metadata={'format': 'pt'})
        if marks:
            write_json(folder / 'chat.json', marks)  # likewise
        try:
            write_tokenizer(tok, folder, marks)
        except (UserError, ImportError) as error:  # the model can be used without them
            print(f'no tokenizer files: {getattr(error, "message", error)}', file=sys.stderr)
        write_json(folder / 'config.json', config)
    except OSError as error:
        raise UserError(f'cannot write {folder} ({error.strerror}); name another folder with --to') from error
    print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')
    print(f'wrote {", ".join(sorted(p.name for p in folder.iterdir()))} to {folder}')


if __name__ == '__main__':
    main()
