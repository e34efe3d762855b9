"""Train a recipe with several values of its settings and compare the results. A comma makes a grid.

    python sweep.py config/train_shakespeare_char.py --n_embd=64,96,128 --muon_lr=0.01,0.015 --seeds=3 --max_minutes=1
    python sweep.py config/train_shakespeare_char.py --dropout=0,0.1,0.2 --max_iters=500 --jobs=2 --halving
    python sweep.py config/law_tinyshakespeare.py --n_embd=32,48,64,96,128 --flops=5e11,1.5e12,4.5e12 --law
    python plot.py out-sweep                                      loss against each setting

Takes every setting of train.py, which `python train.py --help` lists, and those below. Each run is train.py in its own
process and folder. To continue a sweep that was ended or killed, give the same command again: finished runs are kept
as long as their settings, the data and the code have not changed. OUT_DIR/results.tsv has a row per run.
"""
import sys
import time
from pathlib import Path

import train
from configurator import UserError, configure, describe, exit_with, literals
from lib.machine import device as devices
from lib.machine.console import counted
from lib.machine.cpus import usable_cpus
from lib.machine.files import alone_in
from lib.training import law as laws
from lib.training import log, sweep, sweep_plot, sweep_results
from lib.training.log import duration

out_dir = 'out-sweep'  # folder of the runs and of results.tsv, relative to the working directory
seeds = 1  # runs per setting, with seeds from --seed on; 3 or more show which differences are chance
jobs = 1  # runs at a time, each on its part of the CPUs
halving = False  # stop the worse half of the settings after a third of their runs
flops = ''  # FLOPs per run, from which max_iters follows; several with commas
law = False  # fit L(N, D) = E + A/N^a + B/D^b to the results
advise = ''  # FLOPs for which the law names the best size, with commas; ten times the largest run if empty

OWN = literals(globals())


def numbers(text, name):
    """Return the positive numbers in a text with commas; UserError names the setting."""
    try:
        found = [float(word) for word in text.split(',') if word.strip()]
        if all(0 < number < float('inf') for number in found):
            return found
    except ValueError:
        pass
    raise UserError(f'{name}={text}: expected positive numbers with commas between, as in 1e12,3e12')


def check(s):
    """Return the errors in the sweep's own Settings."""
    errors = [f'{name} must be at least 1, got {s[name]}' for name in ('seeds', 'jobs') if s[name] < 1]
    if s['jobs'] > usable_cpus():
        errors.append(f'jobs={s["jobs"]} but this process may use {usable_cpus()} CPUs')
    for name in ('flops', 'advise'):
        try:
            numbers(s[name], name)
        except UserError as error:
            errors.append(error.message)
    return errors


def shared_words(argv):
    """Return the words of a command line that are train.py's: config files and flags, without the sweep's own."""
    words, kept = list(argv), []
    while words:
        word = words.pop(0)
        name, equals, _ = word.removeprefix('--').partition('=')
        if word.startswith('--') and name.replace('-', '_') in OWN:
            if not equals and words and not words[0].startswith('--') and not words[0].endswith('.py'):
                words.pop(0)
        else:
            kept.append(word)
    return kept


def rows_of(runs):
    """Return the rows of results.tsv: finished and failed runs, and with halving the stopped ones."""
    return [{**run.varied, **run.row} for run in runs if run.row]


class Progress:
    """The bar over all runs, and a line for each run that ends."""

    def __init__(self, runs, path):
        self.runs, self.path, self.began = runs, path, time.monotonic()
        self.before = sum(run.fraction() for run in runs)
        self.bar = log.progress_bar(100)

    def update(self, runs):
        total, done = len(self.runs), sum(run.fraction() for run in self.runs)
        losses = [run.row['val_loss'] for run in self.runs if run.row and not run.row['error']]
        best = f', best {min(losses):.4f}' if losses else ''
        left = (time.monotonic() - self.began) * (total - done) / (done - self.before) if done > self.before else 0
        self.bar.set_description_str(f'{sum(bool(run.row) for run in self.runs)} of {counted(total, "run")}{best}, '
                                     f'{duration(left / 60)} left', refresh=False)
        self.bar.update(min(100, 100 * done / total) - self.bar.n)

    def ended(self, run):
        if not run.row:
            return
        result = run.row['error'] or f'val loss {run.row["val_loss"]:.4f} in {duration(run.row["seconds"] / 60)}'
        log.say(f'run {self.runs.index(run) + 1} of {len(self.runs)}: {run.name}: {result}')
        sweep_results.write_tsv(self.path, rows_of(self.runs))


def carry_out(runs, s):
    """Carry out the runs, in two rounds with halving, and write results.tsv after each."""
    folder = Path(s['out_dir'])
    if path := sweep_results.find(folder):
        sweep_results.read_tsv(path)  # UserError if it is a file of another program, which must not be lost
    kept = sum(sweep.load_result(run) for run in runs)
    if kept:
        log.say(f'{kept} of {counted(len(runs), "run")} {"was" if kept == 1 else "were"} finished before')
    progress = Progress(runs, folder / 'results.tsv')
    try:
        if s['halving'] and len({run.setting for run in runs}) > 1:
            sweep.run_all(runs, s['jobs'], progress.update, progress.ended, sweep.PAUSE_AT)
            for run in sweep.worse_half(runs):
                last = run.evaluations()[-1]
                run.row = dict.fromkeys(sweep.MEASURED, '') | {
                    'error': f'stopped by halving at iter {last["step"]} with val loss {last["val_loss"]:.4f}'}
        sweep.run_all(runs, s['jobs'], progress.update, progress.ended)
    except KeyboardInterrupt:
        progress.bar.close()
        raise UserError('interrupted; the runs have saved, and the same command continues the sweep') from None
    progress.bar.close()
    sweep_results.write_tsv(folder / 'results.tsv', rows_of(runs))


def show_law(rows, folder, advise_for, budgets):
    """Print the law of the results and draw it."""
    points = laws.data_points(rows)
    flops_of = [p[0] for p in points] if budgets else None
    fitted = laws.fit([p[1] for p in points], [p[2] for p in points], [p[3] for p in points], flops_of)
    print('\n'.join(laws.report(fitted, points, advise_for or [10 * max(budgets or [1e12])])))
    print(f'wrote {sweep_plot.draw_law(fitted, points, folder / "law.png")}')


def main():
    argv, train_settings = sys.argv[1:], literals(vars(train))
    if '--help' in argv or '-h' in argv:
        print(describe(Path(__file__).read_text(encoding='utf-8'), OWN))
        others = {name: value for name, value in train_settings.items() if name not in OWN}
        print('\n' + describe(Path(train.__file__).read_text(encoding='utf-8'), others, doc='From train.py'))
        return
    argv, grid = sweep.split_grid(argv, train_settings.keys() - OWN.keys())
    s = configure({**train_settings, **OWN, '__file__': __file__}, argv, early={'device': devices.pick_device},
                  check=check)
    if s['seeds'] > 1 and 'seed' not in grid:
        grid['seed'] = [str(s['seed'] + i) for i in range(s['seeds'])]
    budgets = [word.strip() for word in s['flops'].split(',') if word.strip()]
    runs, errors = sweep.make_runs(shared_words(argv), grid, train_settings, s['out_dir'], s['jobs'], budgets)
    if errors:
        exit_with(errors)
    print(f'{counted(len(runs), "run")} in {s["out_dir"]}')
    if len(runs) == 1:
        print('note: each setting has one value, so there is nothing to compare; several have commas between, as in '
              '--n_embd=64,96')
    try:
        Path(s['out_dir']).mkdir(parents=True, exist_ok=True)
        with alone_in(s['out_dir']):
            carry_out(runs, s)
    except BlockingIOError:
        raise UserError(f'another sweep is running in {s["out_dir"]}; choose another --out_dir') from None
    rows, folder = rows_of(runs), Path(s['out_dir'])
    print('\n'.join(sweep_results.table(rows)))
    if sentence := sweep_results.verdict(rows):
        print(sentence)
    try:
        print(f'wrote {folder / "results.tsv"} and {sweep_plot.draw(folder)}')
        if s['law']:
            show_law(rows, folder, numbers(s['advise'], 'advise'), numbers(s['flops'], 'flops'))
    except ImportError:
        print('the pictures need the package matplotlib: pip install matplotlib')


if __name__ == '__main__':
    main()
