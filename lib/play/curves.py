"""The curves of runs that may still be training: what was appended to each log.jsonl since the page last asked."""
import json
import os
import time

MOST = 2**20  # bytes of a log in one answer
FIELDS = ('iter', 'loss', 'lr', 'tok_s', 'step', 'train_loss', 'val_loss', 'val_bpb', 'minutes')


def appended(path, cursor):
    """Return {'cursor', 'anew', 'more', 'idle', 'records'} of a log.jsonl after `cursor`, or of all of it without one.

    cursor: [number of the file, bytes read so far], as an earlier answer gave it. anew: the file was replaced, as by a
    resumed run, so what was read before does not count. more: ask again at once. idle: seconds since it was written
    to. A last line without its line end is left for the next time.
    """
    with open(path, 'rb') as file:
        stat = os.fstat(file.fileno())
        known = isinstance(cursor, list) and len(cursor) == 2 and all(type(n) is int for n in cursor)
        anew = not known or cursor[0] != stat.st_ino or not 0 <= cursor[1] <= stat.st_size
        start = 0 if anew else cursor[1]
        file.seek(start)
        raw = file.read(MOST)
    whole = raw[:raw.rfind(b'\n') + 1]
    if len(raw) == MOST and not whole:
        whole = raw  # no log has a line of a megabyte; pass over it
    records = []
    for line in whole.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append({name: record[name] for name in FIELDS if type(record.get(name)) in (int, float)})
    end = start + len(whole)
    return {'cursor': [stat.st_ino, end], 'anew': anew, 'more': len(raw) == MOST, 'records': [r for r in records if r],
            'idle': max(0.0, time.time() - stat.st_mtime)}


def curves(logs, cursors):
    """Return a dict for each run of `logs` (name to path) with what `appended` finds; one that has gone is left out."""
    found = []
    for name, path in logs.items():
        try:
            found.append({'name': name, **appended(path, cursors.get(name))})
        except OSError:
            continue
    return found
