"""The models that the page shows: opened once, and again when train.py has written a new checkpoint."""
import threading
from dataclasses import dataclass, field
from pathlib import Path

from configurator import UserError
from lib.text import data_folder
from lib.weights.load_model import load_model
from model import GPT

MOST_RUNS = 50  # log.jsonl files to read in the named folders, at most


@dataclass
class Opened:
    """A model that is ready. version: a new number each time that a model is opened."""
    model: GPT
    tok: object
    state: dict  # the checkpoint without its tensors
    version: int
    cache: dict = field(default_factory=dict)  # results to reuse while this model is shown


def signature(path):
    """Return a value that changes when the file is replaced or written to; None if it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class Models:
    """The named models. Only the worker thread may call `get`; any thread may call the other methods."""

    def __init__(self, folders, pretrained, rt):
        """folders: run folders, which may have no checkpoint yet. pretrained: an init_from other than resume, or ''."""
        self.folders, self.rt = list(dict.fromkeys(folders)), rt
        self.names = self.folders + [pretrained] * bool(pretrained)
        self.pretrained = pretrained
        self.opened, self.signatures, self.problems = {}, {}, {}
        self.versions, self.lock = 0, threading.Lock()

    def get(self, name):
        """Return the Opened model `name` from its newest readable checkpoint; UserError if there is no such model."""
        if name not in self.names:
            raise UserError(f'no model {str(name)[:100]!r} here; play.py was started with {", ".join(self.names)}')
        path = Path(name) / 'ckpt.pt'
        current = signature(path) if name in self.folders else 'pretrained'
        if name not in self.signatures or current not in (None, self.signatures[name]):
            self.signatures[name] = current
            self._open(name)
        if name not in self.opened:
            raise UserError(self.problems.get(name) or f'{path} not found; train.py writes it at its first evaluation')
        return self.opened[name]

    def _open(self, name):
        try:
            init_from, out_dir = ('resume', name) if name in self.folders else (name, '')
            model, tok, state = load_model(init_from, out_dir, self.rt.dtype)
            kept = {key: value for key, value in state.items() if key not in ('model', 'optimizer', 'rng')}
            with self.lock:
                self.versions += 1
                self.opened[name] = Opened(model.to(self.rt.device, self.rt.dtype), tok, kept, self.versions)
                self.problems.pop(name, None)
        except UserError as error:
            self.problems[name] = error.message
            if name not in self.folders:
                raise

    def describe(self):
        """Return a list with one dict per model, as the page shows it."""
        return [self._describe(name) for name in self.names]

    def _describe(self, name):
        found = {'name': name, 'problem': self.problems.get(name, '')}
        with self.lock:
            opened = self.opened.get(name)
        if opened is None:
            return found | {'ready': False}
        config, state, tok = opened.model.config, opened.state, opened.tok
        changed = name in self.folders and signature(Path(name) / 'ckpt.pt') not in (None, self.signatures[name])
        return found | {
            'ready': True, 'changed': changed, 'version': opened.version, 'params': opened.model.get_num_params(),
            'tokenizer': tok.kind, 'vocab_size': tok.vocab_size, 'block_size': config.block_size,
            'layers': config.n_layer, 'heads': config.n_head,
            'iter': _number(state, 'iter_num', 1e15), 'val_loss': _number(state, 'best_val_loss', 1e6),
            'chat': chat_marks(opened) is not None, 'passages': _dataset_name(state) != ''}

    def wanted(self):
        """Return the models that are not open although their checkpoint now exists."""
        return [name for name in self.folders if name not in self.opened
                and signature(Path(name) / 'ckpt.pt') not in (None, self.signatures.get(name))]

    def logs(self):
        """Return {run name: path of its log.jsonl} for the named folders and their direct subfolders."""
        found = {}
        for name in self.folders:
            folder = Path(name)
            for path in [folder / 'log.jsonl', *sorted(folder.glob('*/log.jsonl'))]:
                inside = path.resolve().is_relative_to(folder.resolve())  # a link may point outside
                if inside and path.is_file() and len(found) < MOST_RUNS:
                    found[path.parent.as_posix()] = path
        return found


def _number(state, key, limit):
    """Return a number of a checkpoint, which may hold it as a tensor; None if it is missing or at least `limit`."""
    try:
        value = float(state[key])
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None
    return value if abs(value) < limit else None


def chat_marks(opened):
    """Return the checkpoint's dialogue marks {'user', 'assistant', 'end'}, or None if it has none."""
    marks = opened.state.get('chat')
    known = isinstance(marks, dict) and all(isinstance(marks.get(k), str) for k in ('user', 'assistant', 'end'))
    return marks if known and marks['end'] else None


def _dataset_name(state):
    """Return the name of the dataset a checkpoint was trained on, '' if it is not a folder in data/."""
    config = state.get('config')
    name = config.get('dataset') if isinstance(config, dict) else None
    if not isinstance(name, str) or not name or name.startswith('.') or any(c in name for c in '/\\:\0'):
        return ''
    return name if (data_folder.folder(name) / 'val.bin').is_file() else ''


def passage(opened, place, n_tokens):
    """Return n_tokens of the validation split as text, from the beginning of a line if one is near.

    place: its position in the split, from 0 to 1.
    UserError if the dataset is not on this machine or has another tokenizer.
    """
    name = _dataset_name(opened.state)
    if not name:
        raise UserError('the dataset that this model was trained on is not on this machine')
    if 'val' not in opened.cache:
        spec, _, files, _ = data_folder.read(name)
        if spec != opened.tok.spec:
            raise UserError(f'data/{name} was prepared again with another tokenizer since this model was trained')
        _, opened.cache['val'], *_ = files['val']
    tokens = opened.cache['val']
    start = int(place * max(0, len(tokens) - n_tokens))
    text = opened.tok.decode(tokens[start:start + n_tokens].tolist()).strip('\ufffd')
    line = text[:len(text) // 4].find('\n') + 1 if start else 0
    return text[line:].lstrip('\n')
