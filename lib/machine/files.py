"""Write a file whole or not at all."""
import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# of fsync, on file systems that have none, or none for folders; macOS has both ENOTSUP and EOPNOTSUPP
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY}


def temporary_name(path):
    """Return a path beside `path` that no two writers use."""
    return path.with_name(f'{path.name}.tmp.{os.getpid()}.{secrets.token_hex(4)}')


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path in the folder of `path`; the file written there becomes `path` when the block ends.

    At every instant `path` holds the old file or the new one, complete and on disk. If the block raises, or the file
    cannot be synced or renamed, the temporary file is removed, `path` is unchanged and the error is passed on.

        with atomic_write('meta.json') as temporary, open(temporary, 'w', encoding='utf-8') as file:
            json.dump(meta, file)
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, 'xb') as file:
            mode = os.stat(file.fileno()).st_mode  # what the umask allows; some libraries write for their owner only
        yield temporary
        if os.stat(temporary).st_mode != mode:
            with contextlib.suppress(OSError):  # CIFS, FUSE and FAT may have no permissions to set
                os.chmod(temporary, mode)
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if hasattr(os, 'O_DIRECTORY'):  # not on Windows
            with contextlib.suppress(OSError):  # the new file is in place; only a power failure could undo the rename
                _sync(path.parent, os.O_DIRECTORY)
    finally:
        with contextlib.suppress(OSError):  # renamed already, or the folder is gone
            temporary.unlink()


@contextlib.contextmanager
def alone_in(folder, names=()):
    """Lock `folder` for this process while the block runs; BlockingIOError if another process has it.

    names: files whose writers may have been killed; what they left is removed. Some systems and file systems have no
    locks; there the block runs without one.
    """
    fd = None
    try:
        if fcntl:
            fd = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in leftovers(folder, names):
                    path.unlink()
            except BlockingIOError:
                raise
            except OSError:  # a network file system, for example
                pass
        yield
    finally:
        if fd is not None:
            os.close(fd)


def leftovers(folder, names):
    """Return the temporary files that killed writers of `names` left in `folder`. The caller must hold its lock."""
    pattern = re.compile(rf'({"|".join(map(re.escape, names))})\.tmp\.\d+(\.[0-9a-f]{{8}})?')
    try:
        return sorted(p for p in Path(folder).iterdir()
                      if pattern.fullmatch(p.name) and p.is_file() and not p.is_symlink())
    except OSError:  # a network file system, for example, that has just gone
        return []


def _sync(path, flags):
    """Wait until the file or folder at `path` is on disk."""
    fd = os.open(path, flags)
    try:
        sync(fd)
    finally:
        os.close(fd)


def sync(fd):
    """Wait until an open file is on disk, if its file system can do that."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
