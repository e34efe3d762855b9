"""The results of a sweep: results.tsv, a table, and which differences are more than chance."""
import csv
import math
import statistics
from pathlib import Path

from configurator import UserError
from lib.machine.distributed import first_line
from lib.machine.files import atomic_write
from lib.training.log import human_number
from lib.training.sweep import MEASURED, row_problem

# two-sided 95 % quantiles of Student's t by degrees of freedom; above 30 nearly the normal distribution's 1.96
T95 = (math.inf, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
       2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def write_tsv(path, rows):
    """Write rows, dicts of the settings that vary and the MEASURED columns, as a table with tabs."""
    names = [name for name in (rows[0] if rows else {}) if name not in MEASURED] + list(MEASURED)
    with atomic_write(path) as temporary, open(temporary, 'w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, names, delimiter='\t', lineterminator='\n')
        writer.writeheader()
        writer.writerows({name: ' '.join(str(value).split()) for name, value in row.items()} for row in rows)


def read_tsv(path):
    """Return the rows of a results.tsv as dicts of text; UserError if it is not one."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            rows = list(csv.DictReader(file, delimiter='\t'))
    except (csv.Error, ValueError) as error:  # ValueError: not UTF-8
        raise UserError(f'{path} is not a results.tsv of sweep.py: {first_line(error)}') from None
    for number, row in enumerate(rows, 2):
        if lacking := set(MEASURED) - row.keys():
            raise UserError(f'{path} is not a results.tsv of sweep.py: it lacks {", ".join(sorted(lacking))}')
        if None in row or None in row.values():
            raise UserError(f'{path}:{number}: expected {len(rows[0])} columns')
        if problem := row_problem(row):
            raise UserError(f'{path}:{number}: {problem}')
    return rows


def settings_of(rows):
    """Return the names of the settings that vary, without the seed."""
    return [name for name in (rows[0] if rows else {}) if name not in (*MEASURED, 'seed')]


def grouped(rows):
    """Return [(values of the settings that vary, their finished rows)], the lowest mean loss first."""
    names, groups = settings_of(rows), {}
    for row in rows:
        if not row['error']:
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return sorted(groups.items(), key=lambda group: mean_loss(group[1]))


def mean_loss(rows):
    return statistics.mean(float(row['val_loss']) for row in rows)


def least_difference(groups):
    """Return (the smallest difference of two means that is more than chance, degrees of freedom); None if unknown.

    Losses of one setting differ by the seed only. The standard deviation is pooled over the settings, which is
    justified if the seed matters about equally in all; two means then differ with 95 % confidence by Student's t.
    """
    losses = [[float(row['val_loss']) for row in rows] for _, rows in groups]
    freedom = sum(len(values) - 1 for values in losses)
    if freedom < 1 or len(losses) < 2:
        return None
    variance = sum(sum((x - statistics.mean(values))**2 for x in values) for values in losses) / freedom
    seeds = statistics.harmonic_mean([len(values) for values in losses])
    return T95[min(freedom, len(T95) - 1)] * math.sqrt(2 * variance / seeds), freedom


def table(rows):
    """Return the lines of a table, best first; failed runs are at the end, with their error."""
    names, groups = settings_of(rows), grouped(rows)
    several = any(len(found) > 1 for _, found in groups)
    lines = [[*names, 'params', 'tokens', 'seconds', 'val loss', *['range over seeds'] * several, 'val bpb']]
    for values, found in groups:
        losses = [float(row['val_loss']) for row in found]
        bits = [float(row['val_bpb']) for row in found if row['val_bpb'] != '']
        lines.append([*values, human_number(float(found[0]['n_params'])),
                      human_number(statistics.mean(float(row['tokens']) for row in found)),
                      f'{statistics.mean(float(row["seconds"]) for row in found):.0f}', f'{mean_loss(found):.4f}',
                      *[f'{min(losses):.4f} to {max(losses):.4f}, {len(losses)} seeds'] * several,
                      f'{statistics.mean(bits):.4f}' if bits else ''])
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    text = ['  '.join(f'{cell!s:>{width}}' for cell, width in zip(line, widths)) for line in lines]
    failed = [row for row in rows if row['error']]
    return text + [f'{" ".join(f"{name}={row[name]}" for name in row if name not in MEASURED)}: {row["error"]}'
                   for row in failed]


def verdict(rows):
    """Return a sentence on which of the differences are more than chance."""
    groups = grouped(rows)
    if len(groups) < 2:
        return ''
    if (known := least_difference(groups)) is None:
        return 'With one seed per setting, differences may be chance; --seeds=3 shows how much the seed matters.'
    least, freedom = known
    names, best = settings_of(rows), mean_loss(groups[0][1])
    ties = [values for values, found in groups[1:] if mean_loss(found) - best < least]
    sentence = (f'Differences below {least:.4f} may be chance (95 %, from the spread over seeds, {freedom} degrees of '
                'freedom): ')
    first = ' '.join(f'{name}={value}' for name, value in zip(names, groups[0][0]))
    if not ties:
        return sentence + f'{first} is better than all others.'
    if len(ties) == len(groups) - 1:
        return sentence + 'no setting is better than the others.'
    return sentence + (f'{first} is not shown to be better than the next {len(ties)}, but better than the last '
                       f'{len(groups) - 1 - len(ties)}.')


def find(folder):
    """Return the path of the results.tsv in a folder, or None."""
    path = Path(folder) / 'results.tsv'
    return path if path.is_file() else None
