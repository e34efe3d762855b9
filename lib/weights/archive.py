"""Files of torch.save: zip archives of tensors and plain values, read without running code or filling the memory."""
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import torch

from configurator import UserError
from lib.machine.distributed import OF_THE_MACHINE, first_line


def read_archive(path, mmap=False):
    """Return the tensors and plain values in a file of torch.save, checksums verified; UserError if it is damaged."""
    path = Path(path)
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 6):
        raise UserError(f'torch {torch.__version__} cannot load checkpoints safely (CVE-2025-32434); '
                        'upgrade to >= 2.10')
    try:
        if not path.is_file():
            raise UserError(f'{path} not found')
        with open(path, 'rb') as f:
            size, magic = os.fstat(f.fileno()).st_size, f.read(4)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    if magic != b'PK\x03\x04':
        raise UserError(f'{path} is empty' if size == 0 else f'{path} is not a checkpoint of this program')
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, size)
            bad = archive.testzip()
            sizes = Counter(member.file_size for member in archive.infolist())
    except Exception as error:  # zipfile raises a dozen kinds of exception for damaged files
        if getattr(error, 'errno', None) in OF_THE_MACHINE:
            raise UserError(f'{path} cannot be read ({error.strerror})') from error
        raise UserError(f'{path} is incomplete or damaged ({size} bytes; {error})') from error
    if bad:
        raise UserError(f'{path} is corrupt: checksum mismatch in {bad}')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(f'{path} holds Python objects other than tensors and plain values; refusing') from error
    except Exception as error:
        if mmap:  # some FUSE and shared folders cannot map files
            return read_archive(path)
        raise UserError(f'{path} is damaged ({first_line(error)})') from error
    if larger := _storage_sizes(content) - sizes:  # if it maps a file, torch would read the bytes after the member
        raise UserError(f'{path} is damaged: it has a tensor of {next(iter(larger)):,} bytes, and no part of this size')
    return content


def _storage_sizes(content):
    """Return a Counter of the bytes of each storage that the tensors in nested dicts, lists and tuples use."""
    storages, seen, rest = {}, set(), [content]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and value.device.type == 'cpu' and not value.is_nested:
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:  # they may contain each other
            seen.add(id(value))
            rest += value.values() if isinstance(value, dict) else value
    storages.pop(0, None)  # of empty tensors
    return Counter(storages.values())


def _check_members(archive, size):
    """Raise ValueError if the members of a zip file give more bytes than the file has."""
    end, names = 0, set()
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ValueError(f'{member.filename!r} is compressed, which torch.save never does')
        if member.header_offset < end or member.filename in names:
            raise ValueError(f'{member.filename!r} is in it twice, or overlaps another part')
        end = member.header_offset + 30 + member.file_size
        names.add(member.filename)
    if end > size:
        raise ValueError('it is cut off')


def strip_prefix(name):
    """Return a parameter's name without the prefixes of torch.compile, DDP and others in other programs' files."""
    while (rest := name.removeprefix('module.').removeprefix('_orig_mod.').removeprefix('model.')) != name:
        name = rest
    return name
