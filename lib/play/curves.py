"""Loss curves of runs that may still be training: the new records of each log.jsonl since the last request."""
import os
import time

from lib.training.log import parse_record

MOST = 2**20  # bytes of a log in one answer
FIELDS = ('iter', 'loss', 'lr', 'tok_s', 'step', 'train_loss', 'val_loss', 'val_bpb', 'minutes')


def appended(path, cursor):
    """Return the records of a log.jsonl after `cursor`, as {'cursor', 'anew', 'more', 'idle', 'records'}.

    cursor: [identity of the file, bytes read so far] from an earlier answer, or None. anew: the file was replaced, for
    instance by a resumed run, so drop the earlier records. more: there is more to read now. idle: seconds since the
    last write. An unfinished last line is left for the next request.
    """
    with open(path, 'rb') as file:
        stat = os.fstat(file.fileno())
        identity = str(stat.st_ino)  # as text, because JavaScript rounds integers above 2**53
        known = isinstance(cursor, list) and len(cursor) == 2 and type(cursor[1]) is int
        anew = not known or cursor[0] != identity or not 0 <= cursor[1] <= stat.st_size
        start = 0 if anew else cursor[1]
        file.seek(start)
        raw = file.read(MOST)
    whole = raw[:raw.rfind(b'\n') + 1]
    if len(raw) == MOST and not whole:
        whole = raw  # no record is a megabyte long; skip it
    records = []
    for line in whole.splitlines():
        record = parse_record(line.decode('utf-8-sig', 'replace')) or {}
        records.append({name: record[name] for name in FIELDS if record.get(name) is not None})
    end = start + len(whole)
    return {'cursor': [identity, end], 'anew': anew, 'more': len(raw) == MOST, 'records': [r for r in records if r],
            'idle': max(0.0, time.time() - stat.st_mtime)}


def curves(logs, cursors):
    """Return `appended` for each run of `logs`, {name: path}; a log that no longer exists is left out."""
    found = []
    for name, path in logs.items():
        try:
            found.append({'name': name, **appended(path, cursors.get(name))})
        except OSError:
            continue
    return found
