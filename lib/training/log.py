"""The log of a run: printed lines, log.jsonl and the progress bar. wandb and TensorBoard are in trackers.py."""
import errno
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from lib.machine import console, files
from lib.text.schema import parse_json

NUMBERS = {'loss', 'lr', 'grad_norm', 'tok_s', 'mfu', 'minutes', 'tokens', 'train_loss', 'val_loss', 'train_bpb',
           'val_bpb', 'whole_train_loss', 'whole_val_loss', 'whole_val_bpb'}  # names in log.jsonl


def say(line):
    """Print a line to stdout, above the progress bar; to stderr if stdout is lost."""
    file = sys.stderr if console.stdout_lost() else sys.stdout
    tqdm.write(console.printable(line), file=file)
    file.flush()


def warn(line):
    """Print a warning to stderr, above the progress bar."""
    tqdm.write(f'warning: {console.printable(line)}', file=sys.stderr)
    sys.stderr.flush()


def ignore(line):
    """Print nothing: what ranks other than 0 use in place of `say` and `warn`."""


@functools.cache
def warn_once(line):
    """Print a warning to stderr unless this process has printed it before."""
    warn(line)


def human_number(value):
    """Return a number with three significant digits and a unit: 0.006, 950, 12.3k, 3.4M, 2B."""
    for size, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= 0.9995 * size:  # 999.6 is rounded to 1k, not to 1000
            return f'{float(f"{value / size:.3g}"):g}{unit}'
    return f'{value:.3g}'


def duration(minutes):
    """Return minutes in the two largest units: 45s, 12m30s, 5h02m, 3d04h."""
    seconds = max(0, round(minutes * 60))
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m{seconds % 60:02d}s'
    if seconds < 86400:
        return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'
    return f'{seconds // 86400}d{seconds % 86400 // 3600:02d}h'


def step_line(step, train_loss, val_loss, bpb, since_best=0, patience=0):
    """Return the line of an evaluation; bits per byte are left out if None.

    since_best: evaluations after the best one; shown if training ends after `patience` of them.
    """
    line = f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}'
    if bpb is not None:
        line += f', val bpb {bpb:.4f}'
    return f'{line}, no better for {since_best} of {patience} evaluations' if patience and since_best else line


def iter_line(record, seconds, minutes_left):
    """Return the line of an update from its log record; an unknown MFU is left out."""
    mfu = '' if record['mfu'] is None else f'mfu {record["mfu"] * 100:.2f}%, '
    return (f'iter {record["iter"]}: loss {record["loss"]:.4f}, time {seconds * 1000:.2f}ms, {mfu}'
            f'tok/s {record["tok_s"]:,.0f}, eta {duration(minutes_left)}')


def recipe(settings, argv):
    """Return the config files that `settings` came from, in the order of the command line, or 'defaults'."""
    files_used = {origin.place.rpartition(':')[0] for origin in settings.origins.values() if origin.kind == 'config'}
    return ', '.join(word for word in argv if word in files_used) or 'defaults'


def architecture(config):
    """Return a GPTConfig in a few words for the banner: GPT-2's architecture, or the options that differ from it."""
    gpt2 = type(config)().model_args()
    options = {name: value for name, value in config.model_args().items() if name not in gpt2}
    if not options:
        return "GPT-2's architecture"
    return (', '.join(name if value is True else f'{name}={value}' for name, value in options.items())
            + "; config/gpt2_classic.py gives GPT-2's architecture")


def tokens_line(tokens_per_iter, train_tokens, max_iters):
    """Return the banner's line on iterations and epochs; max_iters is 0 if a time limit ends the run."""
    epoch = train_tokens / tokens_per_iter  # iterations
    epochs = f'; {max_iters:,} iterations are {max_iters / epoch:,.2f} epochs' if max_iters else ''
    return f'tokens per iteration: {tokens_per_iter:,} ({epoch:,.0f} iterations per epoch{epochs})'


def banner(rt, settings, data, model, sequences, max_iters, resumed):
    """Return the lines printed before training. sequences: per update. max_iters: 0 if a time limit ends the run."""
    block_size, warmup, lines = settings['block_size'], settings['context_warmup'], []
    if settings['init_from'] == 'auto' and not resumed:
        lines.append(f'no checkpoint in {settings["out_dir"]}/: starting from scratch')
    lines += [f'device: {rt.description}' + (f'; {rt.world_size} processes' if rt.world_size > 1 else ''),
             f'recipe: {recipe(settings, sys.argv[1:])}; {architecture(model.config)}',
             f'number of parameters: {model.get_num_params() / 1e6:.2f}M',
             *([data.train.describe(block_size)] if data.marks else []),
             tokens_line(sequences * block_size, data.train.epoch_tokens(block_size), 0 if warmup else max_iters)]
    if warmup:
        lines.append(f'context: {block_size // 4} tokens in the first {warmup / 2:.0%} of the run, {block_size // 2} '
                     f'until {warmup:.0%}, then {block_size}')
    return lines


def append_log(path, record):
    """Append a record to log.jsonl; NaN and infinity become null. A full disk is only a warning."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    try:
        with open(path, 'ab', buffering=0) as f:
            size, line = f.seek(0, os.SEEK_END), json.dumps(clean).encode() + b'\n'
            try:
                if f.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                f.truncate(size)  # a part of a line would spoil the next one
                raise
    except OSError as error:
        warn_once(f'could not write {path} ({error.strerror}); training continues, the log will have a gap')


def read_log(path):
    """Return the records of a log.jsonl, without incomplete lines (from a killed run); [] if there is no such file."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding='utf-8-sig', errors='replace').splitlines()
    return [record for line in lines if (record := parse_record(line)) is not None]


def parse_record(line):
    """Return the record in a line of log.jsonl, None if it holds none that this program writes."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    fine = isinstance(record, dict) and all(_valid(name, value) for name, value in record.items())
    return record if fine else None


def _valid(name, value):
    """Return whether a value of log.jsonl is of the kind that this program writes: a finite number or null, or text."""
    if name in ('iter', 'step'):
        return type(value) is int and 0 <= value < 2**53
    if name in ('val_data', 'sample'):
        return type(value) is str
    return name not in NUMBERS or value is None or (abs(value) < 2**53 if type(value) is int else
                                                   type(value) is float and abs(value) < 1e300)


def trim_log(path, iter_num, evaluated):
    """Remove what a resumed run will log again: updates from iter_num on, and evaluations after step `evaluated`.

    Lines that this program has not written stay, but for a last one that is cut off.
    """
    try:
        lines = Path(path).read_text(encoding='utf-8-sig', errors='replace').split('\n') if Path(path).exists() else []
    except OSError as error:
        return warn(f'{path} cannot be read ({error.strerror}); a resumed run may be in it twice')
    records = [(line, parse_record(line) or {}) for line in lines[:-1]]
    kept = [line for line, r in records if line.strip() and r.get('iter', -1) < iter_num
            and r.get('step', -1) <= evaluated]
    try:
        with files.atomic_write(path) as temporary, open(temporary, 'w', encoding='utf-8') as f:
            f.writelines(line + '\n' for line in kept)
    except OSError as error:
        return warn(f'could not shorten {path} ({error.strerror}); repeated updates will be in it twice')


def in_notebook():
    """True in a notebook's kernel: its output is not a terminal, but it can redraw a line."""
    shell = sys.modules['IPython'].get_ipython() if 'IPython' in sys.modules else None
    return shell is not None and 'IPKernelApp' in shell.config


def _bar(items=None, show=True, **options):
    """Return a tqdm bar: on stderr of a terminal, or on stdout in a notebook; invisible elsewhere.

    A command in a notebook's cell (!python ...) has a terminal, made by the notebook.
    """
    kernel = in_notebook()
    disable = None  # tqdm draws the bar if the file is a terminal
    if not show:
        disable = True
    elif kernel:
        disable = False
    bar = tqdm(items, disable=disable, leave=False, miniters=0, file=sys.stdout if kernel else sys.stderr,
               mininterval=0.5 if kernel else 0.1, ncols=100 if kernel else None, dynamic_ncols=not kernel, **options)
    if not bar.disable:  # a clock that is set must not stop the bar
        bar._time, bar.start_t, bar.last_print_t = time.monotonic, time.monotonic(), time.monotonic()
    return bar


def progress_bar(total, show=True):
    """Return the bar of a training run, to be moved by `update_bar`."""
    return _bar(show=show, total=total, bar_format='{percentage:3.0f}%|{bar}| {desc}')


def update_bar(bar, done, loss, best_val_loss, tok_s, minutes_left):
    """Move the bar of a training run to the fraction `done`; the text fits a terminal of 60 columns."""
    bar.set_description_str(f'loss {loss:.3f}, best {best_val_loss:.3f}, {human_number(tok_s)} tok/s, '
                            f'{duration(minutes_left)} left', refresh=False)
    bar.update(min(100, 100 * done) - bar.n)


def progress(items, total, what, show=True):
    """Return `items` to loop over, with a bar that counts them and shows the time left."""
    return _bar(items, show, total=total, desc=what)
