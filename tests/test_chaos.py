"""Random trouble while training: kills, signals, stops, full disks, renamed and read-only folders. Slow.

    CHAOS_ROUNDS=200 python -m pytest -m slow -s tests/test_chaos.py
"""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
from conftest import TINY
from kit import Ranks, differences, load, trained_part

from lib.weights import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != 'linux', reason='needs prlimit')]
ROUNDS = int(os.environ.get('CHAOS_ROUNDS', 200))  # over the three kinds of run together
FLAGS = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--decay_lr=False', '--dist_timeout=60',
         '--log_interval=5', '--eval_iters=1', '--init_from=auto']
NOTE_SAVES = """
import os
from lib.weights import checkpoint
real = checkpoint.save
def save(*args, **options):
    os.write(saves, b'(')
    try:
        real(*args, **options)
    finally:
        os.write(saves, b')')
checkpoint.save = save
saves = os.open(f'saves{rank}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
"""


def whole(folder):
    """Return the iteration of the newest state in `folder` after every file there was checked; -1 if there is none."""
    for name in ('ckpt.pt', 'last.pt', 'last.prev.pt'):
        if (folder / name).exists():
            checkpoint.load(folder / name)
    found = checkpoint.find_latest(folder) if folder.exists() else None
    log = folder / 'log.jsonl'
    lines = log.read_text(encoding='utf-8').split('\n') if log.exists() else ['']
    for line in lines[:-1]:  # a kill may cut the last one
        json.loads(line)
    return found[1]['iter_num'] if found else -1


def make_trouble(kind, process, out, rng):
    """Do one kind of trouble to a running process and its folder."""
    if kind in ('SIGKILL', 'SIGTERM', 'SIGHUP'):
        os.kill(process.pid, getattr(signal, kind))
        return
    if kind == 'stop':
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(rng.random() * 0.3)
        os.kill(process.pid, signal.SIGCONT)
    if kind == 'full disk':
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (rng.randrange(30000), hard))
        time.sleep(rng.random() * 0.2)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    if kind in ('renamed', 'read-only'):
        out.rename(out.with_name('renamed'))
    if kind == 'read-only':  # for a while; root could write to a folder that is, so a file stands in its place
        with contextlib.suppress(OSError):  # the run has made the folder again, before or after the file was there
            out.touch(exist_ok=False)
            time.sleep(rng.random() * 0.2)
            out.unlink()
            out.with_name('renamed').rename(out)
    time.sleep(rng.random() * 0.1)
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize('kind, n_ranks', [('one process', 1), ('LoRA', 1), ('two ranks', 2)])
def test_after_any_trouble_every_file_is_whole_and_the_resumed_run_equals_an_uninterrupted_one(workdir, kind, n_ranks):
    flags, rng, out = [*FLAGS, '--eval_interval=1'], random.Random(kind), workdir / 'out'
    if kind == 'LoRA':
        ended = Ranks(1, 'train.py', *TINY, '--out_dir=base', '--max_iters=2', cwd=workdir).wait()
        assert ended[0][0] == 0, ended
        begin = Ranks(1, 'train.py', *FLAGS, '--init_from=base', '--lora_rank=2', '--max_iters=1', cwd=workdir).wait()
        assert begin[0][0] == 0, begin
        shutil.copytree(out, workdir / 'whole')
    counts, inside, training, survivors = {}, 0, 0, []
    for _ in range(-(-ROUNDS // 3)):
        trouble = rng.choice(['SIGKILL', 'SIGKILL', 'SIGTERM', 'SIGHUP', 'stop', 'full disk', 'renamed', 'read-only'])
        shutil.rmtree(workdir / 'renamed', ignore_errors=True)
        saves = workdir / 'saves0'
        saves.unlink(missing_ok=True)
        ranks = Ranks(n_ranks, 'train.py', *flags, '--max_iters=1000000', cwd=workdir, hook=NOTE_SAVES)
        while not (saves.exists() and saves.stat().st_size > 1) and ranks.all[0].is_alive():
            time.sleep(0.001)
        time.sleep(rng.random() * 0.15)
        chosen = rng.randrange(n_ranks)
        assert ranks.all[chosen].is_alive(), ranks.wait(1)
        make_trouble(trouble, ranks.all[chosen], out, rng)
        ended = ranks.wait(120)
        counts[trouble] = counts.get(trouble, 0) + 1
        if -signal.SIGKILL in [code for code, *_ in ended]:
            inside += saves.read_bytes().endswith(b'(')
            training += saves.read_bytes().endswith(b')')
        survivors += [end for end in ended if end[0] is None]  # a rank that went on alone
        if trouble in ('SIGTERM', 'SIGHUP'):
            assert {code for code, *_ in ended} == {128 + getattr(signal, trouble)}, ended
        reached, before = whole(out), whole(workdir / 'renamed')
        if before > reached:  # the run was killed before it had made the folder again
            shutil.rmtree(out, ignore_errors=True)
            (workdir / 'renamed').rename(out)
    assert not survivors
    reached = whole(out)
    print(f'{kind}: {counts}; {inside} kills inside a save, {training} between saves; {reached} updates', flush=True)
    for folder, more in (('out', flags), ('whole', [*FLAGS, '--eval_interval=1000'])):
        ended = Ranks(n_ranks, 'train.py', *more, f'--out_dir={folder}', f'--max_iters={reached + 3}',
                      cwd=workdir).wait(500)
        assert [code for code, *_ in ended] == [0] * n_ranks, ended
    assert differences(trained_part(load('whole/last.pt')), trained_part(load('out/last.pt'))) == []
    assert not [p.name for p in out.iterdir() if '.tmp.' in p.name]
    assert inside and training or ROUNDS < 60
