"""What a run tells: printed lines, log.jsonl, a progress bar, and wandb or TensorBoard where asked for."""
import json
import math
import sys
from pathlib import Path


def say(line, bar=None):
    """Print a line to stdout, above the progress bar where there is one."""
    if bar is not None and not bar.disable:
        bar.clear()
    print(line, flush=True)


def warn(line):
    """Print a warning to stderr."""
    print(f'warning: {line}', file=sys.stderr, flush=True)


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
    """Return an update's line from its log record."""
    return (f'iter {record["iter"]}: loss {record["loss"]:.4f}, time {seconds * 1000:.2f}ms, '
            f'mfu {record["mfu"] * 100:.2f}%, tok/s {record["tok_s"]:,.0f}, eta {duration(minutes_left)}')


def advance(bar, done, loss, best_val_loss, tok_s, minutes_left):
    """Move the progress bar to `done` (0 to 1)."""
    bar.n = min(100, 100 * done)
    bar.set_postfix_str(f'loss {loss:.4f}, best val {best_val_loss:.4f}, {tok_s:,.0f} tok/s, '
                        f'{duration(minutes_left)} left')


def not_finite(rt, iter_num, loss, norm, good_iter, out_dir):
    """Return what to tell when a loss or gradient is not finite, naming the ranks whose loss it was."""
    ranks = [r for r in range(rt.world_size) if rt.total(float(r == rt.rank and not math.isfinite(loss)))[0]]
    where = f' on rank {", ".join(map(str, ranks))}' if rt.world_size > 1 and ranks else ''
    what = f'loss is {loss}' if not math.isfinite(loss) else f'gradient norm is {norm}'
    return (f'{what} at iter {iter_num}{where}; the update was not applied, last good checkpoint in {out_dir}: '
            f'iter {good_iter}. Try a lower learning_rate, or dtype=bfloat16 or float32 where it was float16')


def append_log(path, record):
    """Append one record to log.jsonl; numbers that JSON has no word for become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(clean) + '\n')


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
    kept = [r for r in read_log(path) if r.get('iter', -1) < iter_num and r.get('step', -1) <= evaluated]
    tmp = Path(path).with_name(f'{Path(path).name}.tmp.{id(kept)}')
    tmp.write_text(''.join(json.dumps(r) + '\n' for r in kept), encoding='utf-8')
    tmp.replace(path)


def progress_bar(total, show=True):
    """Return a tqdm bar on stderr, shown on a terminal only."""
    from tqdm import tqdm
    return tqdm(total=total, disable=None if show else True, dynamic_ncols=True, leave=False, file=sys.stderr,
                bar_format='{percentage:3.0f}%|{bar}| {postfix}')


def open_trackers(settings, out_dir, wandb_id=''):
    """Return (track, wandb run id): track(record, step) sends to the services that the settings ask for.

    wandb_id continues that run. A service that fails is dropped with one warning; it can never end the training.
    """
    sinks = {}
    if settings['wandb_log']:
        sinks['wandb'] = lambda: _open_wandb(settings, out_dir, wandb_id)
    if settings['tensorboard_log']:
        sinks['tensorboard'] = lambda: _open_tensorboard(out_dir)
    live, run_id = {}, wandb_id
    for name, opener in sinks.items():
        try:
            live[name], run_id = opener() if name == 'wandb' else (opener(), run_id)
        except (Exception, SystemExit) as error:
            warn(f'{name} is off, training goes on without it ({type(error).__name__}: {str(error).strip()[:200]})')

    def track(record, step):
        for name in list(live):
            try:
                live[name](record, step)
            except Exception as error:
                del live[name]
                warn(f'{name} stopped working and is off now ({type(error).__name__}: {str(error).strip()[:200]})')

    return track, run_id


def _open_wandb(settings, out_dir, run_id):
    import wandb
    run = wandb.init(project=settings['wandb_project'], name=settings['wandb_run_name'], config=dict(settings),
                     dir=str(out_dir), id=run_id or None, resume='allow' if run_id else None)
    return (lambda record, step: run.log(record, step=step)), run.id


def _open_tensorboard(out_dir):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(out_dir))

    def log(record, step):
        for name, value in record.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, step)
        writer.flush()

    return log
