"""One thread that computes: requests wait in a queue, and cancelled ones stop."""
import queue
import threading

from configurator import UserError

MOST_WAITING = 32  # requests in the queue, at most


class Busy(Exception):
    """The queue is full."""


class Job:
    """A request and the queue of its results; call `cancel` when the client has disconnected."""

    def __init__(self, work):
        self.work, self.results, self.cancelled = work, queue.Queue(maxsize=64), threading.Event()

    def cancel(self):
        self.cancelled.set()

    def _put(self, item):
        while not self.cancelled.is_set():
            try:
                return self.results.put(item, timeout=0.2)
            except queue.Full:  # a slow client, or one whose disconnection is not known yet
                continue

    def run(self):
        """Compute, in the worker thread: put ('item', value) for each result, then ('end', None) or ('error', line)."""
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
        except BaseException as error:  # a bug: report it and print the traceback; Rust's panics are no Exception
            end = 'error', f'{type(error).__name__}: {str(error)[:300]}'
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))
        finally:
            if hasattr(items, 'close'):
                items.close()
        self._put(end)


class Worker:
    """Runs jobs one at a time, in the order in which they were submitted."""

    def __init__(self):
        self.waiting = queue.Queue(maxsize=MOST_WAITING)
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self):
        while True:
            self.waiting.get().run()

    def submit(self, work):
        """Queue `work`, a function that returns an iterable of results; return its Job. Busy if the queue is full."""
        job = Job(work)
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            raise Busy from None
        return job
