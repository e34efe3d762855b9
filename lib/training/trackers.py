"""wandb and TensorBoard, if the settings ask for them. A failure of either is one warning; training continues."""
import html
from pathlib import Path

from lib.machine import console
from lib.machine.console import reason
from lib.training.log import warn

# wandb's limits for asking for a key, connecting, and sending the rest, in seconds; some have none by default
WANDB_TIMEOUTS = {'login_timeout': 30, 'init_timeout': 30, 'finish_timeout': 60}


def open_trackers(settings, out_dir, wandb_id='', step=0, enabled=True):
    """Return (track, finish, wandb's run id) for the services that the settings ask for; for none if not enabled.

    track(record, step) sends numbers, texts and pictures (a Path); finish() waits until all have been sent. wandb_id:
    the wandb run to continue. step: where training continues. A service that fails is dropped with one warning.
    """
    openers = {'wandb': lambda: open_wandb(settings, out_dir, wandb_id),
               'tensorboard': lambda: open_tensorboard(out_dir, step)}
    services = {}

    def attempt(name, call, *arguments):
        try:
            return call(*arguments)
        except (Exception, SystemExit) as error:
            services.pop(name, None)
            install = f'; pip install {name}' if isinstance(error, ImportError) else ''
            hint = install + '; in China SwanLab can replace it, see README.zh.md' * (name == 'wandb')
            warn(f'{name} is off and training continues without it; log.jsonl has the numbers ({reason(error)}){hint}')

    for name, opener in openers.items():
        if enabled and settings[f'{name}_log'] and (opened := attempt(name, opener)):
            services[name] = opened
            wandb_id = opened[2] or wandb_id

    def track(record, step):
        known = {key: value for key, value in record.items() if value is not None}
        for name in list(services):
            attempt(name, services[name][0], known, step)

    def finish():
        for name in list(services):
            attempt(name, services[name][1])

    return track, finish, wandb_id


def open_wandb(settings, out_dir, run_id):
    """Return (log, close, run id)."""
    import wandb
    known = getattr(wandb.Settings, 'model_fields', ())
    timeouts = {name: seconds for name, seconds in WANDB_TIMEOUTS.items() if name in known}
    with console.as_is():
        run = wandb.init(project=settings['wandb_project'], name=settings['wandb_run_name'], config=dict(settings),
                         dir=str(out_dir), id=run_id or None, resume='allow' if run_id else None,
                         allow_val_change=True, settings=wandb.Settings(**timeouts))

    def as_media(value):
        if isinstance(value, str):
            return wandb.Html(f'<pre>{html.escape(value)}</pre>')
        return wandb.Image(str(value)) if isinstance(value, Path) else value

    def log(record, step):
        run.log({name: as_media(value) for name, value in record.items()}, step=step)

    def finish():
        with console.as_is():
            run.finish()

    return log, finish, run.id


def open_tensorboard(out_dir, step):
    """Return (log, close, ''). Entries from `step` on are hidden, since a resumed run logs them again."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(Path(out_dir) / 'tensorboard'), purge_step=step)

    def log(record, step):
        for name, value in record.items():
            if isinstance(value, str):
                writer.add_text(name, f'<pre>{html.escape(value)}</pre>', step)
            elif isinstance(value, Path):
                from matplotlib.image import imread
                writer.add_image(name, imread(value), step, dataformats='HWC')
            else:
                writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close, ''
