"""One thread that computes: requests queue, and what nobody waits for any more is left."""
import queue
import threading

from configurator import UserError

MOST_WAITING = 32  # requests


class Busy(Exception):
    """Too many requests are waiting."""


class Job:
    """A request's results as they come; `cancel` it when its reader has gone."""

    def __init__(self, work):
        self.work, self.results, self.cancelled = work, queue.Queue(maxsize=64), threading.Event()

    def cancel(self):
        self.cancelled.set()

    def _put(self, item):
        while not self.cancelled.is_set():
            try:
                return self.results.put(item, timeout=0.2)
            except queue.Full:  # a reader that is slow, or has gone without a word
                continue

    def run(self):
        """Compute in the worker's thread: results are put as ('item', value), then ('end', None) or ('error', line)."""
        end = 'end', None
        items = None
        try:
            if not self.cancelled.is_set():
                items = self.work()
                for item in items:
                    self._put(('item', item))
                    if self.cancelled.is_set():
                        break
        except UserError as error:
            end = 'error', error.message
        except Exception as error:  # a bug: the page must not wait for ever, and the traceback goes to the terminal
            end = 'error', f'{type(error).__name__}: {str(error)[:300]}'
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))
        finally:
            if hasattr(items, 'close'):
                items.close()
        self._put(end)


class Worker:
    """Runs jobs one after another, first come, first served."""

    def __init__(self):
        self.waiting = queue.Queue(maxsize=MOST_WAITING)
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self):
        while True:
            self.waiting.get().run()

    def submit(self, work):
        """Queue `work`, a function that returns an iterable of results; returns its Job. Busy where too many wait."""
        job = Job(work)
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            raise Busy from None
        return job
