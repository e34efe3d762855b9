"""Signals that end a program or ask it to save, and the loss of its terminal or of torchrun, which count as signals."""
import contextlib
import os
import signal

from lib.machine import console


class Signals:
    """Remembers the most urgent signal that arrived; training asks at each step.

    As a context manager it catches USR1 from the start of the process, since the default action of USR1 is to kill.
    Within `held()` it also catches all signals that end a program; before that there is nothing to save, so they end
    it at once. Signals that were ignored at the start (nohup, a background job) stay ignored.
    """
    # A level is a place in this list, from 1; ranks agree on the highest level that any of them received. The first is
    # a request to save and continue, the others end the run. Senders: PIPE none, stdout is lost; HUP a closed terminal;
    # QUIT Ctrl-\; BREAK Ctrl-Break on Windows; ALRM `perl -e 'alarm ...'`; USR2 and XCPU a scheduler's time limit.
    NAMES = ('SIGUSR1', 'SIGPIPE', 'SIGINT', 'SIGHUP', 'SIGQUIT', 'SIGBREAK', 'SIGALRM', 'SIGUSR2', 'SIGXCPU',
             'SIGTERM')
    NUMBERS = {'SIGPIPE': 13, 'SIGHUP': 1}  # where the platform lacks them

    def __init__(self):
        self._level, self._before = 0, {}
        # torchrun starts each rank in a new session, so nothing else ends them if torchrun is killed
        self._parent = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ and os.name == 'posix' else None

    def __enter__(self):
        self._catch(('SIGUSR1',))
        return self

    def __exit__(self, *_):
        self._restore()

    @contextlib.contextmanager
    def held(self):
        """Catch the signals that end a program until the block ends."""
        self._catch(name for name in self.NAMES if name not in ('SIGUSR1', 'SIGPIPE'))  # Python ignores SIGPIPE
        try:
            yield self
        finally:
            self._restore(keep='SIGUSR1')

    @property
    def level(self):
        """The level of the most urgent signal since it was set to 0; 0 if there was none."""
        if (lost := console.end_signal()) is not None:
            self._note(lost)
        if self._parent is not None and os.getppid() != self._parent:  # torchrun was killed
            self._note(signal.SIGTERM)
        return self._level

    @level.setter
    def level(self, level):
        self._level = level

    def name(self, level):
        """Return the name of a level, as in 'SIGTERM'."""
        return self.NAMES[int(level) - 1]

    def number(self, level):
        """Return a level's signal number; shells expect 128 + this number as the exit status."""
        name = self.name(level)
        return int(getattr(signal, name, self.NUMBERS.get(name, 0)))

    def _catch(self, names):
        for name in names:
            number = getattr(signal, name, None)
            if number is None or signal.getsignal(number) in (signal.SIG_IGN, None):
                continue
            with contextlib.suppress(ValueError, OSError):  # signals are caught in the main thread only
                self._before[name] = signal.signal(number, self._note)

    def _restore(self, keep=''):
        for name in [name for name in self._before if name != keep]:
            signal.signal(getattr(signal, name), self._before.pop(name))

    def _note(self, number, frame=None):
        name = next(n for n in self.NAMES if getattr(signal, n, self.NUMBERS.get(n)) == number)
        self._level = max(self._level, self.NAMES.index(name) + 1)
        if name in ('SIGINT', 'SIGQUIT') and frame is not None:  # from the keyboard
            for key in ('SIGINT', 'SIGQUIT'):
                if key in self._before:
                    signal.signal(getattr(signal, key), signal.SIG_DFL)
            with contextlib.suppress(OSError):  # print() in a handler may interrupt print()
                os.write(2, b'\nfinishing this step and saving; press Ctrl-C again to quit without saving\n')
