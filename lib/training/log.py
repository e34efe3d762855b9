"""What a run tells: printed lines, log.jsonl, a progress bar, loss.png. wandb and TensorBoard are in trackers.py."""
import functools
import json
import math
import sys
from pathlib import Path

from tqdm import tqdm


def say(line):
    """Print a line to stdout, above the progress bar where there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def warn(line):
    """Print a warning to stderr, above the progress bar where there is one."""
    tqdm.write(f'warning: {line}', file=sys.stderr)
    sys.stderr.flush()


@functools.cache
def warn_once(line):
    """Print a warning to stderr, the first time that it is given."""
    warn(line)


def duration(minutes):
    """Return minutes as a person says them: 45s, 12m30s, 5h02m, 3d04h."""
    seconds = max(0, round(minutes * 60))
    for unit, below, large, small in ((60, 3600, 'm', 's'), (3600, 86400, 'h', 'm'), (86400, math.inf, 'd', 'h')):
        if seconds < 60:
            return f'{seconds}s'
        if seconds < below:
            rest = seconds % unit // {60: 1, 3600: 60, 86400: 3600}[unit]
            return f'{seconds // unit}{large}{rest:02d}{small}'


def step_line(step, train_loss, val_loss, bpb):
    """Return an evaluation's line; bpb None is left out."""
    line = f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}'
    return line if bpb is None else f'{line}, val bpb {bpb:.4f}'


def iter_line(record, seconds, minutes_left):
    """Return an update's line from its log record; an unknown mfu is left out."""
    mfu = '' if record['mfu'] is None else f'mfu {record["mfu"] * 100:.2f}%, '
    return (f'iter {record["iter"]}: loss {record["loss"]:.4f}, time {seconds * 1000:.2f}ms, {mfu}'
            f'tok/s {record["tok_s"]:,.0f}, eta {duration(minutes_left)}')


def recipe(settings, argv):
    """Return the config files that `settings` came from, in the order of the command line; 'defaults' for none."""
    files = {origin.rpartition(':')[0] for origin in settings.origins.values()}
    return ', '.join(word for word in argv if word in files) or 'defaults'


def tokens_line(tokens_per_iter, train_tokens, max_iters):
    """Return the banner's line on how far an iteration goes through the data; max_iters 0: the clock decides."""
    epoch = train_tokens / tokens_per_iter  # iterations
    epochs = f'; {max_iters:,} make {max_iters / epoch:,.2f} epochs' if max_iters else ''
    return f'tokens per iteration: {tokens_per_iter:,} ({epoch:,.0f} iterations an epoch{epochs})'


def warn_if_long(minutes, most=30):
    """Warn of a run that takes over `most` minutes, naming ways to a short one; returns whether it did."""
    if minutes > most:
        warn(f'this takes {duration(minutes)} or more on the CPU; --max_minutes=3 in place of --max_iters trains for '
             'three minutes, and config/train_shakespeare_char.py is a recipe made for that')
    return minutes > most


def advance(bar, done, loss, best_val_loss, tok_s, minutes_left):
    """Move the progress bar to `done` (0 to 1); what it says fits a terminal of 60 columns."""
    bar.set_description_str(f'loss {loss:.3f}, best {best_val_loss:.3f}, {short(tok_s)} tok/s, '
                            f'{duration(minutes_left)} left', refresh=False)
    bar.update(min(100, 100 * done) - bar.n)


def short(number):
    """Return a number in at most four characters: 950, 12k, 3.4M."""
    for unit, size in (('M', 1e6), ('k', 1e3)):
        if number >= 0.9995 * size:
            return f'{number / size:.1f}{unit}' if number < 9.95 * size else f'{number / size:.0f}{unit}'
    return f'{number:.0f}'


def not_finite(what, iter_num, rt, saved_iter, out_dir):
    """Return what to tell when a loss or gradient is not finite; each rank tells of its own."""
    where = f' on rank {rt.rank}' if rt.world_size > 1 else ''
    return (f'{what} at iter {iter_num}{where}; no such update or checkpoint was kept, the newest good one in '
            f'{out_dir} is of iter {saved_iter}. Lower learning_rate, or use dtype=bfloat16 or float32 if it was '
            'float16, and go on with --init_from=resume')


def spike(log, iter_num, norm, z, count):
    """Tell of an update that spike_skip left out, and note it in the log."""
    warn(f'iter {iter_num}: grad norm {norm:.3g} (z={z:.1f}), update skipped ({count} so far)')
    append_log(log, {'skipped': iter_num, 'grad_norm': norm, 'z': z})


def append_log(path, record):
    """Append one record to log.jsonl; numbers that JSON has no word for become null. A full disk is only warned of."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    try:
        with open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(clean) + '\n')
    except OSError as error:
        warn_once(f'could not write {path} ({error.strerror}); training goes on, the log will have a gap')


def read_log(path):
    """Return the records of a log.jsonl; a line that a kill broke off is left out, as is a log that does not exist."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def trim_log(path, iter_num, evaluated):
    """Drop from log.jsonl what a resumed run will do again: updates from iter_num on, evaluations after `evaluated`."""
    kept = [r for r in read_log(path) if r.get('iter', -1) < iter_num and r.get('step', -1) <= evaluated
            and r.get('skipped', -1) < iter_num]
    tmp = Path(path).with_name(f'{Path(path).name}.tmp.{id(kept)}')
    tmp.write_text(''.join(json.dumps(r) + '\n' for r in kept), encoding='utf-8')
    tmp.replace(path)


def in_notebook():
    """True where this process is a notebook's kernel: its output is no terminal, yet it redraws a line."""
    shell = sys.modules['IPython'].get_ipython() if 'IPython' in sys.modules else None
    return shell is not None and 'IPKernelApp' in shell.config


def _bar(items=None, show=True, **options):
    """Return a tqdm bar for a terminal (on stderr) or a notebook (on stdout, among the lines); elsewhere a silent one.

    A command in a notebook's cell (!python ...) has a terminal of the notebook's making.
    """
    kernel = in_notebook()
    return tqdm(items, disable=False if show and kernel else None if show else True, leave=False, miniters=0,
                file=sys.stdout if kernel else sys.stderr, mininterval=0.5 if kernel else 0.1,
                ncols=100 if kernel else None, dynamic_ncols=not kernel, **options)


def progress_bar(total, show=True):
    """Return the bar of a run, which `advance` moves."""
    return _bar(show=show, total=total, bar_format='{percentage:3.0f}%|{bar}| {desc}')


def watched(items, total, what):
    """Return `items` to loop over, with a bar that counts them and tells the time left."""
    return _bar(items, total=total, desc=what)


def draw_loss(out_dir):
    """Draw OUT_DIR/loss.png where matplotlib is installed; returns its path, or None. It cannot end a run."""
    try:
        from plot import draw, read_run
        path = Path(out_dir) / 'loss.png'
        if note := draw([read_run(out_dir)], path):
            warn(note)
    except ImportError:
        return None
    except Exception as error:
        warn(f'no loss.png ({reason(error)})')
        return None
    return path


def reason(error):
    """Return an error in a line."""
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
