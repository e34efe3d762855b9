"""Which lines of one file are executed? Imports little: processes that a test starts run it first."""
import os
import sys
import threading

seen = set()  # lines already written


def trace(path, log):
    """Append the number of each line of the file `path` to the file `log` when it is first executed.

    Works in this process and in those forked from it; clear `seen` to hear of all lines again.
    """
    fd, ours, write = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), {}, os.write  # a test may break os.write

    def line(frame, event, arg):
        if event == 'line' and frame.f_lineno not in seen:
            seen.add(frame.f_lineno)
            write(fd, b'%d\n' % frame.f_lineno)
        return line

    def call(frame, event, arg):
        name = frame.f_code.co_filename
        if name not in ours:
            ours[name] = os.path.abspath(name) == path
        return line if ours[name] else None
    sys.settrace(call)
    threading.settrace(call)
