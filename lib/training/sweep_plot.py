"""Pictures of a sweep: loss against each setting, and scaling laws. matplotlib is imported when one is drawn."""
from pathlib import Path

import numpy as np

from lib.training import law as laws
from lib.training import sweep_results
from lib.training.curves import COLORS
from lib.training.log import human_number


def _figure(columns, height=4.2):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.6 * columns, height), layout='constrained')
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def _numbers(values):
    """Return texts as numbers, or None if one of them is not."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def draw(folder, path=None):
    """Draw the sweep in `folder` to a PNG; return its path. ImportError without matplotlib.

    One panel per setting: each run is a dot, and the line joins the best mean over seeds at each value.
    """
    rows = sweep_results.read_tsv(sweep_results.find(folder))
    names = sweep_results.settings_of(rows) or ['seed'] * bool(rows and 'seed' in rows[0]) or ['n_params']
    figure, panels = _figure(len(names))
    finished = [row for row in rows if not row['error']]
    for ax, name in zip(panels, names):
        values = list(dict.fromkeys(row[name] for row in finished))
        numbers = _numbers(values)
        where = dict(zip(values, numbers or range(len(values))))
        ax.plot([where[row[name]] for row in finished], [float(row['val_loss']) for row in finished], 'o',
                color=COLORS[0], alpha=0.5, label='runs')
        best = {}
        for _, found in sweep_results.grouped(rows):
            value, mean = found[0][name], sweep_results.mean_loss(found)
            best[value] = min(mean, best.get(value, mean))
        line = sorted((where[value], mean) for value, mean in best.items())
        ax.plot(*zip(*line) if line else ((), ()), color=COLORS[1], label='best mean over seeds')
        if numbers is None:
            ax.set_xticks(range(len(values)), values)
        elif len(values) > 2 and min(numbers) > 0 and max(numbers) / min(numbers) > 20:
            ax.set_xscale('log')
        ax.set_xlabel(name)
        ax.set_ylabel('validation loss, nats per token')
        ax.grid(alpha=0.2)
    if finished:
        panels[0].legend()
    path = Path(path or Path(folder) / 'sweep.png')
    figure.savefig(path, dpi=110)
    return path


def draw_law(law, points, path):
    """Draw a Law and its runs to `path`: losses of equal FLOPs over N, the best sizes, and the surface L(N, D)."""
    figure, (iso, sizes, surface) = _figure(3)
    budgets, minima = sorted({p[0] for p in points}), laws.minima(points)
    n_all, d_all = [p[1] for p in points], [p[2] for p in points]
    for i, flops in enumerate(budgets):
        color, of = COLORS[i % len(COLORS)], sorted(p[1:] for p in points if p[0] == flops)
        iso.plot([p[0] for p in of], [p[2] for p in of], 'o', color=color, label=f'{flops:.3g} FLOPs')
        if flops:
            n = np.geomspace(of[0][0], of[-1][0], 60)
            iso.plot(n, law.loss(n, flops / law.flops_per / n), color=color, linewidth=1, alpha=0.6)
    iso.plot([m[1] for m in minima], [m[2] for m in minima], 'k*', markersize=10, label='lowest of a parabola')
    iso.set(xscale='log', xlabel='parameters N', ylabel='validation loss', title='equal FLOPs (lines: the law)')
    if law.A > 0 and law.B > 0 and max(budgets):
        c = np.geomspace(min(b for b in budgets if b), 10 * max(budgets), 60)
        sizes.plot(c, law.best_size(c)[0], color=COLORS[0], label='N by the law')
        sizes.plot(c, law.best_size(c)[1], color=COLORS[1], label='D by the law')
        sizes.plot([m[0] for m in minima], [m[1] for m in minima], 'k*', markersize=10, label='N of the minima')
    sizes.set(xscale='log', yscale='log', xlabel='FLOPs', ylabel='parameters, tokens', title='best size')
    n, d = (np.geomspace(min(x) / 1.5, max(x) * 1.5, 80) for x in (n_all, d_all))
    loss = law.loss(n[None, :], d[:, None])
    lines = surface.contour(n, d, loss, levels=12, linewidths=0.8)
    surface.clabel(lines, fontsize=7)
    surface.plot(n_all, d_all, 'o', color=COLORS[1], markersize=4)
    surface.set(xscale='log', yscale='log', xlabel='parameters N', ylabel='tokens D', title='the law; dots: runs')
    for ax in (iso, sizes, surface):
        for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
            if scale == 'log':
                axis.set_major_formatter(lambda value, _=None: human_number(value) if value < 1e10 else f'{value:.0e}')
                axis.set_minor_formatter('')
        if ax is not surface:
            ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path
