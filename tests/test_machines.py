"""docs/machines.md: the batch file for SLURM, the task for SkyPilot, and the check of a new GPU."""
import os
import subprocess
import time

import pytest
from conftest import TINY
from kit import REPO, free_port, load, python


def fake_slurm(folder):
    """Put `srun`, which runs its command here, and `scontrol` into a folder; returns the environment of a job."""
    for name, body in (('srun', 'exec "$@"'), ('scontrol', 'echo "$@" >> asked; [ "$1" = show ] && echo 127.0.0.1')):
        (folder / name).write_text(f'#!/bin/bash\n{body}\n', encoding='utf-8')
        (folder / name).chmod(0o755)
    (folder / 'train.py').symlink_to(REPO / 'train.py')
    return {**os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}', 'GPUS_PER_NODE': '2', 'SLURM_NNODES': '1',
            'SLURM_JOB_ID': '7', 'SLURM_JOB_NODELIST': 'here', 'PORT': str(free_port()), 'OMP_NUM_THREADS': '1'}


def submit(workdir, *flags, **more):
    env = {**fake_slurm(workdir), **more}
    return subprocess.run(['bash', REPO / 'docs' / 'slurm.sh', *TINY, '--gradient_accumulation_steps=2', *flags],
                          cwd=workdir, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_batch_file_trains_on_two_ranks(workdir):
    done = submit(workdir)
    assert done.returncode == 0, done.stderr
    assert load(workdir / 'out' / 'last.pt')['iter_num'] == 6 and 'requeue' not in (workdir / 'asked').read_text()


@pytest.mark.parametrize('seconds_left, requeued', [(60, True), (5000, False)])
def test_a_job_is_put_back_into_the_queue_only_at_its_time_limit(workdir, seconds_left, requeued):
    env = fake_slurm(workdir)
    (workdir / 'srun').write_text('#!/bin/bash\nexit 1\n', encoding='utf-8')
    done = subprocess.run(['bash', REPO / 'docs' / 'slurm.sh', *TINY], cwd=workdir, capture_output=True,
                          env={**env, 'SLURM_JOB_END_TIME': str(int(time.time()) + seconds_left)})
    assert done.returncode == 1
    assert ('requeue 7' in (workdir / 'asked').read_text(encoding='utf-8')) == requeued


def test_the_task_for_skypilot_runs_files_that_exist():
    yaml = pytest.importorskip('yaml')
    task = yaml.safe_load((REPO / 'docs' / 'sky.yaml').read_text(encoding='utf-8'))
    assert '--init_from=auto' in task['run'] and '--out_dir=/checkpoints' in task['run']
    assert list(task['file_mounts']) == ['/checkpoints'] and (REPO / task['envs']['CONFIG']).exists()
    script = next(word for word in task['setup'].split() if word.endswith('.py'))
    assert (REPO / script).exists()
    subprocess.run(['bash', '-n', '-c', task['setup'] + task['run']], check=True)


def test_the_gpu_check_finds_nothing_wrong_on_the_cpu():
    child = python('import runpy, sys; sys.argv = ["gpu_check.py", "parity", "guards", "decode"]\n'
                   f'runpy.run_path({str(REPO / "benchmarks" / "gpu_check.py")!r}, run_name="__main__")')
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0 and 'BAD' not in out and out.count('\n') == 24, out + err
