"""The fault kit: what tests break files and calls with, and how they compare what came out."""
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent


def load(path):
    """Return a checkpoint as any program would read it."""
    return torch.load(path, map_location='cpu', weights_only=True)


def trained_part(state):
    """Return what must be equal in two runs of the same training; the rest holds times and evaluations."""
    return {key: state[key] for key in ('model', 'optimizer', 'iter_num', 'rng', 'tokens_seen', 'scaler', 'data')}


def differences(a, b, where=''):
    """Return where two nested states differ, a path each; tensors are compared bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(  # as bytes, where NaN equals NaN
            *(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f'{where}/{key}')]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b)) for found in differences(x, y, f'{where}/{i}')]
    return [] if type(a) is type(b) and a == b else [where]


def flip(path, offset, bit=0):
    """Flip one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


def inside(path, ending):
    """Return the offset in a zip file at which the data of the member whose name has this ending begins."""
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(ending))
    head = path.read_bytes()[info.header_offset:info.header_offset + 30]
    name, extra = np.frombuffer(head[26:30], '<u2').tolist()
    return info.header_offset + 30 + name + extra


def shorten(path, n_bytes):
    """Cut bytes off a file's end."""
    os.truncate(path, path.stat().st_size - n_bytes)


def python(code, *args, env=None, **options):
    """Start a Python process on `code` with this repository on its path; returns a Popen with text pipes."""
    env = {**os.environ, 'PYTHONPATH': str(REPO), **(env or {})}
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'env': env, **options}
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], **options)


def break_call(monkeypatch, module, name, error, when=lambda *args: True):
    """Let a function raise `error` on the calls for which `when(*args)` holds."""
    real = getattr(module, name)

    def broken(*args, **kwargs):
        if when(*args):
            raise error
        return real(*args, **kwargs)
    monkeypatch.setattr(module, name, broken)


# Several ranks, forked from one server that has imported what they import: a start costs a tenth of a second, not four

_ranks = multiprocessing.get_context('forkserver')
_ranks.set_forkserver_preload(['torch._dynamo', 'torch.distributed.fsdp', 'torch.distributed.tensor', 'tqdm',
                               'train', 'kit'])


def _be_rank(rank, n, port, cwd, argv, hook, env):
    os.environ.update(env, RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    os.chdir(cwd)
    for fd, name in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(f'rank{rank}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    torch.set_num_threads(1)
    os.fsync = os.fstat  # as in conftest.py
    sys.modules['matplotlib'] = None  # a picture takes longer than these runs
    sys.argv = [str(a) for a in argv]
    exec(hook, {'rank': rank})
    runpy.run_path(str(REPO / argv[0]), run_name='__main__')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Ranks:
    """A script running as n ranks on this machine. `hook` is code that each runs first, with `rank` in its scope."""

    def __init__(self, n, *argv, cwd, hook='', env=None):
        self.cwd, port = Path(cwd), free_port()
        self.all = [_ranks.Process(target=_be_rank, args=(r, n, port, cwd, argv, hook, env or {})) for r in range(n)]
        with mock.patch.dict(os.environ, PYTHONPATH=f'{REPO}:{REPO / "tests"}'):  # the first start starts the server
            for process in self.all:
                process.start()

    def wait(self, seconds=300, ranks=None):
        """Return [(exit status, stdout, stderr) of each rank], None for one that has not ended by then.

        ranks: how many to wait for, the first ones.
        """
        until = time.monotonic() + seconds
        for process in self.all[:ranks]:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.all]
        for process in self.all:
            process.kill()
            process.join()
        return [(code, *((self.cwd / f'rank{r}.{name}').read_text(encoding='utf-8') for name in ('out', 'err')))
                for r, code in enumerate(codes)]
