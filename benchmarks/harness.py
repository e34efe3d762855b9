"""What the measuring scripts share: timed subprocesses, results kept as JSON, and tables made from them.

A JSON file holds {name: entry}; an entry has what, command, commit, machine and sides: {program or variant: {quantity:
summary}}. The unit is part of the quantity's name.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from configurator import REPO, UserError


def run_and_parse(command, pattern='', enough=lambda found: False, env=None):
    """Run a command; return ([(seconds since its start, match)] of the lines with `pattern`, seconds, peak MiB).

    enough: a function of the matches so far; the command is killed once it is true. Peak memory is that of the largest
    process, 0 if the system does not report it. UserError if the command fails. Writes stderr.txt in the working
    directory.
    """
    start, found, killed, peak = time.perf_counter(), [], False, 0.0
    with open('stderr.txt', 'w+', encoding='utf-8') as errors:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True,
                                   encoding='utf-8', env={**os.environ, 'PYTHONUNBUFFERED': '1', **(env or {})})
        for line in process.stdout:
            if pattern and not killed and (match := re.search(pattern, line)):
                found.append((time.perf_counter() - start, match))
                if killed := enough(found):
                    process.kill()
        process.stdout.close()
        if hasattr(os, 'wait4'):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)
        seconds = time.perf_counter() - start
        if process.wait() and not killed:
            errors.seek(0)
            last_line = (errors.read().strip().splitlines() or ['it printed no error'])[-1]
            raise UserError(f'{" ".join(map(str, command))[:200]} ended with status {process.returncode}: {last_line}')
    return found, seconds, peak


def gpu_memory():
    """Return the MiB in use on the GPU that has most in use, as nvidia-smi reports them; 0 if there is none."""
    command = ['nvidia-smi', '--query-gpu=memory.used', '--format=csv,noheader,nounits']
    try:
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return 0.0
    return max(map(float, used), default=0.0)


def run_in_subprocess(name, *args):
    """Call a function of a module in benchmarks/, such as 'workloads.machine', in a new process; return its result.

    Arguments and result are plain values.
    """
    module, function = name.split('.')
    code = (f'import json, sys; sys.path.insert(0, {str(REPO)!r}); from benchmarks import {module}; '
            f'print("result", json.dumps({module}.{function}(*{args!r})))')
    return json.loads(run_and_parse([sys.executable, '-c', code], '^result (.*)')[0][-1][1][1])


def commit():
    """Return the commit of this checkout, with '+' if files have changed since; '' if git cannot tell."""
    git = ['git', '-C', str(REPO)]
    try:
        head = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ''
    return head.stdout.strip() + ('+' if changes.stdout.strip() else '')


def summary(values):
    """Return what is kept of the values of several repeats."""
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values), 'values': values}


def read(path):
    """Return a file's entries, {} if there is no such file."""
    return json.loads(Path(path).read_text(encoding='utf-8')) if Path(path).exists() else {}


def add(path, entries):
    """Add `entries` to the file at `path`; they replace entries of the same name."""
    Path(path).write_text(json.dumps({**read(path), **entries}, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def number(x):
    """Return a number for a table: four significant digits, thousands in full; infinity is 'never'."""
    if x == float('inf'):
        return 'never'
    return f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.4g}'


def spread(s):
    """Return a summary as text: the median, and in brackets the lowest and the highest value if they differ."""
    text, ends = number(s['median']), [number(s['min']), number(s['max'])]
    return text if ends[0] == ends[1] else f'{text} ({ends[0]} to {ends[1]})'


def gain(quantity, ours, other):
    """Return how many times better ours is, as text; '' if neither more nor less is better."""
    less = quantity.replace(',', ' ').split()[0] in ('s', 'ms', 'us') or quantity.startswith('MiB at peak')
    known = all(0 < side['median'] < float('inf') for side in (ours, other))
    if not known or not (less or '/s' in quantity):
        return ''
    ratio = ours['median'] / other['median']
    return f'{number(1 / ratio if less else ratio)} x'


def table(entries):
    """Return Markdown lines: one table of the entries with at most two sides, then one for each entry with more."""
    few = {name: entry for name, entry in entries.items() if len(entry['sides']) < 3}
    lines = table_of_pairs(few.values()) if few else []
    for entry in entries.values():
        if len(entry['sides']) > 2:
            lines += ['', *table_of_variants(entry)]
    return lines


def table_of_pairs(entries):
    """Return the Markdown lines of a table with a row for each quantity: ours, the other side, and the gain."""
    other = next((list(entry['sides'])[1] for entry in entries if len(entry['sides']) > 1), '')
    lines = [f'| what | quantity | ours | {other} | gain |', '|---|---|---|---|---|']
    for entry in entries:
        sides = list(entry['sides'].values())
        for quantity, ours in sides[0].items():
            line = f'| {entry["what"]} | {quantity} | {spread(ours)} | '
            theirs = sides[1].get(quantity) if len(sides) > 1 else None
            line += f'{spread(theirs)} | {gain(quantity, ours, theirs)} |' if theirs else '| |'
            lines.append(line)
    return lines


def table_of_variants(entry):
    """Return the Markdown lines of a table with a row for each quantity and a column for each side."""
    first, *others = sides = entry['sides']
    lines = [f'| {entry["what"]} | {" | ".join(sides)} |', '|---' * (1 + len(sides)) + '|']
    for quantity in dict.fromkeys(quantity for side in sides.values() for quantity in side):
        ours = sides[first].get(quantity)
        cells = [spread(ours) if ours else '']
        for side in others:
            theirs = sides[side].get(quantity)
            times = gain(quantity, ours, theirs) if ours and theirs and first == 'ours' else ''
            cells.append((spread(theirs) if theirs else '') + (f'; ours {times}' if times else ''))
        lines.append(f'| {quantity} | {" | ".join(cells)} |')
    return lines
