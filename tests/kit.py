"""The fault kit: what tests break files and calls with, and how they compare what came out."""
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent


def load(path):
    """Return a checkpoint as any program would read it."""
    return torch.load(path, map_location='cpu', weights_only=True)


def differences(a, b, where=''):
    """Return where two nested states differ, a path each; tensors are compared bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
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
