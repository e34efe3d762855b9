"""pytest plugins of benchmarks/mutants.py: which lines does each test execute, and which tests notice a mutant."""
import gc
import inspect
import json
import os
import signal
import sys
from multiprocessing import forkserver
from types import FunctionType

import pytest

from benchmarks.lines import seen, trace


def cpu_seconds():
    """Return the CPU time of this process, of its children that have ended, and of the ranks that tests start."""
    seconds, ranks = sum(os.times()[:4]), forkserver._forkserver._forkserver_pid
    if ranks:  # the server that forks them is still running
        with open(f'/proc/{ranks}/stat', encoding='utf-8') as stat:
            ticks = stat.read().rsplit(')', 1)[1].split()[11:15]
        seconds += sum(map(int, ticks)) / os.sysconf('SC_CLK_TCK')
    return seconds


class Recorder:
    """Writes {'tests': {id: [seconds, lines of the file `path`]}, 'modules': imported modules} to the file `out`.

    The lines of a fixture count for every test that uses it, also where it ran once for several.
    """

    def __init__(self, path, log, out):
        self.path, self.log, self.out = path, log, out
        self.of_test, self.of_fixture, self.tests = set(), {}, {}

    def pytest_sessionstart(self):
        trace(str(self.path), self.log)

    def take(self):
        """Return the lines executed since the last call."""
        with open(self.log, 'r+', encoding='ascii') as log:
            lines = {int(n) for n in log.read().split()}
            log.truncate(0)
        seen.clear()
        return lines

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        self.of_test |= self.take()
        result = yield
        lines = self.take()
        self.of_test |= lines
        self.of_fixture.setdefault(fixturedef.argname, set()).update(lines)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.of_test, began = set(), cpu_seconds()
        self.take()
        result = yield
        self.tests[item.nodeid] = cpu_seconds() - began, self.of_test | self.take(), item.fixturenames
        return result

    def pytest_sessionfinish(self):
        tests = {id: [seconds, sorted(lines.union(*(self.of_fixture.get(f, ()) for f in fixtures)))]
                 for id, (seconds, lines, fixtures) in self.tests.items()}
        with open(self.out, 'w', encoding='utf-8') as out:
            json.dump({'tests': tests, 'modules': list(sys.modules)}, out)


class Judge:
    """Runs the tests of each mutant in a fork of this process, which has collected all tests and run none.

    jobs: [(number, source of the file `path`, {id: seconds} of its tests in order), ...]. Appends lines
    `number verdict` to the file `out`: the test that failed, `passed`, `late` or `unapplied`.
    """

    def __init__(self, path, jobs, out):
        self.path, self.jobs, self.out = path, jobs, out
        self.noticed = out.with_suffix('.noticed')

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        if call.excinfo and not isinstance(call.excinfo.value, pytest.skip.Exception):
            self.noticed.write_text(item.nodeid, encoding='utf-8')
            os._exit(1)  # without a report, which would take longer than most tests

    def pytest_runtestloop(self, session):
        items, best, path = {item.nodeid: item for item in session.items}, [], str(self.path)
        functions = [f for f in gc.get_objects() if type(f) is FunctionType and f.__code__.co_filename == path]
        gc.freeze()  # a fork's garbage collection need not visit, and so copy, all that is imported
        for number, source, tests in self.jobs:
            first = [id for id in best if id in tests]  # those that noticed the last mutants
            order = [*first, *(id for id in tests if id not in best)]
            verdict = self.judge(source, functions, [(items[id], tests[id]) for id in order])
            if '::' in verdict:
                best = [verdict, *(id for id in best[:20] if id != verdict)]
            with self.out.open('a', encoding='utf-8') as out:
                out.write(f'{number} {verdict}\n')
        return True

    def judge(self, source, functions, tests):
        """Return the verdict on one mutant."""
        original, before = self.path.read_bytes(), self.path.stat()
        self.path.write_text(source, encoding='utf-8')  # for processes that tests start, and for scripts
        pid = os.fork()
        if not pid:
            try:
                os.setsid()
                if not apply(str(self.path), source, functions):
                    os._exit(2)
                for (item, seconds), after in zip(tests, [*tests[1:], (None, 0)]):
                    signal.setitimer(signal.ITIMER_PROF, 5 + 5 * seconds)  # of this process's CPU time
                    signal.setitimer(signal.ITIMER_REAL, 120 + 10 * seconds)  # it may wait for another process
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=after[0])
                os._exit(0)
            finally:
                self.noticed.write_text('import::', encoding='utf-8')
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            os.killpg(pid, signal.SIGKILL)  # what its tests have started
        except ProcessLookupError:
            pass
        self.path.write_bytes(original)
        os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))  # or its byte code is out of date
        return {0: 'passed', 1: '', 2: 'unapplied'}.get(status, 'late') or self.noticed.read_text(encoding='utf-8')


def apply(path, source, functions):
    """Change the functions and the module that were imported from `path` to those of `source`; return if any differs.

    A constant that other modules have imported is changed there, too.
    """
    code = compile(source, path, 'exec', dont_inherit=True)
    codes, changed = dict(inner_codes(code)), False
    for f in functions:
        old, new = f.__code__, codes[f.__code__.co_qualname, f.__code__.co_firstlineno]
        changed |= old != new
        f.__code__ = new
    module = next((m for m in list(sys.modules.values()) if getattr(m, '__file__', None) == path), None)
    if changed or module is None:
        return True
    fresh = {'__name__': module.__name__, '__file__': path}
    exec(code, fresh)
    for name, new in fresh.items():
        old = getattr(module, name)
        if getattr(new, '__module__', None) == module.__name__:
            changed |= apply_defaults(old, new)
        elif type(new) is type(old) and not inspect.ismodule(new) and contents(new) != contents(old):
            changed = True
            for other in list(sys.modules.values()):
                if getattr(other, '__dict__', {}).get(name) is old:
                    setattr(other, name, new)
    return changed


def contents(value):
    """Return what tells two constants apart: all bytes of an array, whose repr leaves out most of them."""
    return value.tobytes() if hasattr(value, 'tobytes') else repr(value)


def apply_defaults(old, new):
    """Give a function, or the methods and attributes of a class, those of another; return if one differs."""
    old, new = inspect.unwrap(old), inspect.unwrap(new)
    changed = False
    if isinstance(new, type):
        for name, value in vars(new).items():
            if callable(value) or isinstance(value, (staticmethod, property)):
                changed |= apply_defaults(vars(old)[name], value)
            elif type(value) in (int, float, bool, str, tuple, list, dict) and value != vars(old)[name]:
                setattr(old, name, value)
                changed = True
    elif isinstance(new, FunctionType):
        changed = (old.__defaults__, old.__kwdefaults__) != (new.__defaults__, new.__kwdefaults__)
        old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    return changed


def inner_codes(code):
    """Yield ((qualified name, line), code) of the functions in a code object."""
    for inner in code.co_consts:
        if inspect.iscode(inner):
            yield (inner.co_qualname, inner.co_firstlineno), inner
            yield from inner_codes(inner)
