"""From an address to a file: whole or not at all, bounded in size and time, and never over a file of somebody else."""
import hashlib
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException

from configurator import UserError
from lib.machine.files import atomic_write

WAIT = 1.0  # seconds before the second attempt to download; doubled before the third
CHUNK = 1 << 20  # bytes
SLOWEST = 1000  # bytes per second; a slower download is given up after the first minute
HUB_MIRROR = 'set HF_ENDPOINT to a mirror of the hub (in China https://hf-mirror.com)'
RESERVE = 1 << 28  # bytes that a download leaves free on the disk


def own_file(folder, url):
    """Return the path of the download of `url` in `folder`: each address has its own, in a name that nobody types."""
    return folder / f'input-{hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]}.download'


def ascii_url(url):
    """Return `url` with other characters than ASCII as HTTP wants them: http://host/水浒.txt is an ordinary address."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc
    if not host.isascii():
        host = host.encode('idna').decode()
    quoted = [urllib.parse.quote(part, safe="%/:=&?~#+!$,;'@()*[]") for part in (parts.path, parts.query)]
    return urllib.parse.urlunsplit((parts.scheme, host, *quoted, ''))


def download(url, path, tries=3):
    """Download `url` to `path` in at most `tries` attempts and return `path`.

    UserError if it fails; `path` is then unchanged, and no other file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for wait in (WAIT, 2 * WAIT, 0)[-tries:]:
        try:
            with atomic_write(path) as temporary:
                _fetch(ascii_url(url), temporary)
            return path
        except urllib.error.HTTPError as error:
            reason = f'{error.code} {error.reason}'
            if error.code < 500:  # 404 and similar errors will not change
                break
        except (OSError, HTTPException) as error:
            cause = getattr(error, 'reason', error)  # of a URLError
            reason = getattr(cause, 'strerror', None) or str(cause)
        except ValueError as error:  # not an address
            reason = str(error)
            break
        time.sleep(wait)
    raise UserError(f'download failed: {reason} from {url}; put the text at {path.parent / "input.txt"}, or pass '
                    'a copy with --input=PATH; python data/python_char/prepare.py needs no download')


def _fetch(url, path):
    """Write what `url` returns to `path`. OSError, HTTPException or ValueError if it is incomplete or too large."""
    request = urllib.request.Request(url, headers={'User-Agent': 'minuteGPT'})
    began, size = time.monotonic(), 0
    with urllib.request.urlopen(request, timeout=30) as reply, open(path, 'wb') as file:
        length = reply.headers.get('Content-Length') or ''
        expected = int(length) if length.isdecimal() and len(length) < 20 else None
        room = shutil.disk_usage(path.parent).free - RESERVE
        if (expected or 0) > room:
            raise ValueError(f'{expected:,} bytes, and only {max(0, room):,} may be written to {path.parent}')
        while data := reply.read1(CHUNK):
            if not size and data.lstrip()[:15].lower().startswith((b'<!doctype html', b'<html')):
                raise HTTPException('a web page instead of the text')
            size += file.write(data)
            seconds = time.monotonic() - began
            if size > room:
                raise ValueError(f'more than the {room:,} bytes that may be written to {path.parent}')
            if seconds > 60 and size < SLOWEST * seconds:
                raise HTTPException(f'only {size:,} bytes in {seconds:.0f} seconds')
    if not size or expected not in (None, size):
        raise HTTPException(f'{size:,} of {size if expected is None else expected:,} bytes')
