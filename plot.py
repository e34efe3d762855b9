"""Draw the losses that training runs logged, and print a summary of each run.

    python plot.py out-shakespeare-char                        out-shakespeare-char/loss.png
    python plot.py out-a out-b --axis=minutes                  two runs compared: compare.png
    python plot.py out-* --axis=tokens --output=docs/runs.png

Losses are in nats per token. Runs whose tokenizers differ are compared in bits per byte of text. The curves show the
fixed windows that every evaluation reads, with a dot at the best; a diamond is the last model on the whole validation
split. The shaded part is overfitting: validation loss above its best while training loss keeps falling.
"""
import shutil
from pathlib import Path

from configurator import UserError, configure
from lib.machine.console import reason
from lib.training import curves, log, sweep_plot, sweep_results

out_dir = 'out'  # folders of training runs, relative to the working directory
axis = 'iterations'  # iterations | tokens | minutes
output = ''  # the PNG file; '' is loss.png in the run's folder, or compare.png here for several runs

BARS = '▁▂▃▄▅▆▇█'


def check(s):
    """Return a list of error messages for the Settings `s`."""
    if s['axis'] in curves.AXES:
        return []
    return [f'axis must be one of {", ".join(curves.AXES)}; got {s["axis"]!r}']


def read_runs(folders):
    """Return the Runs of the folders that have one, and warn of each of the others; UserError if none has."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(curves.read_run(folder))
        except UserError as error:
            problems.append(error.message)
    if not runs:
        raise UserError('; '.join(problems))
    for problem in problems:
        log.warn(f'left out: {problem}')
    return runs


def sparkline(values, width):
    """Return `values` as a row of at most `width` bars, the lowest value the smallest bar; bars are means."""
    if not values:
        return ''
    n = min(width, len(values))
    cuts = [len(values) * i // n for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]
    low, span = min(means), (max(means) - min(means)) or 1
    return ''.join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in means)


def summary(run, width=80):
    """Return a run in two lines: its name and best evaluation, and its validation loss as a sparkline."""
    top = curves.best(run)
    if top is None:
        return f'{run.name}: no evaluation in the log yet'
    steps, losses = curves.series(run.evals, 'step', 'val_loss')
    note = f'; overfitting since, now {losses[-1]:.4f}' if curves.overfitting(curves.history_of(run)) else ''
    if curves.whole(run):
        note += f'; last model, whole split: {curves.whole(run):.4f}'
    elif run.updates and run.updates[-1]['iter'] > run.evals[-1]['step']:  # it was interrupted, or is still training
        note += f'; the updates up to iter {run.updates[-1]["iter"]:,} are not evaluated yet'
    ceiling = curves.y_limit(steps, losses)
    bars = sparkline([min(loss, ceiling) for loss in losses], max(8, width - 20))
    return (f'{run.name}: best val loss {top["val_loss"]:.4f} at iter {top["step"]:,}{note}\n'
            f'  {losses[0]:.4f} {bars} {losses[-1]:.4f}')


def main():
    configure(globals(), check=check, words='out_dir')
    folders = out_dir.split('\n')
    path = Path(output or (f'{out_dir}/loss.png' if len(folders) == 1 else 'compare.png'))
    try:
        if len(folders) == 1 and sweep_results.find(folders[0]):
            return print(f'wrote {sweep_plot.draw(folders[0], output)}')
        runs = read_runs(folders)
        for run in runs:
            print(summary(run, shutil.get_terminal_size().columns))
        if note := curves.comparison_note(runs):
            print(f'note: {note}')
        if note := curves.draw(runs, path, axis):
            print(note)
    except ImportError:
        raise UserError('the picture needs the package matplotlib: pip install matplotlib') from None
    except (OSError, ValueError) as error:  # ValueError: a kind of picture that matplotlib does not know
        raise UserError(f'could not write {path} ({getattr(error, "strerror", None) or reason(error)}); choose another '
                        '--output=FILE.png') from None
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
