"""The models that the page shows: opened once, and opened again when train.py writes a new checkpoint."""
import threading
from dataclasses import dataclass, field
from pathlib import Path

from configurator import UserError
from lib.text import dataset
from lib.weights import load_model
from model import GPT

MOST_RUNS = 50  # log.jsonl files read below the named folders


@dataclass
class Opened:
    """A model that is ready: `version` differs from every other model's, an earlier one of the same folder included."""
    model: GPT
    tok: object
    state: dict  # the checkpoint without its tensors
    version: int
    cache: dict = field(default_factory=dict)  # results worth keeping while this model is shown


def signature(path):
    """Return what changes when a file is replaced or written to, or None where it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def usable(name, model, tok, state):
    """Raise UserError where a model that could be read cannot be used."""
    if load_model.has_nan(model):
        raise UserError(f'{name}: the checkpoint contains NaN (iter {state.get("iter_num", "unknown")})')
    if tok.vocab_size > model.config.vocab_size:
        raise UserError(f'{name}: the model has {model.config.vocab_size} tokens, its tokenizer ({tok.kind}) '
                        f'{tok.vocab_size}: they do not belong together')


class Models:
    """The named models. Only the worker's thread computes with them; `describe` may be called from any thread."""

    def __init__(self, folders, pretrained, rt):
        """folders: run folders, which may have no checkpoint yet. pretrained: an init_from other than resume, or ''."""
        self.folders, self.rt = list(dict.fromkeys(folders)), rt
        self.names = self.folders + [pretrained] * bool(pretrained)
        self.pretrained = pretrained
        self.opened, self.signatures, self.problems = {}, {}, {}
        self.versions, self.lock = 0, threading.Lock()

    def get(self, name):
        """Return the newest Opened of a model; UserError where there is none.

        A checkpoint that cannot be read leaves the model that was opened before it in place.
        """
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
            model, tok, state = load_model.open_model(init_from, out_dir, self.rt.dtype)
            usable(name, model, tok, state)
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
        """Return what the page shows of each model, a dict each."""
        return [self._describe(name) for name in self.names]

    def _describe(self, name):
        found = {'name': name, 'problem': self.problems.get(name, '')}
        with self.lock:
            opened = self.opened.get(name)
        if opened is None:
            return found | {'ready': False}
        config, state, tok = opened.model.config, opened.state, opened.tok
        changed = name in self.folders and signature(Path(name) / 'ckpt.pt') not in (None, self.signatures[name])
        best = state.get('best_val_loss')
        return found | {
            'ready': True, 'changed': changed, 'version': opened.version, 'params': opened.model.num_params(),
            'tokenizer': tok.kind, 'vocab_size': tok.vocab_size, 'block_size': config.block_size,
            'layers': config.n_layer, 'heads': config.n_head, 'iter': state.get('iter_num'),
            'val_loss': round(float(best), 4) if isinstance(best, (int, float)) and abs(best) < 1e6 else None,
            'chat': chat_marks(opened) is not None, 'passages': _dataset_name(state) != ''}

    def wanted(self):
        """Return the names of models that were not opened yet although their checkpoint exists by now."""
        return [name for name in self.folders if name not in self.opened
                and signature(Path(name) / 'ckpt.pt') not in (None, self.signatures.get(name))]

    def logs(self):
        """Return {run name: its log.jsonl} of the named folders and of the runs in folders right below them."""
        found = {}
        for name in self.folders:
            folder = Path(name)
            for path in [folder / 'log.jsonl', *sorted(folder.glob('*/log.jsonl'))]:
                inside = path.resolve().is_relative_to(folder.resolve())  # a link may lead elsewhere
                if inside and path.is_file() and len(found) < MOST_RUNS:
                    found[path.parent.as_posix()] = path
        return found


def chat_marks(opened):
    """Return the checkpoint's dialogue marks {'user', 'assistant', 'end'}, or None where it has none."""
    marks = opened.state.get('chat')
    known = isinstance(marks, dict) and all(isinstance(marks.get(k), str) for k in ('user', 'assistant', 'end'))
    return marks if known and marks['end'] else None


def _dataset_name(state):
    """Return the dataset a checkpoint was trained on, '' where it is none of the folders right below data/."""
    config = state.get('config')
    name = config.get('dataset') if isinstance(config, dict) else None
    if not isinstance(name, str) or not name or name.startswith('.') or any(c in name for c in '/\\:\0'):
        return ''
    return name if (dataset.folder(name) / 'val.bin').is_file() else ''


def passage(opened, place, n_tokens):
    """Return about n_tokens of the validation split as text. place: 0 to 1, where in the split it begins.

    UserError where the split is not on this machine, or is encoded by another tokenizer.
    """
    name = _dataset_name(opened.state)
    if not name:
        raise UserError('the dataset that this model was trained on is not on this machine')
    if 'val' not in opened.cache:
        data = dataset.open_dataset(name, 1)
        if data.tokenizer != opened.tok.spec:
            raise UserError(f'data/{name} was prepared again with another tokenizer since this model was trained')
        opened.cache['val'] = data.val.tokens
    tokens = opened.cache['val']
    start = int(place * max(0, len(tokens) - n_tokens))
    return opened.tok.decode(tokens[start:start + n_tokens].tolist()).strip('\ufffd')
