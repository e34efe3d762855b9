"""stdout and stderr: their loss never raises an error, and printed text cannot control the terminal.

Imports no torch, so that the prepare scripts can use it.
"""
import contextlib
import errno
import io
import os
import re
import select
import signal
import sys

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk or a limit: later lines may be written again
_lost = {}  # {1 or 2: OSError} of each stream that is gone for good


def printable(text):
    """Return `text` with control characters other than newline and tab as escapes such as \\x1b.

    A terminal obeys control characters: they move the cursor, change the title, or hide text. Included are those of
    eight bits, and the marks that change the direction of text. A carriage return before a newline is harmless.
    """
    return re.sub('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]|\r(?!\n)',
                  lambda found: found.group().encode('unicode_escape').decode(), text)


class _Output(io.RawIOBase):
    """Bytes to stdout or stderr. Writing never raises OSError: what cannot be written is dropped and noted."""

    def __init__(self, stream, number):
        buffer = stream.buffer
        self.stream, self.raw, self.number = stream, getattr(buffer, 'raw', buffer), number  # the stream stays open
        self.warned = False

    def writable(self):
        return True

    def fileno(self):
        return self.raw.fileno()

    def isatty(self):
        return self.raw.isatty()

    def write(self, data):
        rest = memoryview(data).cast('B')
        try:
            while rest:
                written = self.raw.write(rest)
                if written is None:  # another program made the terminal or pipe non-blocking, and it is full
                    if not select.select([], [self.raw], [], 10)[1]:
                        break
                    continue
                rest = rest[written:]
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._note(error)
        return len(data)

    def _note(self, error):
        number = getattr(error, 'errno', None)
        if number not in _FULL:
            _lost.setdefault(self.number, error)
        if self.number == 1 and number != errno.EPIPE and not self.warned:  # `| head` is no accident
            self.warned = True
            print(f'warning: could not write to stdout ({getattr(error, "strerror", None) or error}); '
                  'lines are missing there', file=sys.stderr)


class _Text(io.TextIOWrapper):
    """A stream that is protected. All text that is printed comes through here, whoever prints it."""
    as_is = False

    def write(self, text):
        bar = '\r' if text[:1] == '\r' else ''  # tqdm's bars return to the beginning of their line
        super().write(text if self.as_is else bar + printable(text[len(bar):]))
        return len(text)


@contextlib.contextmanager
def as_is():
    """Let control characters through while the block runs: a library that the user chose prints in colours."""
    _Text.as_is = True
    try:
        yield
    finally:
        _Text.as_is = False


def protect():
    """Replace sys.stdout and sys.stderr by streams in UTF-8 whose loss raises nothing; to be called once, at the start.

    PYTHONIOENCODING wins over UTF-8, which LC_ALL=C would not allow. Streams that Python itself has not made (a
    notebook's) are kept. Missing ones (`2>&-`, pythonw) become os.devnull, also for C code: otherwise the next file
    that is opened, a checkpoint perhaps, would get the number of stderr and the text that is written there.
    """
    _lost.clear()
    asked, _, handler = os.environ.get('PYTHONIOENCODING', '').partition(':')
    for number, name in ((0, 'stdin'), (1, 'stdout'), (2, 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, 'w' if number else 'r', encoding='utf-8'))
        elif number and type(stream) is io.TextIOWrapper:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            raw = _Output(stream, number)
            setattr(sys, name, _Text(raw if stream.write_through else io.BufferedWriter(raw),
                                     stream.encoding if asked else 'utf-8', handler or 'replace',
                                     line_buffering=stream.line_buffering, write_through=stream.write_through))
        elif number and hasattr(stream, 'reconfigure'):
            stream.reconfigure(encoding=None if asked else 'utf-8', errors=handler or 'replace')


def stdout_lost():
    """Return whether stdout is gone for good: its reader has ended, or its terminal was closed."""
    return 1 in _lost


def end_signal():
    """Return the signal that stands for the loss of stdout, or None while it is there or the user wants to go on.

    SIGPIPE: the reader (`| head`, `| tee`) has ended. SIGHUP: the terminal is gone. nohup ignores SIGHUP, and then
    the loss of output is no reason to end. A full disk is none either.
    """
    error = _lost.get(1)
    hangup = getattr(signal, 'SIGHUP', None)
    if error is None or (hangup is not None and signal.getsignal(hangup) == signal.SIG_IGN):
        return None
    if hangup is None or getattr(error, 'errno', None) == errno.EPIPE:
        return getattr(signal, 'SIGPIPE', 13)
    return hangup


def reason(error):
    """Return an exception in one line of at most 200 characters: its type and its message, or a UserError's message."""
    text = ' '.join(getattr(error, 'message', str(error)).split())
    if ' (Caused by ' in text:  # requests gives the host and the cause last
        text = text.rpartition(' (Caused by ')[2].removesuffix(')')
    text = text if len(text) <= 200 else f'{text[:200].rsplit(" ", 1)[0]} ...'
    is_users = isinstance(error, SystemExit) and hasattr(error, 'message')
    return text if is_users else f'{type(error).__name__}: {text}'


def counted(n, noun):
    """Return a number with its noun in the right form: 1 run, 1,200 runs."""
    return f'{n:,} {noun}' + 's' * (n != 1)


def print_exception(kind, error, trace):
    """Print an exception that nobody caught: one line if the machine caused it, a traceback if the program did.

    It is an excepthook; Python then ends with status 1, or with 130 after Ctrl-C, which shells expect.
    """
    if issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
    elif issubclass(kind, MemoryError) or kind.__name__ == 'OutOfMemoryError' or "can't allocate memory" in str(error):
        print(f'error: out of memory ({reason(error)})', file=sys.stderr)
    elif issubclass(kind, OSError) and error.filename is not None:
        print(f'error: {str(error.filename)[:200]}: {error.strerror}', file=sys.stderr)
    elif kind.__name__ == 'PanicException':  # of the Rust libraries tokenizers, tiktoken and safetensors
        print(f'error: {kind.__module__} ended with {reason(error)}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
