"""Faults 1, 44, 49 and 52 at full length: random kills of a training run, and torchrun itself. All are slow."""
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import TINY
from kit import REPO, Ranks, differences, load, trained_part

from lib.weights import checkpoint

pytestmark = pytest.mark.slow
FLAGS = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--decay_lr=False', '--dist_timeout=60',
         '--eval_interval=1', '--log_interval=50', '--eval_iters=1', '--init_from=auto']
NOTE_SAVES = """
import os
from lib.weights import checkpoint
real = checkpoint.save
def save(*args, **options):
    os.write(saves, b'(')
    real(*args, **options)
    os.write(saves, b')')
checkpoint.save = save
saves = os.open('saves', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
"""


def test_thirty_random_kills_of_a_run_that_saves_at_every_step_change_no_bit(workdir):  # fault 1
    flags = [*FLAGS, '--max_iters=600']
    (alone,) = Ranks(1, 'train.py', *flags, '--out_dir=whole', cwd=workdir).wait(500)
    assert alone[0] == 0
    pause, kills, inside_a_save, saves = random.Random(0), 0, 0, workdir / 'saves'
    while kills < 30 or inside_a_save < 10:
        saves.unlink(missing_ok=True)
        ranks = Ranks(1, 'train.py', *flags, cwd=workdir, hook=NOTE_SAVES)
        while not (saves.exists() and saves.stat().st_size > 1) and ranks.all[0].is_alive():
            time.sleep(0.001)
        time.sleep(pause.random() * 0.1)
        assert ranks.all[0].is_alive(), 'the run ended before it was killed often enough: raise max_iters'
        ranks.all[0].kill()
        ranks.all[0].join()
        kills += 1
        inside_a_save += saves.read_bytes().endswith(b'(')
        assert checkpoint.load('out/ckpt.pt') and checkpoint.find_latest('out')[0].name == 'last.pt'
    print(f'{kills} kills, {inside_a_save} of them inside a save')
    (last,) = Ranks(1, 'train.py', *flags, cwd=workdir).wait(500)
    assert last[0] == 0, last
    assert differences(trained_part(load('whole/last.pt')), trained_part(load('out/last.pt'))) == []


def torchrun(workdir, torch_flags, flags, hook='pass'):
    """Start torchrun with two ranks of train.py, each of which runs `hook` first."""
    script = workdir / 'hooked.py'
    lines = ['import os, runpy, signal, sys', 'rank = int(os.environ["RANK"])', f'sys.path.insert(0, {str(REPO)!r})',
             hook, f'runpy.run_path({str(REPO / "train.py")!r}, run_name="__main__")']
    script.write_text('\n'.join(lines), encoding='utf-8')
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                             *torch_flags, str(script), *FLAGS, *flags], cwd=workdir, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path, process, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert path.exists(), process.communicate()[1]


def test_term_to_torchrun_saves_once_at_one_step_and_the_run_goes_on(workdir):  # fault 44
    flags = ['--max_iters=100000', '--eval_interval=100000']
    process = torchrun(workdir, [], flags)
    wait_for(workdir / 'out' / 'last.pt', process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and out.count('SIGTERM: saved iter') == 1
    iter_num = checkpoint.load(workdir / 'out' / 'last.pt')['iter_num']
    assert f'SIGTERM: saved iter {iter_num} to out' in out and iter_num > 0
    process = torchrun(workdir, [], [f'--max_iters={iter_num + 2}'])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f'resuming from iter {iter_num}' in out, err


def test_a_killed_rank_ends_torchrun_within_seconds(workdir):  # fault 49
    kill = 'import threading; rank == 1 and threading.Timer(15, os.kill, (os.getpid(), signal.SIGKILL)).start()'
    process = torchrun(workdir, [], ['--max_iters=100000', '--eval_interval=100000'], hook=kill)
    wait_for(workdir / 'out' / 'last.pt', process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and 'rank      : 1' in err and 'SIGKILL' in err


def test_max_restarts_with_init_from_auto_finishes_the_run(workdir):  # fault 52
    crash = """
if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and rank == 1:
    from lib.text import dataset
    real, calls = dataset.Split.batch, []
    def batch(*args):
        calls.append(0)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    dataset.Split.batch = batch
"""
    process = torchrun(workdir, ['--max-restarts=1'], ['--max_iters=12'], hook=crash)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert 'no checkpoint in out/: starting from scratch' in out and 'resuming from iter' in out
    assert load(workdir / 'out' / 'last.pt')['iter_num'] == 12
