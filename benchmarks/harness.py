"""What measuring scripts share: processes watched from outside, numbers kept as JSON, and tables made of them."""
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from configurator import REPO, UserError


def watch(command, pattern='', enough=lambda found: False, env=None):
    """Run a command; return ([(seconds from its start, match)] of the lines with `pattern`, seconds, peak MiB).

    enough: from the matches so far to whether the command may be ended. Peak memory is that of its largest process,
    0 where the system does not tell. UserError where the command fails. Writes stderr.txt in the working directory.
    """
    began, found, ended, peak = time.perf_counter(), [], False, 0.0
    with open('stderr.txt', 'w+', encoding='utf-8') as errors:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True,
                                   encoding='utf-8', env={**os.environ, 'PYTHONUNBUFFERED': '1', **(env or {})})
        for line in process.stdout:
            if pattern and not ended and (match := re.search(pattern, line)):
                found.append((time.perf_counter() - began, match))
                if ended := enough(found):
                    process.kill()
        process.stdout.close()
        if hasattr(os, 'wait4'):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)
        took = time.perf_counter() - began
        if process.wait() and not ended:
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or ['it said nothing'])[-1]
            raise UserError(f'{" ".join(map(str, command))[:200]} ended with status {process.returncode}: {reason}')
    return found, took, peak


def inside(name, *args):
    """Return what a function of benchmarks/workloads.py returns, called in a process of its own."""
    code = (f'import json, sys; sys.path.insert(0, {str(REPO)!r}); from benchmarks import workloads; '
            f'print("result", json.dumps(workloads.{name}(*{args!r})))')
    return json.loads(watch([sys.executable, '-c', code], '^result (.*)')[0][-1][1][1])


def summary(values):
    """Return what is kept of the values of several turns."""
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values), 'values': values}


def read(path):
    """Return a file's entries, {} where there is no such file."""
    return json.loads(Path(path).read_text(encoding='utf-8')) if Path(path).exists() else {}


def add(path, entries):
    """Add `entries` to those in the file at `path`, in place of what has the same name."""
    Path(path).write_text(json.dumps({**read(path), **entries}, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def number(x):
    """Return a number with four significant digits; what did not happen is infinite."""
    if x == float('inf'):
        return 'never'
    return f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.4g}'


def spread(s):
    """Return a summary as text: median, and in brackets what it lies between."""
    text, ends = number(s['median']), [number(s['min']), number(s['max'])]
    return text if ends[0] == ends[1] else f'{text} ({ends[0]} to {ends[1]})'


def gain(unit, ours, other):
    """Return how many times better ours is, as text: '' where neither more nor less is better."""
    less = unit.replace(',', ' ').split()[0] in ('s', 'ms', 'us') or unit == 'MiB at peak'
    known = all(0 < side['median'] < float('inf') for side in (ours, other))
    if not known or not (less or '/s' in unit):
        return ''
    ratio = ours['median'] / other['median']
    return f'{number(1 / ratio if less else ratio)} x'


def table(entries):
    """Return Markdown lines: one table of what has at most two sides, then one for each entry with more."""
    lines = []
    few = {name: entry for name, entry in entries.items() if len(entry['sides']) < 3}
    if few:
        other = next((list(entry['sides'])[1] for entry in few.values() if len(entry['sides']) > 1), '')
        lines += [f'| what | quantity | ours | {other} | gain |', '|---|---|---|---|---|']
    for entry in few.values():
        sides = list(entry['sides'].values())
        for unit, ours in sides[0].items():
            their = sides[-1].get(unit) if len(sides) > 1 else None
            lines.append(f'| {entry["what"]} | {unit} | {spread(ours)} | ' +
                         (f'{spread(their)} | {gain(unit, ours, their)} |' if their else '| |'))
    for entry in entries.values():
        if len(entry['sides']) > 2:
            first, *others = entry['sides']
            lines += ['', f'| {entry["what"]} | {" | ".join(entry["sides"])} |', '|---' * (2 + len(others)) + '|']
            for unit, ours in entry['sides'][first].items():
                cells = [spread(ours)]
                for side in others:
                    their = entry['sides'][side].get(unit)
                    times = their and first == 'ours' and gain(unit, ours, their)
                    cells.append((spread(their) if their else '') + (f'; ours {times}' if times else ''))
                lines.append(f'| {unit} | {" | ".join(cells)} |')
    return lines
