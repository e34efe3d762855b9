"""What a file is, by its first bytes, and the texts inside archives: determined before anything is read from it.

    parts('notes.tar.gz')      (label, binary stream, kind) of each text in it; a plain file has one part, itself
    not_text('cover.png')      'a picture', '' for what may be text

Compressed files and tar archives are streams, so nothing is unpacked to disk, and archives may be inside each other.
"""
import bz2
import errno
import functools
import gzip
import io
import lzma
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

from configurator import UserError

START = 1 << 15  # bytes to look at
DEEPEST = 4  # archives inside archives
LONGEST_HEADER = 1 << 20  # bytes of the name and other data of a member of a tar archive
OTHER_FILES = {  # first bytes -> what begins with them
    b'%PDF-': 'a PDF', b'\x89PNG': 'a picture', b'\xff\xd8\xff': 'a picture', b'GIF8': 'a picture',
    b'II*\0': 'a picture', b'MM\0*': 'a picture', b'\0\0\1\0': 'a picture', b'RIFF': 'a sound, picture or film',
    b'ID3': 'a sound', b'OggS': 'a sound', b'fLaC': 'a sound', b'\x1aE\xdf\xa3': 'a film',
    b'Rar!\x1a': 'a rar archive', b'7z\xbc\xaf': 'a 7z archive', b'\x28\xb5\x2f\xfd': 'a zstd file',
    b'\x04"M\x18': 'an lz4 file', b'\x1f\x9d': 'a compress (.Z) file', b'MSCF': 'a cab archive',
    b'xar!': 'a xar archive',
    b'!<arch>\n': 'an ar or deb archive', b'\xed\xab\xee\xdb': 'an rpm package', b'x\x01': 'a zlib stream',
    b'x\x9c': 'a zlib stream', b'x\xda': 'a zlib stream', b'\xff\x06\0\0sNaPpY': 'a snappy file',
    b'\xd0\xcf\x11\xe0': 'a Word or Excel file', b'{\\rtf': 'a rich text file', b'%!PS-Adobe': 'a PostScript file',
    b'AT&TFORM': 'a DjVu file', b'SQLite format 3\0': 'an SQLite database', b'\x93NUMPY': 'a NumPy array',
    b'\x89HDF': 'an HDF5 file', b'ARROW1': 'an Arrow (Feather) file', b'\xff\xff\xff\xff': 'an Arrow stream',
    b'ORC': 'an ORC file', b'Obj\x01': 'an Avro file', b'GGUF': 'a model (GGUF)', b'bplist00': 'a property list',
    b'\x80\x02': 'a Python pickle', b'\x80\x03': 'a Python pickle', b'\x80\x04': 'a Python pickle',
    b'\x80\x05': 'a Python pickle', b'\x7fELF': 'a program', b'\xcf\xfa\xed\xfe': 'a program',
    b'\xca\xfe\xba\xbe': 'a program', b'\0asm': 'a program', b'PACK\0': 'a git pack', b'wOFF': 'a font',
    b'wOF2': 'a font', b'\0\1\0\0': 'a font', b'OTTO\0': 'a font', b'\x13W\x9a\xce': 'a gdbm database',
    b'\xce\x9aW\x13': 'a gdbm database', b'\xcf\x9aW\x13': 'a gdbm database'}
WORDS = {b'ORC', b'RIFF', b'MSCF', b'xar!', b'AT&TFORM', b'ID3', b'OggS', b'fLaC', b'GIF8'}  # a text may be
PACKED = {b'\x1f\x8b': ('gzip', gzip.open), b'BZh': ('bzip2', bz2.open), b'\xfd7zXZ\0': ('xz', lzma.open),
          b']\0\0': ('lzma', lzma.open)}
IN_ZIP = {'word/document.xml': 'a Word document (docx)', 'xl/workbook.xml': 'an Excel file (xlsx)',
          'ppt/presentation.xml': 'a PowerPoint file (pptx)', 'META-INF/container.xml': 'an epub book',
          'META-INF/MANIFEST.MF': 'a Java program', 'content.xml': 'an OpenDocument file'}
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, RuntimeError,
          NotImplementedError, ValueError, MemoryError)  # RuntimeError: encrypted; MemoryError: it asks for too much


def damage(label, kind, error):
    """Return the UserError for an exception of DAMAGE from a file of this kind.

    The exception itself if the content is not the reason: the disk or the network did not deliver the file.
    """
    if getattr(error, 'errno', None) not in (None, errno.EINVAL):
        return error
    return UserError(f'{label} is a damaged {kind}: {(str(error).splitlines() or [type(error).__name__])[0]}')


def _kind_of(start):
    """Return what a file with this beginning is if it is surely not text, '' otherwise; archives count as text."""
    for magic, what in OTHER_FILES.items():
        if start.startswith(magic) and (magic not in WORDS or b'\0' in start[:64]):
            return what
    if start[4:8] == b'ftyp':
        return 'a film or picture'
    if start[:2] in (b'MZ', b'BM') and b'\0' in start[:16]:
        return 'a program' if start[:2] == b'MZ' else 'a picture'
    if start[12:16] in (b'a\x15\6\0', b'\0\6\x15a'):
        return 'a Berkeley DB database'
    if start[60:68] == b'BOOKMOBI':
        return 'a Kindle book'
    if start[8:10] == b'{"' and start[3:8] == bytes(5):
        return 'a safetensors file'
    return ''


def not_text(path):
    """Return what the file is if it is surely not text ('a PDF'), '' otherwise; looks at its first bytes only."""
    with open(path, 'rb') as file:
        start = file.read(512)
    if start.startswith(b'PK\x03\x04'):
        try:
            with zipfile.ZipFile(path) as archive:
                return _kind_of_zip(archive)
        except DAMAGE:
            return ''  # `parts` reports it
    return _kind_of(start)


def _kind_of_zip(archive):
    names = archive.namelist()
    if any(name.endswith('/data.pkl') for name in names):
        return 'a PyTorch file'
    if names and all(name.endswith('.npy') for name in names):
        return 'a file of NumPy arrays (npz)'
    return next((what for name, what in IN_ZIP.items() if name in names), '')


class _Member(tarfile.TarInfo):
    """A member of a tar archive. Its name may be stored in an extra header, which tarfile reads whole."""

    def _proc_member(self, archive):
        if self.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                         tarfile.GNUTYPE_LONGLINK) and self.size > LONGEST_HEADER:
            raise tarfile.ReadError(f'a header claims {self.size:,} bytes')
        return super()._proc_member(archive)


def _is_tar(start):
    """True if a file begins with the header of a tar archive; its checksum makes sure."""
    try:
        return len(start) >= 512 and any(start[:512]) and bool(tarfile.TarInfo.frombuf(start[:512], 'utf-8', 'replace'))
    except tarfile.HeaderError:
        return False


def parts(path):
    """Yield (label, binary stream, kind) of the texts in a file: itself, or what the archive or compressed file holds.

    kind: what may be damaged when the stream is read (see DAMAGE), '' for a plain file. Files in an archive that are
    hidden or not text are left out, and a line on stderr gives their number and the first names. UserError for a
    damaged archive, and for a file that is surely not text.
    """
    left_out = {}
    with open(path, 'rb') as raw:
        yield from _parts(str(path), raw, left_out, 0, '')
    if left_out:
        named = ', '.join(f'{label} ({why})' for label, why in list(left_out.items())[:3])
        note(f'{path}: left out {len(left_out):,} files: {named}{" ..." if len(left_out) > 3 else ""}')


@functools.cache
def note(line):
    """Print a line on stderr, once: every file is read twice."""
    print(line, file=sys.stderr)


def _parts(label, stream, left_out, depth, kind):
    start = stream.peek(512)[:512]
    for magic, (name, opener) in PACKED.items():
        if start.startswith(magic):
            if depth >= DEEPEST:
                raise UserError(f'{label} is packed more than {DEEPEST} times; unpack it')
            try:
                inner = io.BufferedReader(opener(stream), START)
                inner.peek(1)
            except DAMAGE as error:
                raise damage(label, f'{name} file', error) from None
            yield from _parts(label, inner, left_out, depth + 1, name)
            return
    if _is_tar(start):
        try:
            with tarfile.open(fileobj=stream, mode='r|', tarinfo=_Member) as archive:
                for member in archive:
                    if member.isfile() and not _hidden(member.name, label, left_out):
                        yield from _parts_of_member(label, member.name, archive.extractfile(member), left_out, depth,
                                                    'tar')
        except DAMAGE as error:
            raise damage(label, 'tar archive', error) from None
    elif start.startswith((b'PK\x03\x04', b'PK\x05\x06')):
        if depth >= 1:
            raise UserError(f'{label} is a zip archive inside another; unpack it and name the folder')
        yield from _zip_parts(label, stream, left_out)
    elif what := _kind_of(start) or ('a parquet file' if depth and start.startswith(b'PAR1') else ''):
        raise UserError(f'{label} is {what}, not text; save its text as a plain file in UTF-8')
    else:
        yield label, stream, kind


def _zip_parts(label, stream, left_out):
    try:
        with zipfile.ZipFile(stream) as archive:
            if what := _kind_of_zip(archive):
                raise UserError(f'{label} is {what}, not text; save its text as a plain file in UTF-8')
            for member in archive.infolist():
                if not member.is_dir() and not _hidden(member.filename, label, left_out):
                    with archive.open(member) as file:
                        yield from _parts_of_member(label, member.filename, file, left_out, 0, 'zip')
    except DAMAGE as error:
        raise damage(label, 'or encrypted zip archive', error) from None


def _parts_of_member(label, name, file, left_out, depth, kind):
    """Yield the parts of one file in an archive, or note why it is left out."""
    stream = io.BufferedReader(file, START)
    if what := _kind_of(stream.peek(512)[:512]):
        left_out[name] = what
        return
    yield from _parts(f'{label}:{name}', stream, left_out, depth + 1, kind)


def _hidden(name, label, left_out):
    """Note and return whether a file in an archive is hidden, as the metadata that macOS adds is."""
    hidden = any(part.startswith('.') and part.strip('.') or part == '__MACOSX' for part in Path(name).parts)
    if hidden:
        left_out[name] = 'hidden'
    return hidden
