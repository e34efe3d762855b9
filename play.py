"""See what a model thinks: a page in the browser that shows its next tokens, surprise, attention and loss curves.

    python play.py --out_dir=out-shakespeare-char                 print the address of the page and open it
    python play.py --out_dir=out-shakespeare-char,out-mybook      two models, to compare their surprise
    python play.py --init_from=gpt2                               OpenAI's GPT-2
    %run play.py --out_dir=out-shakespeare-char                   in a notebook: show the page below the cell

Only this machine can reach the page. With --host=0.0.0.0 other machines can, if they have the token in the printed
address. The connection is not encrypted, so use that on a network you trust. Ctrl-C stops the server.
"""
import os
import secrets
import socket
import sys
import threading
import webbrowser
from pathlib import Path

from configurator import Origin, UserError, configure
from lib.machine import device as devices
from lib.machine import runtime
from lib.play.models import Models
from lib.play.server import Server, Site, is_loopback
from lib.training import log

# models
out_dir = 'out'  # folders of training runs, separated by commas, relative to the working directory
init_from = 'resume'  # resume (OUT_DIR/ckpt.pt) | gpt2 ... gpt2-xl | a run's folder or one with GPT-2 weights

# page
host = '127.0.0.1'  # address to listen on; 0.0.0.0 admits other machines, which then need the printed token
port = 8765  # 0 any; unless given, the next free port from this one on
open = True  # open the page in the browser

# machine
device = 'auto'  # cpu | cuda | cuda:1 | mps; the best available unless given
dtype = 'auto'  # of weights and arithmetic: float32 | bfloat16 | float16; what the device does fast unless given


def folders(settings):
    """Return the run folders to show: none if only init_from is given."""
    if settings['init_from'] != 'resume' and not settings.was_set('out_dir'):
        return []
    return [name.strip() for name in settings['out_dir'].split(',') if name.strip()]


def check(s):
    """Return a list of errors in the Settings `s`."""
    valid = {
        'port': (0 <= s['port'] < 2**16, '0 (any) to 65535'),
        'dtype': (s['dtype'] in ('auto', *devices.DTYPES), f'one of {", ".join(devices.DTYPES)}'),
        'out_dir': (s['init_from'] != 'resume' or folders(s), 'at least one folder'),
    }
    errors = [f'{name} must be {wanted}, got {s[name]!r}' for name, (fine, wanted) in valid.items() if not fine]
    for name in folders(s):
        if not any((Path(name) / file).is_file() for file in ('ckpt.pt', 'log.jsonl')):
            errors.append(f'out_dir={name}: no ckpt.pt and no log.jsonl there; train a model first, or name its folder')
    if problem := devices.device_problem(s['device']):
        errors.append(problem)
    return errors


def load(settings, rt):
    """Return the opened Models. UserError if one is unusable; a run that has just begun may have no checkpoint yet."""
    pretrained = '' if init_from == 'resume' else init_from
    models = Models(folders(settings), pretrained, rt)
    for name in models.names:
        if name == pretrained or (Path(name) / 'ckpt.pt').is_file():
            models.get(name)
        else:
            print(f'{name} has no checkpoint yet; the page shows its curves now and the model later')
    return models


def listen(site, given):
    """Return the Server on `port`, or on the next free port unless it was given."""
    for number in range(port, port + 1 if given or not port else min(port + 20, 2**16)):
        try:
            return Server(site, number)
        except OSError as error:
            problem = error
    raise UserError(f'cannot listen on {host}:{port} ({problem.strerror}); give another --port or --host')


def address_of(site, server):
    """Return the address to open in a browser."""
    name = {'0.0.0.0': 'localhost', '::': 'localhost'}.get(host, f'[{host}]' if ':' in host else host)
    return url(name, site, server)


def address_elsewhere(site, server):
    """Return the address to open on another machine, '' if `host` is not one that stands for all networks."""
    outside = {'0.0.0.0': '192.0.2.1', '::': '2001:db8::1'}.get(host)  # addresses that nobody has
    if not outside:
        return ''
    try:
        with socket.socket(server.address_family, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 9))  # sends nothing: it only chooses the interface
            name = probe.getsockname()[0]
    except OSError:  # no network
        name = socket.gethostname()
    return url(f'[{name}]' if ':' in name else name, site, server)


def url(name, site, server):
    """Return the page's address on the host `name`, with the token if there is one."""
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
    """True if a graphical browser is likely; webbrowser may otherwise start a text browser in this terminal."""
    return sys.platform in ('win32', 'darwin') or bool(os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY'))


def main(argv=None):
    settings = configure(globals(), argv, early={'device': devices.pick_device}, check=check)
    for name, value in (('seed', 0), ('compile', False)):  # what runtime.start asks for; the page has its own seed
        settings.setdefault(name, value)
        settings.origins.setdefault(name, Origin())
    rt = runtime.start(settings)
    notebook, colab = log.in_notebook(), 'google.colab' in sys.modules
    secret = secrets.token_urlsafe(16) if not is_loopback(host) or colab else ''
    site = Site(load(settings, rt), host, secret, framed=notebook, proxied=notebook and colab)
    server = listen(site, settings.was_set('port'))
    print(f'device: {rt.description}')
    if notebook:  # the cell ends, and the page works while the kernel does
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f'open {address_of(site, server)}')
        return show_inline(site, server)
    try:
        serve(site, server)
    except KeyboardInterrupt:
        print('stopped')
    finally:
        server.server_close()


def serve(site, server):
    """Print the address, open it in the browser, and serve until Ctrl-C."""
    print(f'open {address_of(site, server)}', flush=True)
    if address := address_elsewhere(site, server):
        print(f'on another computer: {address}', flush=True)
    if 'COLAB_RELEASE_TAG' in os.environ:
        print('in a notebook, %run play.py ... shows the page below the cell; !python play.py ... cannot')
    elif os.environ.get('SSH_CONNECTION'):
        print(f'from your own computer: ssh -L {server.server_port}:localhost:{server.server_port} THIS_MACHINE, '
              'then open the address there')
    print('Ctrl-C stops it', flush=True)
    if open and can_open():
        threading.Timer(0.3, webbrowser.open, [address_of(site, server)]).start()
    server.serve_forever()


if __name__ == '__main__':
    main()
