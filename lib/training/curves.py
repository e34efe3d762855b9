"""What the losses of a run show: its best evaluation, overfitting, and the picture of them (loss.png, plot.py).

A history is a list of evaluations, [step, training loss, validation loss] each, in order; a checkpoint holds it.
A Run is the same and more, read from log.jsonl. Losses are in nats per token unless marked as bits.
"""
import contextlib
import warnings
from collections import namedtuple
from itertools import accumulate
from pathlib import Path

import numpy as np

from configurator import UserError
from lib.machine.console import reason
from lib.training import log
from lib.training.log import human_number

AXES = {'iterations': ('iter', 'step'), 'tokens': ('tokens', 'tokens'), 'minutes': ('minutes', 'minutes')}
NOISE = 0.01  # a validation loss within this fraction of the best one is not called worse
COLORS = ('#1f6fb4', '#d95f02', '#1b9e77', '#c2338b', '#7a5cc4', '#8c6d1f', '#4d4d4d')

Run = namedtuple('Run', 'name updates evals')  # the folder's name, and the two kinds of records in log.jsonl


# best and overfitting

def best_step(history):
    """Return the step of the evaluation with the lowest validation loss, 0 if there is none yet."""
    return min(history, key=lambda h: h[2])[0] if history else 0


def evaluations_since_best(history):
    """Return the number of evaluations after the best one."""
    return sum(h[0] > best_step(history) for h in history)


def overfitting(history):
    """True if the last validation loss is more than 1 % above the best one, while the training loss has fallen."""
    if not history:
        return False
    best, last = min(history, key=lambda h: h[2]), history[-1]
    return last[2] > (1 + NOISE) * best[2] and last[1] < best[1]


def overfitting_starts(history):
    """True at the first evaluation since the best one that shows overfitting, so that a warning is printed once."""
    earlier = [history[:len(history) - n] for n in range(1, evaluations_since_best(history))]
    return overfitting(history) and not any(map(overfitting, earlier))


# runs, read from their folders

def read_run(folder):
    """Return the Run in a folder. UserError if it has no log.jsonl; an empty log is a Run without records."""
    path = Path(folder) / 'log.jsonl'
    if not path.is_file():
        raise UserError(f'{path}: there is no such file; train.py --out_dir={folder} writes it')
    records = log.read_log(path)
    return Run(Path(folder).resolve().name, [r for r in records if 'iter' in r], [r for r in records if 'step' in r])


def series(records, x, y):
    """Return the lists of x and y from the records in which both are numbers."""
    points = [(r[x], r[y]) for r in records if all(isinstance(r.get(name), (int, float)) for name in (x, y))]
    return [p[0] for p in points], [p[1] for p in points]


def history_of(run):
    """Return a Run's evaluations as a history, without those whose losses are not numbers."""
    losses = [[r['step'], r.get('train_loss'), r.get('val_loss')] for r in run.evals]
    return [h for h in losses if None not in h]


def best(run):
    """Return the record of the evaluation with the lowest validation loss, or None."""
    known = [r for r in run.evals if r.get('val_loss') is not None]
    return min(known, key=lambda r: r['val_loss'], default=None)


def whole(run):
    """Return the last model's loss over the whole validation split, which a finished run logs, or None."""
    return run.evals[-1].get('whole_val_loss') if run.evals else None


def bits_per_nat(run, split='val'):
    """Return the factor from a split's loss to bits per byte, which depends on the tokenizer; None if unknown."""
    for r in run.evals:
        if r.get(f'{split}_bpb') and r.get(f'{split}_loss'):
            return r[f'{split}_bpb'] / r[f'{split}_loss']
    return None


def use_bits(runs):
    """True if only bits per byte can be compared: tokens differ in length between the runs, by known factors."""
    ratios = [bits_per_nat(run) for run in runs]
    return None not in ratios and max(ratios, default=1) > 1.02 * min(ratios, default=1)


def comparison_note(runs):
    """Return a line on what can be compared if the validation data of the runs differ, else ''."""
    data = {run.name: next((r['val_data'] for r in reversed(run.evals) if r.get('val_data')), None) for run in runs}
    if len({known for known in data.values() if known}) < 2:
        return ''
    if use_bits(runs):  # the tokens differ in any case; whether the texts do, the log does not tell
        return (f'{", ".join(data)} were evaluated on different validation data; bits per byte compare them only if '
                'their validation texts are the same')
    return (f'{", ".join(data)} were evaluated on different validation data (another text or another tokenizer), so '
            'their losses in nats per token cannot be compared')


def smooth(values, fraction=0.02):
    """Return centred moving averages over up to this fraction of the values on either side, so that none lags."""
    total, reach = [0.0, *accumulate(values)], round(fraction * len(values))
    halves = [min(i, len(values) - 1 - i, reach) for i in range(len(values))]
    return [(total[i + half + 1] - total[i - half]) / (2 * half + 1) for i, half in enumerate(halves)]


def y_limit(xs, ys):
    """Return the upper limit of the vertical axis for a curve, 0 without points.

    The steep drop in the first twentieth is clipped if the rest would get less than two thirds of the height.
    """
    if not xs:
        return 0
    early = xs[0] + 0.05 * (xs[-1] - xs[0])
    later = max([np.interp(early, xs, ys), *(y for x, y in zip(xs, ys) if x >= early)])
    return min(max(ys), min(ys) + 1.5 * (later - min(ys)))


# the picture

def font_for(text):
    """Return the name of an installed font with the letters of `text` that matplotlib's own font lacks.

    '' if it lacks none; None if no font has them.
    """
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    def lacks(path):
        with contextlib.suppress(RuntimeError, OSError):  # a file that is not a font, or not one for this library
            font = FT2Font(path)
            return {c for c in text if not font.get_char_index(ord(c))}
        return set(text)

    text = lacks(font_manager.findfont('DejaVu Sans'))
    if not text:
        return ''
    # read the folders: the manager's list may be older than a font that was installed a minute ago
    path = next((path for path in sorted(font_manager.findSystemFonts()) if not lacks(path)), None)
    if path is None:
        return None
    font_manager.fontManager.addfont(path)
    return font_manager.FontProperties(fname=path).get_name()


def draw(runs, path, axis='iterations'):
    """Draw the runs into a PNG file at `path`; returns a line about letters that no font has, or ''.

    Raises ImportError if matplotlib is missing.
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
        warnings.simplefilter('ignore')  # about letters without a font: the note reports them
        figure = Figure(figsize=(10, 7), layout='constrained')
        grid = figure.add_gridspec(2, 3, height_ratios=(2.2, 1))
        draw_losses(figure.add_subplot(grid[0, :]), runs, axis)
        for column, (name, title) in enumerate((('lr', 'learning rate'), ('grad_norm', 'gradient norm'),
                                                ('tok_s', 'tokens/s'))):
            draw_small(figure.add_subplot(grid[1, column]), runs, axis, name, title)
        figure.savefig(path, dpi=100)
    return note


def draw_loss(out_dir):
    """Draw OUT_DIR/loss.png if matplotlib is installed; returns its path, or None. A failure is only a warning."""
    path = Path(out_dir) / 'loss.png'
    try:
        note = draw([read_run(out_dir)], path)
    except ImportError:
        return None
    except Exception as error:
        log.warn(f'no loss.png ({reason(error)})')
        return None
    if note:
        log.warn(note)
    return path


def label_axis(ax, axis):
    """Name the horizontal axis, with thousands and millions abbreviated."""
    ax.set_xlabel(axis)
    if axis != 'minutes':
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.xaxis.set_major_formatter(lambda value, position: human_number(value))


def draw_losses(ax, runs, axis):
    """Draw training and validation loss, the best evaluations, the whole-split loss and the overfitting."""
    bits, alone, limits = use_bits(runs), len(runs) == 1, [[], []]
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        colors = (COLORS[0], COLORS[1]) if alone else (color, color)
        lows, highs = draw_curves(ax, run, axis, bits, alone, *colors)
        limits[0] += lows
        limits[1] += highs
        if best(run) is not None and AXES[axis][1] in best(run):
            marked = draw_marks(ax, run, axis, bits, alone, colors[1])
            limits[0] += marked
            limits[1] += marked
    unit = 'bits per byte' if bits else 'nats per token'
    marks = 'dashed: training; dot: best of the fixed windows; diamond: last model, whole split'
    ax.set_title(f'{plain(runs[0].name)}: loss, {unit}' if alone else f'validation loss, {unit} ({marks})')
    label_axis(ax, axis)
    low, high = limits
    if low and max(high) > min(low):
        margin = 0.05 * (max(high) - min(low))
        ax.set_ylim(min(low) - margin, max(high) + margin)
    if ax.lines:
        ax.legend(loc='best')
    if not any(run.updates or run.evals for run in runs):
        ax.text(0.5, 0.5, 'nothing logged yet', transform=ax.transAxes, ha='center', va='center', color='#888888')


def draw_curves(ax, run, axis, bits, alone, train_color, val_color):
    """Draw a run's curves; returns the lists of values that the vertical axis has to include, low and high."""
    x_update, x_eval = AXES[axis]
    low, high = [], []
    scale = bits_per_nat(run) if bits else 1.0
    train_scale = bits_per_nat(run, 'train') or scale if bits else 1.0
    if alone:
        xs, ys = series(run.updates, x_update, 'loss')
        ax.plot(xs, ys, color=train_color, alpha=0.4, linewidth=0.8, label='train, logged updates')
        low += ys
        high.append(y_limit(xs, smooth(ys)))
    xs, train = series(run.evals, x_eval, 'train_loss')
    train = [y * train_scale for y in train]
    ax.plot(xs, train, color=train_color, linewidth=1.3, alpha=1 if alone else 0.5, linestyle='-' if alone else '--',
            label='train' if alone else None)
    high.append(y_limit(xs, train))
    xs, val = series(run.evals, x_eval, 'val_loss')
    val = [y * scale for y in val]
    ax.plot(xs, val, color=val_color, linewidth=1.8, marker='.', markersize=5,
            label='val' if alone else plain(run.name))
    high.append(y_limit(xs, val))
    return low + train + val, high


def draw_marks(ax, run, axis, bits, alone, color):
    """Mark the best evaluation, the whole-split loss and the overfitting; returns the whole-split loss in a list."""
    x_eval, scale = AXES[axis][1], bits_per_nat(run) if bits else 1.0
    top, end = best(run), series(run.evals, x_eval, 'val_loss')[0][-1]
    x, y, last = top[x_eval], top['val_loss'] * scale, scale * (whole(run) or 0)
    where = f'{x:,}' if axis == 'iterations' else human_number(x)
    label = f'best val {y:.4f} at {where}, fixed windows' if alone else f'    best {y:.4f} at {where}'
    if last and not alone:
        label += f'; whole split {last:.4f}'
    # above the diamond and inside it, since both are often at the same place
    ax.plot([x], [y], 'o', color=color, markersize=7, markeredgecolor='white', zorder=7, label=label)
    if overfitting(history_of(run)):
        ax.axvspan(x, end, color=color, alpha=0.08, linewidth=0, label='overfitting' if alone else None)
    if last:
        ax.plot([end], [last], 'D', color='black', markersize=11, markerfacecolor='none', zorder=6,
                label=f'last model {last:.4f}, whole val split' if alone else None)
    return [last] if last else []


def plain(name):
    """Return a folder's name as matplotlib shows it literally; between two dollar signs it would read a formula."""
    return name.replace('$', r'\$')


def draw_small(ax, runs, axis, name, title):
    """Draw one of the updates' other numbers; single spikes of the gradient norm are clipped."""
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
    ax.yaxis.set_major_formatter(lambda value, position: human_number(value))
