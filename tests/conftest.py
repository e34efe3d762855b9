"""What tests share: running a script in this process, and a tiny dataset."""
import contextlib
import hashlib
import json
import os
import runpy
import shutil
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
torch.set_num_threads(1)  # tiny models; threads only wait for each other
os.fsync = os.fstat  # no test cuts the power; a run of six updates would wait for the disk 18 times
os.environ.setdefault('OMP_NUM_THREADS', '1')  # in the processes that tests start
if (shared := REPO.parent / 'shared' / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(shared))  # GPT-2's BPE file, on machines without a network

TINY = ('--device=cpu --dtype=float32 --n_layer=2 --n_head=2 --n_embd=16 --block_size=8 --batch_size=4 '
        '--gradient_accumulation_steps=1 --max_iters=6 --eval_interval=4 --eval_iters=2 --warmup_iters=2 '
        '--learning_rate=1e-2 --dataset=tiny').split()  # the last of several equal flags wins

# The files that take longest, in seconds of CPU time. They come first, so that two processes end at the same time.
LONGEST = ('test_distributed.py test_tutorials.py test_train.py test_plan.py test_readme.py test_sweep.py test_play.py '
           'test_preflight.py test_masks.py test_hostile.py').split()


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))



class Outcome:
    """How a script ended: exit status, stdout, stderr, and its globals."""

    def __init__(self, status, out, err, scope):
        self.status, self.out, self.err, self.scope = status, out, err, scope

    @property
    def last_error(self):
        return self.err.strip().splitlines()[-1] if self.err.strip() else ''


@pytest.fixture
def run(capfd, monkeypatch):
    """run('train.py', '--max_iters=2', ...) runs a script of the repository in this process; returns an Outcome."""
    def run(script, *args):
        capfd.readouterr()
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        status, scope = 0, {}
        try:
            scope = runpy.run_path(str(REPO / script), run_name='__main__')
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        finally:
            with contextlib.suppress(Exception):
                torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err, scope)
    return run


def write_dataset(folder, ids, val_ids=None, chars=string.ascii_letters[:16], n_bytes=True):
    """Write a character dataset of token ids as prepare.py would; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, tokens in (('train', ids), ('val', ids if val_ids is None else val_ids)):
        tokens = np.asarray(tokens, dtype='<u2')
        (folder / f'{name}.bin').write_bytes(tokens.tobytes())
        splits[name] = {'n_tokens': len(tokens), 'n_bytes': len(tokens) if n_bytes else 0,
                        'max_id': int(tokens.max()) if len(tokens) else 0,
                        'sha256': hashlib.sha256(tokens.tobytes()).hexdigest()}
    meta = {'format': 1, 'tokenizer': {'kind': 'char', 'chars': chars}, 'vocab_size': len(chars), 'dtype': 'uint16',
            'splits': splits}
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    return folder


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Let training end without drawing loss.png, which takes a second; tests of pictures use the mark `pictures`."""
    if not request.node.get_closest_marker('pictures'):
        monkeypatch.setattr('lib.training.curves.draw_loss', lambda out_dir: None)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with a dataset data/tiny: 2000 tokens, 16 characters, each following from the last."""
    rng = np.random.default_rng(0)
    ids = np.cumsum(rng.integers(1, 4, 2000)) % 16
    write_dataset(tmp_path / 'data' / 'tiny', ids, ids[:400])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='session')
def finished():
    """Where the run that the fixture `trained` copies is kept."""
    return []


@pytest.fixture
def trained(run, workdir, finished):
    """A finished run of 6 updates in out/, evaluated at 0, 4 and 6; trained once, copied for each test."""
    if not finished:
        assert run('train.py', *TINY, '--out_dir=finished').status == 0
        finished.append(workdir / 'finished')
    shutil.copytree(finished[0], workdir / 'out')
    return workdir / 'out'


@pytest.fixture
def prepare(tmp_path, monkeypatch, capfd):
    """prepare(*flags, dataset='text', **options) runs data/DATASET/prepare.py of a scratch repository in this process.

    Returns what it wrote as a textkit.Prepared; prepare.out and prepare.err are what it printed.
    """
    from textkit import Prepared

    from lib.text import prepare as prepare_room
    monkeypatch.chdir(tmp_path)

    def prepare(*flags, dataset='text', **options):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, flags)])
        prepare_room.prepare(tmp_path / 'data' / dataset / 'prepare.py', **options)
        prepare.out, prepare.err = capfd.readouterr()
        return Prepared(max((tmp_path / 'data').glob('*/meta.json'), key=lambda p: p.stat().st_mtime_ns).parent)
    return prepare
