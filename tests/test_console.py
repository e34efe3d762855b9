"""lib/machine/console.py: stdout and stderr survive their loss, and nothing that is printed controls the terminal."""
import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import TINY
from kit import REPO, load

from lib.machine import console
from lib.machine.console import printable


@pytest.mark.parametrize('text, shown', [
    ('plain\ttext\n日本 é', 'plain\ttext\n日本 é'),
    ('\x1b[31mred', r'\x1b[31mred'), ('a\rb', r'a\rb'), ('a\r\n', 'a\r\n'), ('\x07', r'\x07'),
    ('\x9b2J', r'\x9b2J'), ('\x7f', r'\x7f'), ('\x00', r'\x00'), ('\u202egnp', r'\u202egnp'), ('', '')])
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown


# Faults: each child runs `print` and ends with the status of what was lost

CHILD = """
import sys
from lib.machine import console
console.protect()
for i in range(3):
    print('line', i, flush=True)
    print('note', i, file=sys.stderr)
lost = console.end_signal()
raise SystemExit(lost or 0)
"""


GONE = """
import select
reader = select.poll()
reader.register(1, 0)
reader.poll(50_000)  # until whoever reads stdout has ended
"""


def shell(command, code=CHILD, **options):
    """Run CHILD in bash as `command`, where PY stands for it; returns a CompletedProcess."""
    return subprocess.run(['bash', '-c', command.replace('PY', '"$0" -c "$1"'), sys.executable, code], text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(REPO)}, timeout=60, **options)


@pytest.mark.parametrize('redirect, status', [
    ('| true; exit ${PIPESTATUS[0]}', signal.SIGPIPE), ('> /dev/full', 0), ('>&-', 0), ('2>&-', 0),
    ('<&- >&- 2>&-', 0), ('2> /dev/full', 0), ('2>&1 | true; exit ${PIPESTATUS[0]}', signal.SIGPIPE)])
def test_the_loss_of_a_stream_raises_nothing(redirect, status):
    done = shell(f'PY {redirect}', GONE + CHILD if '| true' in redirect else CHILD)
    assert done.returncode == status and 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr


def test_a_reader_that_ends_is_no_warning():
    assert shell('PY | true', GONE + CHILD).stderr == 'note 0\nnote 1\nnote 2\n'


def test_lines_that_a_full_disk_swallows_are_reported_once():
    assert shell('PY > /dev/full').stderr.count('No space left on device') == 1


def test_unbuffered_output_is_whole():
    assert shell('PYTHONUNBUFFERED=1 PY | cat').stdout == 'line 0\nline 1\nline 2\n'


def test_no_file_gets_the_number_of_a_closed_stderr():
    code = CHILD.replace('for i', "print(open('/dev/null').fileno() > 2)\nfor i")
    assert shell('PY 2>&-', code).stdout.startswith('True')


def test_a_reader_that_is_slow_loses_nothing():
    code = "import os\nos.set_blocking(1, False)\n" + CHILD.replace("'line', i", "'x' * 100000")
    assert len(shell('PY | (sleep 0.5; cat)', code).stdout) == 3 * 100001


def train(redirect, *flags, workdir):
    flags = ' '.join(map(str, (*TINY, '--max_iters=100000', '--eval_interval=100000', *flags)))
    return subprocess.Popen(['bash', '-c', f'"$0" {REPO}/train.py {flags} {redirect}', sys.executable], text=True,
                            cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def test_a_training_whose_reader_ends_saves_and_ends(workdir):
    process = train('2>&1 | head -n 12; exit ${PIPESTATUS[0]}', workdir=workdir)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGPIPE and 'Traceback' not in err + out
    assert load(workdir / 'out' / 'last.pt')['iter_num'] > 0


def test_ctrl_c_on_a_training_piped_to_tee_saves(workdir):
    """The terminal sends the signal to all programs of the pipe, and tee ends first."""
    process = train('| tee log; exit ${PIPESTATUS[0]}', workdir=workdir)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (workdir / 'out' / 'last.pt').exists():
        time.sleep(0.1)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert load(workdir / 'out' / 'last.pt')['iter_num'] > 0


@pytest.mark.parametrize('redirect', ['> /dev/full', '>&- 2>&-'])
def test_a_training_without_output_is_finished(workdir, redirect):
    process = train(redirect, '--max_iters=6', workdir=workdir)
    process.communicate(timeout=60)
    assert process.returncode == 0 and load(workdir / 'out' / 'last.pt')['iter_num'] == 6


@pytest.mark.parametrize('ignored, status', [(False, 128 + signal.SIGHUP), (True, 0)])
def test_a_terminal_that_vanishes_ends_a_training_with_a_save_unless_nohup_was_used(workdir, ignored, status):
    master, slave = os.openpty()
    disposition = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        process = subprocess.Popen([sys.executable, REPO / 'train.py', *TINY, '--max_iters=400'], cwd=workdir,
                                   stdout=slave, stderr=slave, stdin=slave)
    finally:
        signal.signal(signal.SIGHUP, disposition)
    os.close(slave)
    read = b''
    while b'iter 2:' not in read:
        try:
            read += os.read(master, 10000)
        except OSError as error:
            assert error.errno == errno.EIO, read
            break
    os.close(master)
    assert process.wait(60) == status
    assert load(workdir / 'out' / 'last.pt')['iter_num'] > 1


def test_a_prepare_whose_reader_ends_succeeds_quietly(tmp_path):
    (tmp_path / 'text.txt').write_text('to be or not to be\n' * 500, encoding='utf-8')
    script = tmp_path / 'data' / 'text' / 'prepare.py'
    script.parent.mkdir(parents=True)
    script.write_text((REPO / 'data' / 'text' / 'prepare.py').read_text(encoding='utf-8').replace(
        "Path(__file__).resolve().parents[2]", repr(str(REPO))), encoding='utf-8')
    done = shell(f'"$0" {script} --input=text.txt --name=mine --tokenizer=char | true; exit ${{PIPESTATUS[0]}}',
                 cwd=tmp_path)
    assert done.returncode == 0 and 'Broken' not in done.stderr and 'Traceback' not in done.stderr, done.stderr


CONTROL = """
import sys
from configurator import UserError
from lib.machine import console
console.protect()
print('a\\x1b]0;title\\x07b\\rc', flush=True)
print('\\x1b[31mred\\u202e', file=sys.stderr)
sys.stderr.write('\\r 50%|##|')
with console.as_is():
    print('\\x1b[1mwandb\\x1b[0m', flush=True)
raise UserError('tensor \\x1b[8m is hidden')
"""


def test_nothing_that_is_printed_by_anyone_controls_the_terminal():
    done = subprocess.run([sys.executable, '-c', CONTROL], capture_output=True, timeout=60,
                          env={**os.environ, 'PYTHONPATH': str(REPO)})
    assert done.stdout == b'a\\x1b]0;title\\x07b\\rc\n\x1b[1mwandb\x1b[0m\n'
    assert done.stderr == b'\\x1b[31mred\\u202e\n\r 50%|##|error: tensor \\x1b[8m is hidden\n'


class PanicException(BaseException):
    """As PyO3 makes of a panic in Rust."""


@pytest.mark.parametrize('error, line', [
    (OSError(36, 'File name too long', 'x' * 300), 'error: ' + 'x' * 200 + ': File name too long\n'),
    (PanicException('index out of bounds\nat'), 'ended with PanicException: index out of bounds at\n'),
    (KeyboardInterrupt(), 'interrupted\n')])
def test_an_error_of_the_machine_or_of_a_library_in_rust_is_one_line(capsys, error, line):
    console.print_exception(type(error), error, None)
    shown = capsys.readouterr().err
    assert shown.endswith(line) and shown.count('\n') == 1
