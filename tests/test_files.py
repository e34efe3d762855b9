"""lib/machine/files.py: a file is written whole or not at all."""
import errno
import os
import stat

import pytest
from kit import break_call

from lib.machine.files import atomic_write, leftovers


def write(path, text):
    with atomic_write(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
        file.write(text)


def test_the_new_file_replaces_the_old_one(tmp_path):
    for text in ('old', 'new'):
        write(tmp_path / 'a.txt', text)
    assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == 'new' and os.listdir(tmp_path) == ['a.txt']


def test_until_the_block_ends_the_old_file_is_there(tmp_path):
    write(tmp_path / 'a.txt', 'old')
    with atomic_write(tmp_path / 'a.txt') as temporary:
        temporary.write_text('new', encoding='utf-8')
        assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == 'old'


def test_two_writers_of_one_path_do_not_share_a_temporary_file(tmp_path):
    with atomic_write(tmp_path / 'a.txt') as first, atomic_write(tmp_path / 'a.txt') as second:
        first.write_text('first', encoding='utf-8')
        second.write_text('second', encoding='utf-8')
    assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == 'first' and os.listdir(tmp_path) == ['a.txt']


def test_a_writer_that_makes_its_file_private_does_not_decide_the_permissions(tmp_path):
    write(tmp_path / 'plain', 'x')
    with atomic_write(tmp_path / 'private') as temporary:
        os.close(os.open(temporary, os.O_WRONLY))
        os.chmod(temporary, 0o600)
    assert stat.S_IMODE((tmp_path / 'private').stat().st_mode) == stat.S_IMODE((tmp_path / 'plain').stat().st_mode)


# Faults

@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left'), KeyboardInterrupt(), MemoryError()])
def test_a_block_that_fails_leaves_the_old_file_and_no_other(tmp_path, error):
    write(tmp_path / 'a.txt', 'old')
    with pytest.raises(type(error)):
        with atomic_write(tmp_path / 'a.txt') as temporary:
            temporary.write_text('ne', encoding='utf-8')
            raise error
    assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == 'old' and os.listdir(tmp_path) == ['a.txt']


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_a_disk_error_is_passed_on_and_leaves_the_old_file(tmp_path, monkeypatch, call):
    write(tmp_path / 'a.txt', 'old')
    break_call(monkeypatch, os, call, OSError(errno.EIO, 'Input/output error'))
    with pytest.raises(OSError):
        write(tmp_path / 'a.txt', 'new')
    assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == 'old' and os.listdir(tmp_path) == ['a.txt']


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_fsync_is_written_all_the_same(tmp_path, monkeypatch, number):
    break_call(monkeypatch, os, 'fsync', OSError(number, 'not here'))
    write(tmp_path / 'a.txt', 'new')
    assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == 'new'


def test_a_folder_that_cannot_be_synced_does_not_undo_the_write(tmp_path, monkeypatch):
    break_call(monkeypatch, os, 'open', OSError(errno.EACCES, 'Permission denied'), lambda path, *_: path == tmp_path)
    write(tmp_path / 'a.txt', 'new')
    assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == 'new'


def test_a_platform_without_o_directory_writes_too(tmp_path, monkeypatch):
    monkeypatch.delattr(os, 'O_DIRECTORY')
    write(tmp_path / 'a.txt', 'new')
    assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == 'new'


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ('fsync', 'replace'):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    write(tmp_path / 'a.txt', 'new')
    assert calls == ['fsync', 'replace', 'fsync']  # the file, its name, the folder


def test_only_files_that_this_program_names_so_count_as_leftovers(tmp_path):
    ours = ['last.pt.tmp.123', 'last.pt.tmp.123.0a1b2c3d', 'ckpt.pt.tmp.7']
    others = ['thesis.tmp.docx', 'last.pt.tmp.docx', 'notes.tmp.123', 'last.pt', 'my-last.pt.tmp.123',
              'last.pt.tmp.123.0a1b2c3d.bak', 'last-pt.tmp.123']
    for name in ours + others:
        (tmp_path / name).touch()
    (tmp_path / 'last.pt.tmp.5').mkdir()
    (tmp_path / 'last.pt.tmp.6').symlink_to(tmp_path / 'thesis.tmp.docx')
    assert [p.name for p in leftovers(tmp_path, ['last.pt', 'ckpt.pt'])] == sorted(ours)
