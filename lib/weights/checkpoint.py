"""Checkpoints: written whole or not at all, checked before use, and never able to run code.

A checkpoint is a torch zip file of tensors and plain values with nanoGPT's keys. In `out_dir`, ckpt.pt is the model
to use; last.pt is the newest training state and last.prev.pt the one before it.
"""
import os
import pickle
import shutil
import socket
import sys
import zipfile
from pathlib import Path

import torch

from configurator import UserError

try:
    import fcntl
except ImportError:  # Windows: two runs in one out_dir are then not told apart
    fcntl = None

FORMAT = 2  # nanoGPT's, without a `format` key, counts as 1
RUN_FILES = ('ckpt.pt', 'last.pt', 'last.prev.pt', 'log.jsonl', 'loss.png', 'tensorboard')


def _check_plain(value, where):
    """Raise UserError where `value` holds anything that a safe load would later refuse."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(inner, f'{where}[{key!r}]')
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            _check_plain(inner, f'{where}[{i}]')
    elif not isinstance(value, torch.Tensor) and type(value) not in (str, int, float, bool, type(None)):
        raise UserError(f'{where} is a {type(value).__name__}: a checkpoint holds only tensors and plain values')


def _sync_folder(folder):
    if hasattr(os, 'O_DIRECTORY'):  # a rename is durable once its folder is; Windows has no such call
        fd = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _link(source, target):
    """Make `target` the same file as `source`, in one step; a copy where there are no hard links."""
    tmp = target.with_name(f'{target.name}.tmp.{os.getpid()}')
    tmp.unlink(missing_ok=True)
    try:
        os.link(source, tmp)
    except OSError:
        shutil.copyfile(source, tmp)
    os.replace(tmp, target)


def _link_or_tell(source, target):
    """Link as above; returns why it cannot be done, or ''. On Windows a file that another program reads stays."""
    try:
        _link(source, target)
    except OSError as error:
        target.with_name(f'{target.name}.tmp.{os.getpid()}').unlink(missing_ok=True)
        return error.strerror or str(error)
    return ''


def _estimate(value):
    """Return the bytes of all tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_estimate, inner))


def save(path, state, keep_previous=False, also=None):
    """Write `state` to `path` so that at every instant `path` holds the old file or the new one, whole.

    keep_previous: what `path` held before stays as NAME.prev.SUFFIX. also: a second path that gets the same file,
    first: a run killed between the two does the steps to it again, and saves the same. Raises UserError naming what
    cannot be written, which is then unchanged; the other path is written all the same.
    """
    path = Path(path)
    _check_plain(state, 'checkpoint')
    tmp = path.with_name(f'{path.name}.tmp.{os.getpid()}')
    try:
        with open(tmp, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        missed = _link_or_tell(tmp, Path(also)) if also is not None else ''
        if keep_previous and path.exists():
            _link(path, path.with_suffix(f'.prev{path.suffix}'))
        os.replace(tmp, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        need, free = _estimate(state) / 2**30, shutil.disk_usage(path.parent).free / 2**30
        raise UserError(f'could not write {path}: it needs about {need:.2f} GiB, {free:.2f} GiB are free '
                        f'({str(error).splitlines()[0]}). What {path.name} held before is unchanged.') from error
    finally:
        tmp.unlink(missing_ok=True)
    if missed:
        raise UserError(f'could not write {also} ({missed}); what it held before is unchanged, and {path} is written')


def load(path, mmap=False):
    """Return the checkpoint at `path` on the CPU, verified; UserError names the file and what is wrong with it.

    mmap: map the file instead of reading it, for readers that need little of it.
    """
    path = Path(path)
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 6):
        raise UserError(f'torch {torch.__version__} cannot load checkpoints safely (CVE-2025-32434); '
                        'upgrade to >= 2.10')
    if not path.is_file():
        raise UserError(f'{path} not found')
    size = path.stat().st_size
    with open(path, 'rb') as f:
        magic = f.read(4)
    if magic != b'PK\x03\x04':
        raise UserError(f'{path} is empty' if size == 0 else f'{path} is not a checkpoint of this program')
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # zipfile meets damage with a dozen kinds of exception
        raise UserError(f'{path} is incomplete or damaged ({size} bytes; {error})') from error
    if bad:
        raise UserError(f'{path} is corrupt: checksum mismatch in {bad}')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(f'{path} holds Python objects other than tensors and plain values; refusing') from error
    except Exception as error:
        raise UserError(f'{path} is damaged ({str(error).splitlines()[0]})') from error
    if not (isinstance(state, dict) and all(isinstance(state.get(key), dict) for key in ('model', 'model_args'))):
        raise UserError(f'{path} is not a checkpoint of this program: it has no model and model_args')
    if odd := [name for name, tensor in state['model'].items() if not isinstance(tensor, torch.Tensor)]:
        raise UserError(f'{path} is not a checkpoint of this program: {odd[0]} is not a tensor')
    state['model'] = {_bare(name): tensor for name, tensor in state['model'].items()}
    return state


def _bare(name):
    """Return a parameter's name without what torch.compile and DDP put before it in other programs' files."""
    for prefix in ('module.', '_orig_mod.'):
        name = name.removeprefix(prefix)
    return name


def newest(out_dir):
    """Return (path, checkpoint) of the newest whole training state in `out_dir`, or None where there is none at all.

    What is passed over is said on stderr; UserError when files are there but none is whole.
    """
    passed_over = []
    for name in ('last.pt', 'last.prev.pt', 'ckpt.pt'):
        path = Path(out_dir) / name
        if not path.exists():
            continue
        try:
            state = load(path)
            if missing := [key for key in ('optimizer', 'iter_num', 'best_val_loss') if key not in state]:
                raise UserError(f'{path} has no {" and no ".join(missing)}: a model, but not a training state')
        except UserError as error:
            passed_over.append(error.message)
            continue
        for message in passed_over:
            print(f'warning: {message}; using {path} (iter {state.get("iter_num", 0)})', file=sys.stderr)
        return path, state
    if passed_over:
        raise UserError('; '.join(passed_over) + '; no whole checkpoint is left to resume from')
    return None


def folder_problem(out_dir):
    """Return why `out_dir` cannot be made or written, as far as looking tells, or ''."""
    path = Path(out_dir).absolute()
    while not path.exists():
        path = path.parent
    writable = path.is_dir() and os.access(path, os.W_OK)
    return '' if writable else f'out_dir {str(out_dir)!r} is not a writable folder; choose another'


def claim(out_dir):
    """Make `out_dir` and hold it for this process; returns the lock to keep while running.

    Removes what a killed run left half-written. UserError where the folder cannot be written or another run has it.
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / '.lock', 'a+', encoding='utf-8')
    except OSError as error:
        raise UserError(f'out_dir {str(out_dir)!r} is not a writable folder ({error.strerror}); '
                        'choose another') from error
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(f'out_dir {str(out_dir)!r} is in use by {lock.read().strip() or "another run"}; '
                            'choose another --out_dir') from None
    lock.seek(0)
    lock.truncate()
    lock.write(f'pid {os.getpid()} on host {socket.gethostname()}\n')
    lock.flush()
    for stale in out_dir.glob('*.tmp.*'):
        print(f'removing {stale}, left by a run that was killed', file=sys.stderr)
        stale.unlink()
    return lock


def put_aside(out_dir):
    """Move a run's files to out_dir/old-N/, so that a new one loses nothing; returns that folder, or None."""
    out_dir = Path(out_dir)
    files = [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]
    if not files:
        return None
    number = 1
    while (out_dir / f'old-{number}').exists():
        number += 1
    old = out_dir / f'old-{number}'
    old.mkdir()
    for path in files:
        os.replace(path, old / path.name)
    return old
