"""Draw what runs logged: one picture, and a line each for those who see no pictures over ssh.

    python plot.py out-shakespeare-char                        out-shakespeare-char/loss.png
    python plot.py out-a out-b --axis=minutes                  two runs compared: compare.png
    python plot.py out-* --axis=tokens --output=docs/runs.png

Loss is in nats a token; between runs whose tokenizers differ, in bits per byte of text, which compare. The curves are
of the fixed windows that every evaluation reads, with a dot at the best; a diamond is the last model on the whole
validation split. The shaded part is overfitting: validation loss higher than at the dot, training loss lower.
"""
import contextlib
import shutil
import warnings
from collections import namedtuple
from itertools import accumulate
from pathlib import Path

import numpy as np

from configurator import UserError, configure
from lib.training.log import read_log, warn

out_dirs = 'out'  # the run folders
axis = 'iterations'  # iterations | tokens | minutes
output = ''  # the PNG file; '' is loss.png in the run's folder, or compare.png here for several runs

AXES = {'iterations': ('iter', 'step'), 'tokens': ('tokens', 'tokens'), 'minutes': ('minutes', 'minutes')}
_BARS = '▁▂▃▄▅▆▇█'
COLORS = ('#1f6fb4', '#d95f02', '#1b9e77', '#c2338b', '#7a5cc4', '#8c6d1f', '#4d4d4d')

Run = namedtuple('Run', 'name updates evals')  # the folder's name, and log.jsonl's two kinds of records


def read_run(folder):
    """Return the Run of a folder; UserError where it has no log.jsonl. An empty log is a Run without records."""
    log = Path(folder) / 'log.jsonl'
    if not log.is_file():
        raise UserError(f'{log}: there is no such file; train.py --out_dir={folder} writes it')
    records = read_log(log)
    return Run(Path(folder).resolve().name, [r for r in records if 'iter' in r], [r for r in records if 'step' in r])


def read_runs(folders):
    """Return the Runs of those folders that have one, with a warning for each other; UserError where none has."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            problems.append(error.message)
    if not runs:
        raise UserError('; '.join(problems))
    for problem in problems:
        warn(f'left out: {problem}')
    return runs


def series(records, x, y):
    """Return the lists of x and y of those records that have both as numbers."""
    points = [(r[x], r[y]) for r in records if all(isinstance(r.get(name), (int, float)) for name in (x, y))]
    return [p[0] for p in points], [p[1] for p in points]


def best(run):
    """Return the evaluation with the lowest validation loss, or None."""
    return min((r for r in run.evals if r.get('val_loss') is not None), key=lambda r: r['val_loss'], default=None)


def overfitted(run):
    """True where validation loss ends above its best by more than noise, with training loss below what it was there."""
    top, last = best(run), run.evals[-1] if run.evals else None
    if top is None or None in (last.get('val_loss'), last.get('train_loss'), top.get('train_loss')):
        return False
    return last['val_loss'] > 1.01 * top['val_loss'] and last['train_loss'] < top['train_loss']


def whole(run):
    """Return the last model's loss over the whole validation split, which a finished run logs, or None."""
    return run.evals[-1].get('whole_val_loss') if run.evals else None


def bits_a_nat(run, split='val'):
    """Return what turns the split's loss (nats a token) into bits per byte, which the tokenizer decides; or None."""
    ratios = [r[f'{split}_bpb'] / r[f'{split}_loss'] for r in run.evals if r.get(f'{split}_bpb') and
              r.get(f'{split}_loss')]
    return ratios[0] if ratios else None


def in_bits(runs):
    """True where losses only compare in bits per byte: tokens of unlike length, and the length of all is known."""
    ratios = [bits_a_nat(run) for run in runs]
    return None not in ratios and max(ratios, default=1) > 1.02 * min(ratios, default=1)


def smooth(values, share=0.02):
    """Return the mean of the `values` around each, up to `share` of their number on either side, so that none lags."""
    total, reach = [0.0, *accumulate(values)], round(share * len(values))
    halves = [min(i, len(values) - 1 - i, reach) for i in range(len(values))]
    return [(total[i + half + 1] - total[i - half]) / (2 * half + 1) for i, half in enumerate(halves)]


def roof(xs, ys):
    """Return how high a picture of the curve has to be: the plunge at the beginning, at most the first twentieth, may
    leave through the top where all else would get less than two thirds of the height. It is 0 without points.
    """
    if not xs:
        return 0
    early = xs[0] + 0.05 * (xs[-1] - xs[0])
    later = max([np.interp(early, xs, ys), *(y for x, y in zip(xs, ys) if x >= early)])
    return min(max(ys), min(ys) + 1.5 * (later - min(ys)))


def sparkline(values, width):
    """Return `values` as a row of at most `width` bars, the lowest the smallest; each bar is the mean of its share."""
    if not values:
        return ''
    n = min(width, len(values))
    cuts = [len(values) * i // n for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]
    low, span = min(means), (max(means) - min(means)) or 1
    return ''.join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in means)


def summary(run, width=80):
    """Return a run in two lines: its name and best point, and its validation loss as a sparkline."""
    top = best(run)
    if top is None:
        return f'{run.name}: no evaluation in the log yet'
    steps, losses = series(run.evals, 'step', 'val_loss')
    note = f'; overfitting since, now {losses[-1]:.4f}' if overfitted(run) else ''
    note += f'; last model, whole split: {whole(run):.4f}' if whole(run) else ''
    ceiling = roof(steps, losses)
    bars = sparkline([min(loss, ceiling) for loss in losses], max(8, width - 20))
    return (f'{run.name}: best val loss {top["val_loss"]:.4f} at iter {top["step"]:,}{note}\n'
            f'  {losses[0]:.4f} {bars} {losses[-1]:.4f}')


def font_for(text):
    """Return the name of an installed font that has the letters of `text` which matplotlib's own lacks; '' if all are
    there, None if no font has them.
    """
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    def lacks(path):
        with contextlib.suppress(RuntimeError, OSError):  # a file that is no font, or none for this library
            font = FT2Font(path)
            return {c for c in text if not font.get_char_index(ord(c))}
        return set(text)

    text = lacks(font_manager.findfont('DejaVu Sans'))
    if not text:
        return ''
    # not the manager's list, which may be older than a font installed a minute ago
    path = next((path for path in sorted(font_manager.findSystemFonts()) if not lacks(path)), None)
    if path is None:
        return None
    font_manager.fontManager.addfont(path)
    return font_manager.FontProperties(fname=path).get_name()


def draw(runs, path, axis='iterations'):
    """Draw the runs into one PNG at `path`; returns a line on letters that no font has, or ''.

    Raises ImportError where matplotlib is missing.
    """
    import matplotlib
    from matplotlib.figure import Figure
    names = ', '.join(run.name for run in runs)
    font = font_for(names)
    note = '' if font is not None else (f'no installed font has all letters of {names}; install one and draw again '
                                        '(for Chinese, Japanese and Korean: apt-get install fonts-noto-cjk)')
    look = {'font.family': ['DejaVu Sans', *([font] if font else [])], 'font.size': 10, 'axes.grid': True,
            'grid.color': '#e4e4e4', 'axes.spines.top': False, 'axes.spines.right': False, 'axes.axisbelow': True,
            'legend.frameon': False, 'axes.titlesize': 10, 'axes.titlelocation': 'left'}
    with matplotlib.rc_context(look), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of letters without a font, which the note is about
        figure = Figure(figsize=(10, 7), layout='constrained')
        grid = figure.add_gridspec(2, 3, height_ratios=(2.2, 1))
        loss = figure.add_subplot(grid[0, :])
        draw_loss(loss, runs, axis)
        for column, (name, title) in enumerate((('lr', 'learning rate'), ('grad_norm', 'gradient norm'),
                                                ('tok_s', 'tokens/s'))):
            draw_small(figure.add_subplot(grid[1, column]), runs, axis, name, title)
        figure.savefig(path, dpi=100)
    return note


def label_axis(ax, axis):
    """Name the horizontal axis, with thousands and millions written short."""
    ax.set_xlabel(axis)
    if axis != 'minutes':
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.xaxis.set_major_formatter(short_ticks)


def short_ticks(value, _position=None):
    """Return an axis number as people write it: 500, 20k, 1.5M, 2B."""
    for size, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= size:
            return f'{value / size:.3g}{unit}'
    return f'{value:.3g}'


def draw_loss(ax, runs, axis):
    """Draw training and validation loss, the best points, the whole split and what is overfitting."""
    x_update, x_eval = AXES[axis]
    bits, lone, low, high = in_bits(runs), len(runs) == 1, [], []
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        val_color, train_color = (COLORS[1], COLORS[0]) if lone else (color, color)
        scale, train_scale = (bits_a_nat(run), bits_a_nat(run, 'train') or bits_a_nat(run)) if bits else (1.0, 1.0)
        if lone:
            xs, ys = series(run.updates, x_update, 'loss')
            ax.plot(xs, ys, color=train_color, alpha=0.4, linewidth=0.8, label='train, each update')
            low += ys
            high.append(roof(xs, smooth(ys)))
        train_xs, train = series(run.evals, x_eval, 'train_loss')
        train = [y * train_scale for y in train]
        ax.plot(train_xs, train, color=train_color, linewidth=1.3, alpha=1 if lone else 0.5,
                linestyle='-' if lone else '--', label='train' if lone else None)
        xs, val = series(run.evals, x_eval, 'val_loss')
        val = [y * scale for y in val]
        ax.plot(xs, val, color=val_color, linewidth=1.8, marker='.', markersize=5, label='val' if lone else run.name)
        low += train + val
        high += [roof(train_xs, train), roof(xs, val)]
        top = best(run)
        if top is None or x_eval not in top:
            continue
        x, y, last = top[x_eval], top['val_loss'] * scale, scale * (whole(run) or 0)
        where = f'{x:,}' if axis == 'iterations' else short_ticks(x)
        told = f'best val {y:.4f} at {where}, fixed windows' if lone else f'    best {y:.4f} at {where}'
        if last and not lone:
            told += f'; whole split {last:.4f}'
        ax.plot([x], [y], 'o', color=val_color, markersize=9, markeredgecolor='white', zorder=5, label=told)
        if last:
            low, high = [*low, last], [*high, last]
            ax.plot([xs[-1]], [last], 'D', color='black', markersize=7, markerfacecolor='none', zorder=6,
                    label=f'last model {last:.4f}, whole val split' if lone else None)
        if overfitted(run):
            ax.axvspan(x, xs[-1], color=val_color, alpha=0.08, linewidth=0, label='overfitting' if lone else None)
    unit = 'bits per byte' if bits else 'nats a token'
    marks = 'dashed: training; dot: best of the fixed windows; diamond: last model, whole split'
    ax.set_title(f'{runs[0].name}: loss, {unit}' if lone else f'validation loss, {unit} ({marks})')
    label_axis(ax, axis)
    if low and max(high) > min(low):
        room = 0.05 * (max(high) - min(low))
        ax.set_ylim(min(low) - room, max(high) + room)
    if ax.lines:
        ax.legend(loc='best')
    if not any(run.updates or run.evals for run in runs):
        ax.text(0.5, 0.5, 'nothing logged yet', transform=ax.transAxes, ha='center', va='center', color='#888888')


def draw_small(ax, runs, axis, name, title):
    """Draw one of the update's other numbers; a single spike may leave through the top."""
    top = 0
    for i, run in enumerate(runs):
        xs, ys = series(run.updates, AXES[axis][0], name)
        color, usual = COLORS[i % len(COLORS)], ys if name == 'lr' else smooth(ys)
        ax.plot(xs, ys, color=color, alpha=0.2, linewidth=0.7)
        ax.plot(xs, usual, color=color, linewidth=1.3, marker='.' if len(xs) == 1 else None)
        top = max([top, *usual])
    ax.set_title(title)
    ax.set_ylim(0, 1.5 * top if name == 'grad_norm' and top else None)
    label_axis(ax, axis)
    ax.yaxis.set_major_formatter(short_ticks)


def check(s):
    """Return what is wrong with the Settings `s`."""
    return [] if s['axis'] in AXES else [f'axis must be one of {", ".join(AXES)}; got {s["axis"]!r}']


def main():
    configure(globals(), check=check, words='out_dirs')
    folders = out_dirs.split('\n')
    runs = read_runs(folders)
    for run in runs:
        print(summary(run, shutil.get_terminal_size().columns))
    path = Path(output or (f'{out_dirs}/loss.png' if len(folders) == 1 else 'compare.png'))
    try:
        note = draw(runs, path, axis)
    except ImportError:
        raise UserError('the picture needs the package matplotlib: pip install matplotlib') from None
    except OSError as error:
        raise UserError(f'could not write {path} ({error.strerror}); choose another --output=FILE.png') from None
    if note:
        print(note)
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
