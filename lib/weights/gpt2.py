"""OpenAI's GPT-2 and models in its Hugging Face layout: config, weights and tokenizer, from the hub or a folder."""
import socket
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.nn as nn

from configurator import UserError, find_path
from lib.machine.console import reason
from lib.text.download import HUB_MIRROR
from lib.text.schema import parse_json, read_json, spec_problem
from lib.weights import int8, schema
from lib.weights.archive import read_archive, strip_prefix
from model import GPT, GPTConfig

SIZES = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    'gpt2-medium': dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
N_IDS, LARGEST_PADDED = 50257, 51200  # GPT-2's tokens, and the largest padded size that is in use


@dataclass
class Source:
    """Where GPT-2 weights come from. folder: a local folder, or None for a model of the hub."""
    name: str  # what the user typed as init_from
    folder: Path | None

    def error(self, message):
        return UserError(f'init_from={self.name}: {message}')

    def read_json(self, filename):
        """Return (path, parsed content) of a JSON file in the folder, or (path, None) if it does not exist."""
        path = self.folder / filename
        try:
            return path, read_json(path)
        except FileNotFoundError:
            return path, None
        except (ValueError, OSError) as error:
            raise self.error(f'{path} is damaged ({type(error).__name__}: {error})') from error

    def config(self):
        """Return the GPTConfig; UserError if there is none, or if this program cannot compute what it asks for."""
        if not self.folder:
            return GPTConfig(vocab_size=50257, mlp='gelu_tanh', **SIZES[self.name])
        path, have = self.read_json('config.json')
        if have is None:
            raise self.error(f'{path} not found; the folder must hold ckpt.pt, or config.json and model.safetensors')
        defaults = {'block_size': 1024, 'vocab_size': 50257, **SIZES['gpt2']}  # those of transformers' GPT2Config
        try:
            sizes = {ours: have.get({'block_size': 'n_positions'}.get(ours, ours), default)
                     for ours, default in defaults.items()}
            if odd := [name for name, size in sizes.items() if type(size) is not int]:
                raise ValueError(f'{odd[0]} is not a whole number')
        except (ValueError, AttributeError) as error:
            raise self.error(f'{path} is damaged ({error})') from None
        supported = {
            'model_type': ('gpt2',), 'layer_norm_epsilon': (1e-5,), 'n_inner': (None, 4 * sizes['n_embd']),
            'activation_function': ('gelu_new', 'gelu_pytorch_tanh', 'gelu'), 'tie_word_embeddings': (True,),
            'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,), 'add_cross_attention': (False,)}
        for key, values in supported.items():
            if have.get(key, values[0]) not in values:
                raise self.error(f'{path}: {key}={have[key]!r}; this program supports only {values[0]!r}')
        config = GPTConfig(mlp='gelu' if have.get('activation_function') == 'gelu' else 'gelu_tanh', **sizes)
        if errors := config.validate():
            raise self.error(f'{path}: {"; ".join(errors)}')
        return config

    def tokenizer_spec(self):
        """Return the tokenizer spec: GPT-2's, or the one that export.py left in the folder.

        UserError if the folder has another vocabulary.
        """
        if not self.folder:
            return {'kind': 'gpt2'}
        path, spec = self.read_json('tokenizer_spec.json')
        if spec is not None:
            if problem := spec_problem(spec):
                raise self.error(f'{path} is damaged: its tokenizer {problem}')
            return spec
        self._check_tokenizer_is_gpt2s()
        return {'kind': 'gpt2'}

    def _check_tokenizer_is_gpt2s(self):
        """Raise UserError if the files in the folder show another vocabulary than GPT-2's 50,257 tokens."""
        vocabulary, added = {}, {}
        for filename in ('vocab.json', 'tokenizer.json', 'added_tokens.json', 'tokenizer_config.json'):
            path, content = self.read_json(filename)
            try:
                if filename == 'vocab.json':
                    vocabulary = content or {}
                elif filename == 'added_tokens.json':
                    added.update(content or {})
                elif filename == 'tokenizer.json' and content:
                    vocabulary = vocabulary or content['model']['vocab']
                    added.update({token['content']: token['id'] for token in content.get('added_tokens', ())})
                elif content:
                    decoder = content.get('added_tokens_decoder') or {}
                    added.update({token['content']: int(number) for number, token in decoder.items()})
                known = not vocabulary or vocabulary.items() >= {'\u0120the': 262, '\u0120gazed': 50255}.items()
                beyond = sorted((number, token) for token, number in {**vocabulary, **added}.items() if number >= N_IDS)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self.error(f'{path} is damaged ({type(error).__name__}: {error})') from error
            if not known:
                raise self.error(f"{path} is not GPT-2's vocabulary, the only one that this program reads")
            if beyond:
                raise self.error(f"{path} adds {len(beyond)} tokens to GPT-2's {N_IDS:,}, such as {beyond[0][1]!r} = "
                                 f'{beyond[0][0]}; this program can neither read nor write them')
        others = sorted(p.name for p in self.folder.iterdir() if p.suffix in ('.model', '.bpe.model', '.spm')
                        or p.name == 'vocab.txt' or p.name.endswith(('-vocab.json', '_vocab.json', '-vocab.txt')))
        if others and not vocabulary:
            raise self.error(f"{self.folder} has another tokenizer than GPT-2's ({others[0]}), and this program reads "
                             'only that one')
        _, config = self.read_json('config.json')
        size = config.get('vocab_size') if type(config) is dict else None
        size = size if type(size) is int else N_IDS  # `config` names what is wrong with it
        if size > N_IDS and size % 8:  # multiples of 8 and more are made for speed; nothing is ever added in them
            raise self.error(f"config.json has vocab_size={size}: {size - N_IDS} tokens more than GPT-2's tokenizer, "
                             'and the folder has no file that names them')
        if size > LARGEST_PADDED and not vocabulary:
            raise self.error(f"config.json has vocab_size={size}, GPT-2's tokenizer has {N_IDS:,}, and the folder has "
                             'no tokenizer')

    def files(self):
        """Return the paths of the safetensors files; UserError with the remedy if they cannot be found."""
        if not self.folder:
            return [self._download()]
        for single in ('model.safetensors', 'pytorch_model.bin'):
            if (self.folder / single).is_file():
                return [self.folder / single]
            path, index = self.read_json(f'{single}.index.json')
            if index is None:
                continue
            try:
                names = sorted(set(index['weight_map'].values()))
                if not names:
                    raise ValueError('it names no file')
                if odd := [name for name in names if Path(name).name != name]:
                    raise ValueError(f'{odd[0]!r} is not the name of a file')
                missing = [name for name in names if not (self.folder / name).is_file()]
            except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:  # OSError: a name too long
                raise self.error(f'{path} is damaged ({type(error).__name__}: {error})') from None
            if missing:
                raise self.error(f'{self.folder / missing[0]} not found; copy it from where config.json came from')
            return [self.folder / name for name in names]
        unknown = ('.h5', '.msgpack', '.onnx', '.gguf', '.ot')
        found = sorted(p.name for p in self.folder.iterdir() if p.suffix in unknown)
        has = f'. {found[0]} is of a kind that this program does not read' if found else ''
        raise self.error(f'{self.folder / "model.safetensors"} not found, nor pytorch_model.bin; copy it from where '
                         f'config.json came from{has}')

    def _download(self):
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.utils.logging import set_verbosity_error
        for repository in (f'openai-community/{self.name}', self.name):  # its present name, and that of older caches
            found = try_to_load_from_cache(repository, 'model.safetensors')
            if isinstance(found, str):
                return found
        set_verbosity_error()  # each of its six tries prints a line
        try:
            check_connection(constants.ENDPOINT)  # the hub's own tries take half a minute
            return hf_hub_download(f'openai-community/{self.name}', 'model.safetensors')
        except Exception as error:  # network, hub, proxy and disk have their own kinds of error
            raise self.error(
                f'{self.name} is not in the cache and cannot be downloaded; {HUB_MIRROR}, or put config.json '
                f'and model.safetensors of huggingface.co/openai-community/{self.name} into a folder and use '
                f'--init_from=FOLDER (in China: modelscope download --model AI-ModelScope/{self.name} --local_dir '
                f'FOLDER). Reason: {reason(error)}'
            ) from None

    @torch.no_grad()
    def load(self, dropout=0.0, block_size=0, dtype=torch.float32):
        """Return the GPT in eval mode on the CPU, with weights of `dtype`; int8 is for sampling only (int8.py).

        block_size: the context to crop it to; 0 = all. The files are mapped and copied one tensor at a time, so that
        memory holds the model once. UserError names the file or tensor that is missing or wrong.
        """
        config = self.config()
        config.dropout = dropout
        paths, head = self.files(), None
        size = sum(Path(path).stat().st_size for path in paths)
        if self.folder and size > 1000 and (problem := schema.size_problem(config, size, size // 1000)):
            raise self.error(f'config.json does not belong to {paths[0]}: {problem} bytes')
        model = uninitialized(config, dtype)
        quantized = dtype == torch.int8
        missing = int8.use_int8(model) if quantized else dict(model.named_parameters())
        for path in paths:
            for name, tensor in self._tensors(path):
                plain = strip_prefix(name).removeprefix('transformer.')
                stem, _, leaf = plain.rpartition('.')
                if stem.endswith('.attn'):
                    continue  # buffers of the causal mask
                if problem := schema.tensor_problem(tensor):
                    raise self.error(f'{path}: {name} {problem}')
                if not quantized:
                    tensor = tensor.to(dtype)  # before the transposition: torch transposes fast if the dtypes agree
                if plain == 'lm_head.weight':
                    head = tensor
                    continue
                target = missing.pop(f'transformer.{stem}.{leaf}', None)
                if target is None:
                    if not stem.startswith(('h.', 'wte', 'wpe', 'ln_f')):
                        raise self.error(f'{path}: {name} belongs to a head for another task than writing text')
                    raise self.error(f'{path}: unexpected tensor {name}; does config.json belong to this model?')
                if stem.startswith('h.') and leaf == 'weight':
                    tensor = tensor.t()  # Conv1D stores (in, out), Linear (out, in); vectors are unchanged
                if target.shape != tensor.shape:
                    raise self.error(f'{path}: {name} gives {tuple(tensor.shape)}, expected {tuple(target.shape)}; '
                                     'does config.json belong to this model?')
                target.copy_(tensor)
        if missing:
            raise self.error(f'{path} lacks {len(missing)} tensors of the model, e.g. {next(iter(missing))}')
        embedding = model.transformer.wte.weight
        if head is not None and not torch.equal(head.to(embedding.dtype), embedding):
            raise self.error(f'{path}: lm_head.weight differs from the embedding, which is the output head of a GPT-2')
        if quantized:
            model.lm_head.copy_(embedding)
        if block_size:
            crop_block_size(model, block_size)
        return model.eval()

    def _tensors(self, path):
        """Yield (name, tensor) of a safetensors or torch file; tensors are mapped, not read. UserError if damaged."""
        if Path(path).suffix == '.bin':
            content = read_archive(path, mmap=True)
            if type(content) not in (dict, OrderedDict) or not all(type(name) is str for name in content):
                raise self.error(f'{path} is not a dictionary of tensors')
            yield from content.items()
            return
        from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, framework='pt') as file:
                names = list(file.keys())
            for name in names:
                with safe_open(path, framework='pt') as file:  # reopened, so that what was read leaves memory
                    tensor = file.get_tensor(name)
                yield name, tensor
        except (SafetensorError, OSError) as error:
            raise self.error(f'{path} {_describe_damage(path, error)}; fetch it again') from None


def uninitialized(config, dtype=torch.float32):
    """Return a GPT whose weights, of `dtype` (bfloat16 for int8), are undefined; the caller fills them all."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if dtype == torch.int8 else dtype)
    try:
        return GPT(config, init=False)
    finally:
        torch.set_default_dtype(default)


def crop_block_size(model, block_size):
    """Shorten the context of a GPT, for instance GPT-2's 1024 tokens, in place; ValueError if it would grow."""
    if block_size > model.config.block_size:
        raise ValueError(f'block_size={block_size} but the model has {model.config.block_size} positions')
    model.config.block_size = block_size
    if model.config.pos == 'rope':
        model.rope = model.rope[:, :block_size]
    else:
        model.transformer.wpe.weight = nn.Parameter(model.transformer.wpe.weight[:block_size].clone())
        model.transformer.wpe.num_embeddings = block_size


def find(init_from):
    """Return the Source that `init_from` names, one of SIZES or a local folder; None if it is neither."""
    if init_from in SIZES:
        return Source(init_from, None)
    folder = find_path(init_from) if init_from else None
    return Source(init_from, folder) if folder and folder.is_dir() else None


def check_connection(address, seconds=3):
    """Raise OSError if the host of `address` does not accept a connection within a few seconds.

    With a proxy nothing is checked: the host then need not be reachable from here.
    """
    parts = urlsplit(address)
    if parts.scheme not in getproxies():
        socket.create_connection((parts.hostname, parts.port or {'http': 80}.get(parts.scheme, 443)), seconds).close()


def _describe_damage(path, error):
    """Return which tensor of an incomplete safetensors file is cut off, if its header can be read."""
    size = Path(path).stat().st_size
    try:  # eight bytes give the length of a JSON header, which gives the offsets of each tensor after it
        with open(path, 'rb') as file:
            start = 8 + int.from_bytes(file.read(8), 'little')
            header = parse_json(file.read(min(start - 8, size)))
        ends = {name: start + entry['data_offsets'][1] for name, entry in header.items() if name != '__metadata__'}
        name = next(name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size)
        return f'is cut off in {name} ({size:,} of {max(ends.values()):,} bytes)'
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return f'is not a complete safetensors file ({size:,} bytes; {error})'
