"""See what a model thinks: a page in the browser with its next tokens, its surprise, its attention and its curves.

    python play.py --out_dir=out-shakespeare-char                 prints an address on this machine, and opens it
    python play.py --out_dir=out-shakespeare-char,out-mybook      two models, whose surprise can be compared
    python play.py --init_from=gpt2                               OpenAI's GPT-2
    %run play.py --out_dir=out-shakespeare-char                   in a notebook's cell, the page below it

Only this machine can reach the page. With --host=0.0.0.0 others can, by an address that holds a secret token; there
is no encryption, so let it be a network that you trust. Ctrl-C ends it.
"""
import os
import secrets
import sys
import threading
import webbrowser
from pathlib import Path

from configurator import UserError, configure
from lib.machine import runtime
from lib.play.models import Models
from lib.play.server import Server, Site, is_loopback
from lib.training import log

# models
out_dir = 'out'  # folders of training runs, separated by commas, relative to the working directory
init_from = 'resume'  # resume (OUT_DIR/ckpt.pt) | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a folder with GPT-2 weights

# page
host = '127.0.0.1'  # the address to listen at; 0.0.0.0 lets other machines in, who need the token in the address
port = 8765  # of the address; the next one that is free unless given
open = True  # open the page in the browser

# machine
device = 'auto'  # cpu | cuda | cuda:1 | mps; the best there is unless given
dtype = 'auto'  # of weights and arithmetic: float32 | bfloat16 | float16; what the device does fast unless given


def folders(settings):
    """Return the run folders that are meant: none where only GPT-2 is asked for."""
    if settings['init_from'] != 'resume' and not settings.given('out_dir'):
        return []
    return [name.strip() for name in settings['out_dir'].split(',') if name.strip()]


def check(s):
    """Return what is wrong with the Settings `s`, a line each."""
    rules = {
        'port': (0 <= s['port'] < 2**16, '0 (any) to 65535'),
        'dtype': (s['dtype'] in ('auto', *runtime.DTYPES), f'one of {", ".join(runtime.DTYPES)}'),
        'out_dir': (s['init_from'] != 'resume' or folders(s), 'at least one folder'),
    }
    found = [f'{name} must be {wanted}, got {s[name]!r}' for name, (fine, wanted) in rules.items() if not fine]
    for name in folders(s):
        if not any((Path(name) / file).is_file() for file in ('ckpt.pt', 'log.jsonl')):
            found.append(f'out_dir={name}: neither ckpt.pt nor log.jsonl is in it; train a model first, or name its '
                         'folder')
    problem = runtime.device_problem(s['device'])
    return found + [problem] * bool(problem)


def load(settings, rt):
    """Return the Models, opened; UserError where one is unusable. A run that has just begun may have none yet."""
    pretrained = '' if init_from == 'resume' else init_from
    models = Models(folders(settings), pretrained, rt)
    for name in models.names:
        if name == pretrained or (Path(name) / 'ckpt.pt').is_file():
            models.get(name)
        else:
            print(f'{name} has no checkpoint yet; the page shows its curves, and the model when it is there')
    return models


def listen(site, given):
    """Return the Server at `port`, or at the next free one unless the port was given."""
    for number in range(port, port + 1 if given or not port else min(port + 20, 2**16)):
        try:
            return Server(site, number)
        except OSError as error:
            problem = error
    raise UserError(f'cannot listen at {host}:{port} ({problem.strerror}); give another --port or --host')


def address_of(site, server):
    """Return the address to open in a browser."""
    name = {'0.0.0.0': 'localhost', '::': 'localhost'}.get(host, f'[{host}]' if ':' in host else host)
    return f'http://{name}:{server.server_port}/' + (f'?token={site.token}' if site.token else '')


def show_inline(site, server):
    """Show the page below a notebook's cell."""
    if site.proxied:
        from google.colab import output
        output.serve_kernel_port_as_iframe(server.server_port, path=f'/?token={site.token}', height='900')
    else:
        from IPython.display import IFrame, display
        display(IFrame(address_of(site, server), width='100%', height=900))


def can_open():
    """True where a browser with windows can be expected; elsewhere Python may start one in this terminal."""
    return sys.platform in ('win32', 'darwin') or bool(os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY'))


def main(argv=None):
    settings = configure(globals(), argv, early={'device': runtime.pick_device}, check=check)
    for name, value in (('seed', 0), ('compile', False)):  # not settings here: the page has its own seed
        settings.setdefault(name, value)
        settings.origins.setdefault(name, 'default')
    rt = runtime.start(settings)
    notebook, colab = log.in_notebook(), 'google.colab' in sys.modules
    secret = secrets.token_urlsafe(16) if not is_loopback(host) or colab else ''
    site = Site(load(settings, rt), host, secret, framed=notebook, proxied=notebook and colab)
    server = listen(site, settings.given('port'))
    print(f'device: {rt.why}')
    if notebook:  # the cell ends, the page stays as long as the kernel
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f'open {address_of(site, server)}')
        return show_inline(site, server)
    try:
        serve(site, server)
    except KeyboardInterrupt:
        print('ended')
    finally:
        server.server_close()


def serve(site, server):
    """Print the address, open it in the browser, and serve until Ctrl-C."""
    print(f'open {address_of(site, server)}', flush=True)
    if 'COLAB_RELEASE_TAG' in os.environ:
        print('in a notebook use %run play.py ... instead of !python play.py ..., which shows the page below the cell')
    elif os.environ.get('SSH_CONNECTION'):
        print(f'from your own computer: ssh -L {server.server_port}:localhost:{server.server_port} this machine, '
              'then open it there')
    print('Ctrl-C ends it', flush=True)
    if open and can_open():
        threading.Timer(0.3, webbrowser.open, [address_of(site, server)]).start()
    server.serve_forever()


if __name__ == '__main__':
    main()
