"""Scaling laws fitted to one's own runs: L(N, D) = E + A / N^a + B / D^b, and the best size for a number of FLOPs.

N is parameters, D training tokens, L validation loss in nats per token (Hoffmann et al. 2022, arXiv:2203.15556).
"""
from dataclasses import dataclass

import numpy as np

from configurator import UserError


@dataclass
class Law:
    E: float
    A: float
    B: float
    a: float
    b: float
    error: float  # root mean square of the relative errors of the losses it was fitted to
    flops_per: float = 6.0  # FLOPs per parameter and token; 6 without attention

    def loss(self, n, d):
        return self.E + self.A / np.asarray(n, float)**self.a + self.B / np.asarray(d, float)**self.b

    def best_size(self, flops):
        """Return (N, D) with the lowest loss at this many FLOPs: the minimum along flops_per * N * D = flops."""
        n = (self.a * self.A / (self.b * self.B))**(1 / (self.a + self.b)) * (
            flops / self.flops_per)**(self.b / (self.a + self.b))
        return n, flops / self.flops_per / n


def _linear(n, d, loss, a, b):
    """Return (E, A, B, sum of squared relative errors) that fit best at exponents a and b, none below 0."""
    columns = np.stack([np.ones_like(n), n**-a, d**-b], 1) / loss[:, None]
    target, keep = np.ones_like(loss), [0, 1, 2]
    while True:
        found = np.zeros(3)
        found[keep] = np.linalg.lstsq(columns[:, keep], target, rcond=None)[0]
        if (found >= 0).all() or len(keep) == 1:
            return *np.maximum(found, 0), float(((columns @ np.maximum(found, 0) - target)**2).sum())
        keep.remove(int(np.argmin(found)))


def fit(n, d, loss, flops=None):
    """Return the Law that fits runs of sizes n, tokens d and losses loss, (number of runs,) each.

    For fixed exponents E, A and B are a linear least-squares problem, so only the two exponents are searched, on a grid
    that is refined around its best point. flops: of the runs, for Law.flops_per. UserError with too few runs.
    """
    n, d, loss = (np.asarray(x, float) for x in (n, d, loss))
    if len(loss) < 6 or len(set(n)) < 3 or len(set(d)) < 3:
        raise UserError('a law has five constants and needs six runs, of three sizes and three numbers of tokens; '
                        f'there are {len(loss)} runs, {len(set(n))} sizes and {len(set(d))} numbers of tokens')
    n0, d0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())  # about 1, so that the columns are of one magnitude
    low, high = np.array([0.02, 0.02]), np.array([2.0, 2.0])
    for _ in range(12):
        axes = [np.geomspace(*ends, 21) for ends in zip(low, high)]
        cost, a, b = min((_linear(n / n0, d / d0, loss, a, b)[3], a, b) for a in axes[0] for b in axes[1])
        steps = (high / low)**(2.5 / 20)  # two and a half steps of the grid on either side
        low, high = np.array([a, b]) / steps, np.array([a, b]) * steps
    E, A, B, cost = _linear(n / n0, d / d0, loss, a, b)
    per = float(np.mean(np.asarray(flops, float) / (n * d))) if flops is not None else 6.0
    return Law(float(E), float(A * n0**a), float(B * d0**b), float(a), float(b), (cost / len(loss))**0.5, per)


def minimum(n, loss):
    """Return (N, loss) at the lowest point of a parabola through losses over log N, for runs of equal FLOPs.

    (nan, nan) if the parabola has no lowest point among the sizes tried.
    """
    x = np.log(np.asarray(n, float))
    if len(set(n)) < 3:
        return np.nan, np.nan
    c2, c1, c0 = np.polyfit(x, np.asarray(loss, float), 2)
    at = -c1 / (2 * c2) if c2 > 0 else np.nan
    inside = x.min() <= at <= x.max()
    return (float(np.exp(at)), float(c0 + c1 * at + c2 * at**2)) if inside else (np.nan, np.nan)


def minima(rows):
    """Return [(FLOPs, N, loss)] of the lowest points of results with equal FLOPs, for budgets that have one.

    rows: [(flops, n, d, loss)].
    """
    found = [(flops, *minimum([r[1] for r in rows if r[0] == flops], [r[3] for r in rows if r[0] == flops]))
             for flops in sorted({r[0] for r in rows})]
    return [point for point in found if np.isfinite(point[1])]


def data_points(rows):
    """Return [(flops, n, d, loss)] of the finished rows of a results.tsv."""
    return [(float(row.get('flops') or 0), float(row['n_params']), float(row['tokens']), float(row['val_loss']))
            for row in rows if not row['error']]


def report(law, points, advise):
    """Return lines on a Law: its constants, the isoFLOP minima, and the advice for each number of FLOPs."""
    lines = [f'L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.a:.3f} + {law.B:.4g} / D^{law.b:.3f}, fitted to '
             f'{len(points)} runs, {law.error:.2%} off']
    for flops, n, loss in minima(points):
        lines.append(f'isoFLOP minimum at {flops:.3g} FLOPs: N = {n:,.0f}, loss {loss:.4f}')
    for flops in sorted({p[0] for p in points if p[0]} - {m[0] for m in minima(points)}):
        lines.append(f'no isoFLOP minimum at {flops:.3g} FLOPs among the sizes tried')
    if not (law.A > 0 and law.B > 0):
        return [*lines, 'no advice: the runs do not show how the loss depends on both size and data; widen the grid']
    largest = max(p[0] for p in points)
    for flops in advise:
        n, d = law.best_size(flops)
        beyond = f', {flops / largest:.0f} times the largest run' if flops > 10 * largest > 0 else ''
        lines.append(f'{flops:.3g} FLOPs{beyond}: {n:,.0f} parameters and {d:,.0f} tokens ({d / n:.1f} per parameter), '
                     f'loss {float(law.loss(n, d)):.4f}')
    return lines
