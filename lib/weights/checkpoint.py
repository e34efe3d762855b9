"""Checkpoints: written completely or not at all, checked before use, and never able to run code.

A checkpoint is a torch zip file of tensors and plain values with nanoGPT's keys. In `out_dir`, ckpt.pt is the model
to use, last.pt the newest training state and last.prev.pt the previous one.
"""
import contextlib
import errno
import functools
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import torch

from configurator import UserError
from lib.machine.distributed import first_line
from lib.machine.files import atomic_write, leftovers
from lib.weights import lora, schema
from lib.weights.archive import read_archive, strip_prefix

try:
    import fcntl
except ImportError:  # Windows: two runs in one out_dir are not noticed
    fcntl = None

FORMAT = 2  # nanoGPT's checkpoints have no key `format`; they count as 1
RUN_FILES = ('ckpt.pt', 'last.pt', 'last.prev.pt', 'log.jsonl', 'loss.png', 'tensorboard')


def _check_plain(value, where):
    """Raise UserError if `value` holds anything that a safe load would refuse later."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(inner, f'{where}[{key!r}]')
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            _check_plain(inner, f'{where}[{i}]')
    elif not isinstance(value, torch.Tensor) and type(value) not in (str, int, float, bool, type(None)):
        raise UserError(f'{where} is a {type(value).__name__}: a checkpoint holds only tensors and plain values')


def _link(source, target):
    """Make `target` the same file as `source`, in one step; a copy on file systems without hard links."""
    with atomic_write(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def n_bytes(value):
    """Return the bytes of all tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(n_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(n_bytes, value))
    return 0


def _free_space(folder):
    """Return a phrase for the free space in `folder`, which may be gone."""
    try:
        return f'{shutil.disk_usage(folder).free / 2**30:.2f} GiB are free'
    except OSError as error:
        return f'{folder} cannot be read: {error.strerror}'


def save(path, state, keep_previous=False, link_as=None):
    """Write `state` to `path` so that at every instant `path` holds the old file or the new one, complete.

    keep_previous: keep what `path` held before as NAME.prev.SUFFIX. link_as: a second path for the same file. It is
    written first, so that a run killed in between only repeats work.
    Raises UserError naming the path that cannot be written, which is then unchanged; a failing `link_as` does not stop
    `path` from being written.
    """
    path = Path(path)
    _check_plain(state, 'checkpoint')
    missed = []
    try:
        with atomic_write(path) as temporary:
            with open(temporary, 'wb') as file:  # torch would write another name into the zip file for each path
                torch.save(state, file)
            if link_as is not None:
                try:
                    _link(temporary, Path(link_as))
                except OSError as error:  # on Windows, for example, while another program reads that file
                    missed.append((link_as, error.strerror or str(error)))
            if keep_previous and path.exists():
                previous = path.with_suffix(f'.prev{path.suffix}')
                try:
                    _link(path, previous)
                except OSError as error:  # a copy on a file system without hard links may not fit
                    missed.append((previous, error.strerror or str(error)))
    except (OSError, RuntimeError, MemoryError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        space = ''
        if getattr(error, 'errno', errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            space = f': it needs about {n_bytes(state) / 2**30:.2f} GiB, {_free_space(path.parent)}'
        raise UserError(f'could not write {path}{space} ({first_line(error) or type(error).__name__}). '
                        f'What {path.name} held before is unchanged.') from error
    if missed:
        other, why = missed[0]
        raise UserError(f'could not write {other} ({why}); what it held before is unchanged, and {path} is written')


@torch.no_grad()
def has_nan(model):
    """Return whether a weight of `model` holds NaN or infinity. Under FSDP this rank looks at its own shards."""
    weights = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())  # buffers: int8's scales
    shards = (t.to_local() if hasattr(t, 'to_local') else t for t in weights)
    wider = {torch.float16: torch.float32}  # a sum of float16 may overflow
    return any(not torch.isfinite(p.sum(dtype=wider.get(p.dtype))) for p in shards)  # a sum needs no extra memory


def save_run(rt, out_dir, state, model, *, as_best, required, say=print, warn=print, run=None):
    """Write the run's state to out_dir/last.pt; rank 0 writes, every rank must call it. Returns whether it was saved.

    state: the checkpoint, complete on rank 0. model: the model whose weights it holds; if they are not all finite,
    nothing is written. as_best: make ckpt.pt the same file; a model with adapters is merged and written there instead.
    required: a failure is a UserError on every rank; otherwise it is a warning. say, warn: functions that print a line.
    run: a function that is given the one that writes, and returns why it failed, or ''; see Saver.
    """
    failure = ''
    if rt.all_reduce_max(has_nan(model))[0]:
        failure = f'the weights of iter {state["iter_num"]} are not finite; they were not saved'
    elif rt.is_master:
        say(f'saving checkpoint to {out_dir}')
        write = functools.partial(_write_run, out_dir, state, as_best, warn)
        failure = run(write) if run else write()
    if failure and not required:
        warn(failure)
    failed = rt.all_reduce_max(bool(failure))[0]
    if failed and required:
        raise UserError(failure or 'rank 0 could not save')
    return not failed


def _write_run(out_dir, state, as_best, warn):
    """Write what save_run saves; return why it failed, or ''."""
    best, adapted = Path(out_dir, 'ckpt.pt'), lora.rank_of(state['model']) > 0
    try:
        if not Path(out_dir).is_dir():  # renamed, or on a share that was unmounted
            Path(out_dir).mkdir(parents=True)
            warn(f'{out_dir} has disappeared during the run; it was created again, and the run is saved there')
        if as_best and adapted:  # without the optimizer's state, which is that of the adapters
            save(best, {key: lora.merged(value) if key == 'model' else value for key, value in state.items()
                        if key != 'optimizer'})
        save(Path(out_dir, 'last.pt'), state, keep_previous=True, link_as=best if as_best and not adapted else None)
    except UserError as error:
        return error.message
    except OSError as error:
        return f'could not write {out_dir}: {error.strerror}'
    return ''


def load(path, mmap=False):
    """Return the checkpoint at `path` on the CPU, verified; UserError names the file and what is wrong with it.

    mmap: map the file into memory instead of reading it, for readers that need only a part.
    """
    state = read_archive(path, mmap)
    if not (isinstance(state, dict) and all(isinstance(state.get(key), dict) for key in ('model', 'model_args'))):
        raise UserError(f'{path} is not a checkpoint of this program: it has no model and model_args')
    if problem := schema.state_problem(state, Path(path).stat().st_size):
        raise UserError(f'{path} is not a checkpoint of this program: {problem}')
    plain = {strip_prefix(name): tensor for name, tensor in state['model'].items()}
    if len(plain) < len(state['model']):
        raise UserError(f'{path} has two tensors of one name: names with and without the prefix of torch.compile')
    masks = ('.attn.bias', '.attn.masked_bias')  # the causal mask, which older programs store
    state['model'] = {name: tensor for name, tensor in plain.items() if not name.endswith(masks)}
    return state


def find_latest(out_dir, mmap=False):
    """Return (path, checkpoint) of the newest complete training state in `out_dir`, or None if there are no files.

    Skipped files are reported on stderr; UserError if there are files but none is complete. mmap: see `load`.
    """
    skipped = []
    for name in ('last.pt', 'last.prev.pt', 'ckpt.pt'):
        path = Path(out_dir) / name
        if not os.path.lexists(path):
            continue
        try:
            state = load(path, mmap)
            if missing := [key for key in ('optimizer', 'iter_num', 'best_val_loss') if key not in state]:
                raise UserError(f'{path} has no {" and no ".join(missing)}: a model, but not a training state')
        except UserError as error:
            skipped.append(error.message)
            continue
        for message in skipped:
            print(f'warning: {message}; using {path} (iter {state.get("iter_num", 0)})', file=sys.stderr)
        return path, state
    if skipped:
        raise UserError('; '.join(skipped) + '; no whole checkpoint is left to resume from')
    return None


def _exists(path):
    """Return whether there is a file or folder; OSError for a name that no file can have, for example one too long."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def folder_problem(out_dir):
    """Return why `out_dir` cannot be created or written, or '' if nothing is seen to prevent it."""
    path = Path(out_dir).absolute()
    try:
        while not _exists(path):
            path = path.parent
        if not path.is_dir():
            return f'out_dir {str(out_dir)[:80]!r} is not a writable folder ({path} is a file); choose another'
        if not os.access(path, os.W_OK):  # which network file systems, that map users, may answer wrongly
            with tempfile.TemporaryFile(dir=path):
                pass
    except (OSError, ValueError) as error:  # not writable, too long, or with NUL
        why = getattr(error, 'strerror', None) or error
        return f'out_dir {str(out_dir)[:80]!r} is not a writable folder ({why}); choose another'
    return ''


def lock_out_dir(out_dir):
    """Create `out_dir` and lock it for this process; returns the lock, to be kept open for the whole run.

    Removes incomplete files that a killed run left. UserError if the folder cannot be written or another run uses it.
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / '.lock', 'a+', encoding='utf-8', errors='replace')
    except OSError as error:
        raise UserError(f'out_dir {str(out_dir)!r} is not a writable folder ({error.filename}: {error.strerror}); '
                        'choose another') from error
    locked = fcntl is not None
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                owner = ''
                with contextlib.suppress(OSError):
                    lock.seek(0)
                    owner = lock.read(200).strip()
                raise UserError(f'out_dir {str(out_dir)!r} is in use by {owner or "another run"}; '
                                'choose another --out_dir') from None
            print(f'warning: the file system of {out_dir} has no locks ({error.strerror}), so a second run there would '
                  'not be noticed', file=sys.stderr)
            locked = False
    with contextlib.suppress(OSError):  # a full disk, for example; the text is only for the message above
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f'pid {os.getpid()} on host {socket.gethostname()}\n'.encode())
    if locked:  # otherwise another run may be writing these files now
        for path in leftovers(out_dir, RUN_FILES):
            with contextlib.suppress(OSError):
                path.unlink()
                print(f'removed {path}, left by a run that was killed', file=sys.stderr)
    return lock


def archive_old_run(out_dir):
    """Move the files of an earlier run to out_dir/old-N/; returns that folder, or None if there are no such files."""
    out_dir = Path(out_dir)
    files = [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]
    if not files:
        return None
    number = 1
    while (out_dir / f'old-{number}').exists():
        number += 1
    old = out_dir / f'old-{number}'
    try:
        old.mkdir()
        for path in files:
            os.replace(path, old / path.name)
    except OSError as error:
        raise UserError(f'the earlier run in {out_dir} cannot be moved to {old} ({error.strerror}); choose another '
                        '--out_dir') from error
    return old
