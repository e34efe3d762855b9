"""Update the tables and pictures of docs/results.md and docs/experiments.md from the JSON files in docs/.

    python benchmarks/results_page.py

A table is between the lines `<!-- table FILE: NAME ... -->` and `<!-- end -->`. A name may end in *; `only QUANTITY`
after the names leaves out the other quantities. The text between the two lines is replaced by the entries with these
names, with their commands and machines. The row growth is also drawn, in growth.png, and the
minutes_* runs of recipe.json in minutes.png.
"""
import fnmatch
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import read, table
from configurator import REPO

DOCS = REPO / 'docs'


def chosen(path, patterns):
    """Return the entries of a JSON file whose names match, in the order of the patterns."""
    entries = read(path)
    return {name: entries[name] for pattern in patterns for name in fnmatch.filter(entries, pattern)}


def section(entries, only):
    """Return the lines for `entries`: their tables, then for each machine its commands."""
    if not entries:
        return ['Not measured yet.']
    shown = {name: {**entry, 'sides': {side: {unit: v for unit, v in units.items() if only in ('', unit)}
                                       for side, units in entry['sides'].items()}} for name, entry in entries.items()}
    lines = ['', *table(shown), '']
    for machine in dict.fromkeys(tuple(entry['machine'].items()) for entry in entries.values()):
        commands = dict.fromkeys(e['command'] for e in entries.values() if tuple(e['machine'].items()) == machine)
        lines += ['On ' + ', '.join(f'{key} {value}' for key, value in machine) + ':', '', '```',
                  *commands, '```', '']
    return lines


def fill(text, folder):
    """Return the text of the page with its tables made again from the JSON files in `folder`."""
    def replace(match):
        names, _, only = match[3].partition(' only ')
        lines = section(chosen(folder / match[2], names.split()), only)
        return '\n'.join([match[1], *lines, match[4]])
    return re.sub(r'(<!-- table (\S+): (.*?) -->)\n.*?(<!-- end -->)', replace, text, flags=re.S)


def draw_growth(entry, path):
    """Draw time per token over each size of a model, and memory over the size of the prepared text."""
    from matplotlib.figure import Figure
    values = {unit: summary['median'] for unit, summary in entry['sides']['ours'].items()}
    fig = Figure(figsize=(13, 3.4), layout='constrained')
    axes = fig.subplots(1, 4)
    panels = [(what, rf'us per token, {what} (\d+)', f'exponent of time per token in {what}',
               f'exponent of FLOPs per token in {what}', 'us per token') for what in ('layers', 'width', 'context')]
    panels += [('MB of text', r'MiB at peak, (\d+) MB of text', 'exponent of memory in text', '', 'MiB at peak')]
    for ax, (what, pattern, fitted, expected, label) in zip(axes, panels):
        points = [(int(match[1]), y) for unit, y in values.items() if (match := re.match(pattern, unit))]
        x, y = zip(*points)
        ax.loglog(x, y, 'o-', base=2, label=f'measured, exponent {values[fitted]:.2f}')
        slope = values.get(expected, 0.0)
        ax.loglog(x, [y[-1] * (size / x[-1])**slope for size in x], '--', color='gray', base=2,
                  label=f'expected, exponent {slope:.2f}')
        ax.set(xlabel=what, xticks=x, xticklabels=x, ylabel=label, ylim=(min(y) / 2, max(y) * 2))
        ticks = [tick for tick in (50, 100, 200, 500, 1000, 2000, 5000, 10000) if min(y) / 2 <= tick <= max(y) * 2]
        ax.set_yticks(ticks, labels=ticks)
        ax.minorticks_off()
        ax.legend(fontsize=8, loc='upper left')
    fig.suptitle(f'{entry["what"]}; {entry["machine"]["cpu"]}, {entry["machine"]["isa"]}', fontsize=10)
    fig.savefig(path, dpi=90)


def seconds(entry):
    """Return how long the first run of an entry took, in seconds."""
    return next(iter(entry['histories'].values()))[0][-1][0]


def draw_minutes(entries, path):
    """Draw the validation loss over the seconds since the command started, one line for each seed of each entry."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(9, 4.5), layout='constrained')
    ax = fig.subplots()
    for i, entry in enumerate(entries):
        for side, seeds in entry['histories'].items():
            color = 'gray' if side != 'ours' else f'C{i}'
            for j, history in enumerate(seeds):
                seconds, losses = zip(*history)
                label = entry['what'].split(', ', 1)[1] if side == 'ours' else side
                ax.plot(seconds, losses, 'o-', color=color, markersize=3, linewidth=1, label=label if j == 0 else None)
    last = max(history[-1][0] for entry in entries for seeds in entry['histories'].values() for history in seeds)
    ticks = [tick for tick in (10, 20, 45, 90, 180, 360, 600, 1200, 3600) if tick < 1.2 * last]
    ax.set(xlabel='seconds since the command', ylabel='validation loss', xscale='log', xlim=(10, 1.2 * last),
           ylim=(1.35, 2.6))
    ax.set_xticks(ticks, labels=ticks)
    ax.minorticks_off()
    ax.legend(fontsize=8)
    machine = entries[0]['machine']
    ax.set_title(f'characters of Shakespeare; {machine["cpu"]}, {machine["isa"]}', fontsize=10)
    fig.savefig(path, dpi=100)


def main():
    if entry := next(iter(chosen(DOCS / 'bench.json', ['growth*']).values()), None):
        draw_growth(entry, DOCS / 'growth.png')
    if runs := chosen(DOCS / 'recipe.json', ['minutes_*']).values():
        draw_minutes(sorted(runs, key=seconds), DOCS / 'minutes.png')
    for page in (DOCS / 'results.md', DOCS / 'experiments.md'):
        page.write_text(fill(page.read_text(encoding='utf-8'), DOCS), encoding='utf-8')
        print(f'{page} is up to date')


if __name__ == '__main__':
    main()
