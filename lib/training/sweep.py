"""Many trainings of one recipe: a grid of settings, each run in its own process and folder, and their results.

A run is known by a hash of its settings, its data and the code that trains, which its folder's name ends in. So a
sweep that was ended in any way continues where it was when the same command is given again.
"""
import contextlib
import ctypes
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from configurator import REPO, resolve
from lib.machine.cpus import usable_cpus
from lib.machine.device import pick_device
from lib.machine.files import atomic_write
from lib.text import data_folder, dataset
from lib.text.schema import read_json
from lib.training import plan
from lib.training.log import read_log

TRAIN = REPO / 'train.py'
NO_RESULT = {'out_dir', 'init_from', 'log_interval', 'wandb_log', 'wandb_project', 'wandb_run_name', 'tensorboard_log'}
PAUSE_AT = 1 / 3  # of a run, where halving compares
MEASURED = ('n_params', 'tokens', 'seconds', 'val_loss', 'val_bpb', 'error')  # the last columns of results.tsv


@dataclass
class Run:
    """One training of a sweep. varied: {setting: its value as text}, in the order of the command line."""
    varied: dict
    argv: list
    settings: dict
    folder: Path
    hash: str
    row: dict = field(default_factory=dict)  # the measured columns, once there is a result
    process: subprocess.Popen = None
    cpus: list = None

    @property
    def name(self):
        return ' '.join(f'{name}={value}' for name, value in self.varied.items()) or 'one setting'

    @property
    def setting(self):
        """The varied values without the seed, as a tuple: runs that differ in the seed only are one setting."""
        return tuple(value for name, value in self.varied.items() if name != 'seed')

    @property
    def by_clock(self):
        return self.settings['max_minutes'] > 0 and not self.settings.set_by_flag('max_iters')

    def fraction(self):
        """Return how much of the run is done, 0 to 1, by its log."""
        if self.row:
            return 1.0
        record = (read_log(self.folder / 'log.jsonl') or [{}])[-1]
        if self.by_clock:
            return min(1.0, (record.get('minutes') or 0.0) / self.settings['max_minutes'])
        return min(1.0, max(record.get('iter', 0), record.get('step', 0)) / max(1, self.settings['max_iters']))

    def evaluations(self):
        records = read_log(self.folder / 'log.jsonl')
        return [record for record in records if 'step' in record and record.get('val_loss') is not None]


def split_grid(argv, names):
    """Return (argv without the flags that list several values, {setting: [values as text]}).

    names: the settings that may have several values, as in --n_embd=64,96 or --n-embd 64,96.
    """
    rest, grid, words = [], {}, list(argv)
    while words:
        word = words.pop(0)
        if word.startswith('--') and '=' not in word and words and ',' in words[0]:
            word += f'={words.pop(0)}'
        name, _, text = word.removeprefix('--').partition('=')
        name = name.replace('-', '_')
        if word.startswith('--') and name in names and ',' in text:
            grid[name] = [value.strip() for value in text.split(',') if value.strip()]
        else:
            rest.append(word)
    return rest, grid


def code_version():
    """Return a hash of the files that decide how a training goes."""
    digest = hashlib.sha256()
    for path in [TRAIN, REPO / 'model.py', REPO / 'kernels.py', REPO / 'configurator.py',
                 *sorted((REPO / 'lib').rglob('*.py'))]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _data_version(name):
    folder = data_folder.folder(name)
    meta = folder / 'meta.json'
    return meta.read_text(encoding='utf-8', errors='replace') if meta.is_file() else str(sorted(
        (path.name, path.stat().st_size) for path in folder.glob('*.bin')))


def make_runs(argv, grid, defaults, out_dir, jobs, budgets=()):
    """Return (the Runs of a grid, errors). argv: the words that all share; defaults: train.py's settings.

    budgets: FLOPs of a run, as text; each run is repeated with the max_iters that they buy.
    """
    runs, errors, code, flops_of = [], [], code_version(), {}
    for values in itertools.product(*grid.values()):
        for budget in budgets or ('',):
            varied = dict(zip(grid, values))
            own = [*argv, *(f'--{name}={value}' for name, value in varied.items())]
            settings = resolve(defaults, own, {'device': pick_device})
            errors += [error for error in settings.errors if error not in errors]
            if budget and settings.understood and not settings.errors:
                key = tuple(value for name, value in varied.items() if name != 'seed')
                if key not in flops_of:
                    flops_of[key] = _flops_per_update(settings)
                varied['flops'] = budget
                own.append(f'--max_iters={max(1, round(float(budget) / flops_of[key]))}')
                settings = resolve(defaults, own, {'device': pick_device})
            text = json.dumps([{k: v for k, v in settings.items() if k not in NO_RESULT}, code,
                               _data_version(settings['dataset']), jobs if settings['max_minutes'] else 0,
                               settings['init_from'].replace('auto', 'scratch')], sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:10]
            name = re.sub(r'[^\w.=+-]+', '-', '_'.join(f'{name}={value}' for name, value in varied.items()))[:80]
            runs.append(Run(varied, own, settings, Path(out_dir) / f'{name or "run"}-{key}', key))
    return runs, errors


def _config(settings):
    return plan.config_of(settings, dataset.open_dataset(settings['dataset'], settings['block_size']))


def _flops_per_update(settings):
    job = plan.job_from(settings, _config(settings), None)
    return job.sequences * job.config.block_size * plan.flops_per_token(job)


# ---- one run -----------------------------------------------------------------------------------------------------

def _die_with_parent():
    """In a new process on Linux: be killed when the sweep is, so that it does not go on training unnoticed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL('libc.so.6').prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start(run, cpus):
    """Start a run's process, or continue it from its last checkpoint, on these CPUs ([] for all)."""
    run.folder.mkdir(parents=True, exist_ok=True)
    init = run.settings['init_from']
    if init in ('scratch', 'auto'):
        init = 'auto'
    elif (run.folder / 'last.pt').exists():
        init = 'resume'
    env = dict(os.environ)
    if cpus:
        env['OMP_NUM_THREADS'] = str(min(len(cpus), int(env.get('OMP_NUM_THREADS') or len(cpus))))
    command = [sys.executable, str(TRAIN), *run.argv, f'--out_dir={run.folder}', f'--init_from={init}']
    with (open(run.folder / 'stdout.txt', 'ab') as out, open(run.folder / 'stderr.txt', 'wb') as err):
        run.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env,
                                       preexec_fn=_die_with_parent if sys.platform == 'linux' else None)
    run.cpus = cpus
    if cpus and hasattr(os, 'sched_setaffinity'):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(run.process.pid, cpus)


def finish(run):
    """Fill in the row of a run whose process has ended, and store it unless the run failed or was stopped."""
    status, run.process = run.process.wait(), None
    evaluations = run.evaluations()
    last = evaluations[-1] if evaluations else {}
    if status == 0 and 'whole_val_loss' in last:
        run.row = _result(run, last)
        with atomic_write(run.folder / 'sweep.json') as path:
            Path(path).write_text(json.dumps({'hash': run.hash, 'row': run.row}), encoding='utf-8')
        (run.folder / 'last.prev.pt').unlink(missing_ok=True)  # of no use to a finished run
    elif status not in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        lines = (run.folder / 'stderr.txt').read_text(encoding='utf-8', errors='replace').strip().splitlines()
        message = next((line for line in lines[::-1] if line.startswith('error: ')), (lines or [''])[-1])
        run.row = dict.fromkeys(MEASURED, '') | {'error': message.removeprefix('error: ') or f'exit status {status}'}


def _result(run, record):
    return {'n_params': plan.count(_config(run.settings)), 'tokens': record['tokens'],
            'seconds': round(60 * record['minutes'], 1), 'val_loss': record['whole_val_loss'],
            'val_bpb': record.get('whole_val_bpb') or '', 'error': ''}


def load_result(run):
    """Take over the result of a run that an earlier sweep finished; returns whether there was one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = read_json(run.folder / 'sweep.json')
        if stored['hash'] == run.hash and row_problem(stored['row']) == '' and not stored['row']['error']:
            run.row = {name: stored['row'][name] for name in MEASURED}
    return bool(run.row)


def row_problem(row):
    """Return what is wrong with the measured columns of a run, numbers or texts of them, from a file; '' if nothing."""
    for name in MEASURED[:-1] if not row['error'] else ():
        try:
            fine = name == 'val_bpb' and row[name] == '' or type(row[name]) is not bool and math.isfinite(
                float(row[name]))
        except (TypeError, ValueError, OverflowError):
            fine = False
        if not fine:
            return f'{name} is {str(row[name])[:40]!r}, expected a number'
    return ''


# ---- all runs ----------------------------------------------------------------------------------------------------

def cpu_groups(jobs):
    """Return the lists of CPUs for each of `jobs` runs at a time; [[]] for one run, which may use them all."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else list(range(usable_cpus()))
    each = max(1, len(cpus) // jobs)
    return [[]] if jobs == 1 else [cpus[i * each % len(cpus):][:each] for i in range(jobs)]


def run_all(runs, jobs, progress=lambda runs: None, done=lambda run: None, pause_at=None):
    """Carry out the runs that have no result, `jobs` at a time.

    progress: called about five times a second. done: called with each run that ends. pause_at: end each run, saved,
    after that fraction and its first evaluation. On an interrupt the runs save, and can be continued.
    """
    waiting = [run for run in runs if not run.row and not (pause_at and _paused(run, pause_at))]
    free, active = cpu_groups(jobs), []
    try:
        while waiting or active:
            while waiting and free:
                start(waiting[0], free.pop(0))
                active.append(waiting.pop(0))
            time.sleep(0.2)
            for run in list(active):
                if run.process.poll() is not None:
                    active.remove(run)
                    free.append(run.cpus)
                    finish(run)
                    done(run)
                elif pause_at and _paused(run, pause_at):
                    run.process.terminate()  # train.py saves and ends
            progress(runs)
    finally:
        for run in active:
            run.process.terminate()
        for run in active:
            run.process.wait()


def _paused(run, fraction):
    return run.fraction() >= fraction and bool(run.evaluations())


def worse_half(runs):
    """Return the runs of the worse half of the settings, by their mean loss at the last point that all have reached."""
    live = [run for run in runs if run.evaluations() and not run.row.get('error')]
    key = 'minutes' if any(run.by_clock for run in live) else 'step'
    until = min(run.evaluations()[-1][key] for run in live) if live else 0
    losses = {}
    for run in live:
        at = [record for record in run.evaluations() if record[key] <= until] or run.evaluations()[:1]
        losses.setdefault(run.setting, []).append(at[-1]['val_loss'])
    ranked = sorted(losses, key=lambda setting: sum(losses[setting]) / len(losses[setting]))
    worse = set(ranked[-(-len(ranked) // 2):])
    return [run for run in live if run.setting in worse and not run.row]
