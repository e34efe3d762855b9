"""Bring the tables of docs/results.md up to date with the JSON files beside it.

    python docs/report.py

A table stands between the lines `<!-- table FILE: NAME ... -->` and `<!-- end -->`; a name may end in *. What is
between them is replaced by what the file has under these names, with the commands and the machine.
"""
import fnmatch
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.timing import read, table

PAGE = Path(__file__).with_name('results.md')


def chosen(path, patterns):
    """Return the entries of a JSON file whose names fit, in the order of the patterns."""
    entries = read(path)
    return {name: entries[name] for pattern in patterns for name in fnmatch.filter(entries, pattern)}


def section(entries):
    """Return the lines for `entries`: their tables, then for each machine the commands that were run on it."""
    if not entries:
        return ['Not measured yet.']
    lines = ['', *table(entries), '']
    for machine in dict.fromkeys(tuple(entry['machine'].items()) for entry in entries.values()):
        commands = dict.fromkeys(e['command'] for e in entries.values() if tuple(e['machine'].items()) == machine)
        lines += ['On ' + ', '.join(f'{key} {value}' for key, value in machine) + ':', '', '```',
                  *commands, '```', '']
    return lines


def fill(text, folder):
    """Return the page's text with its tables made anew from the JSON files in `folder`."""
    def replace(match):
        lines = section(chosen(folder / match[2], match[3].split()))
        return '\n'.join([match[1], *lines, match[4]])
    return re.sub(r'(<!-- table (\S+): (.*?) -->)\n.*?(<!-- end -->)', replace, text, flags=re.S)


def main():
    PAGE.write_text(fill(PAGE.read_text(encoding='utf-8'), PAGE.parent), encoding='utf-8')
    print(f'{PAGE} is up to date')


if __name__ == '__main__':
    main()
