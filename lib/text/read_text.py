"""From a file, folder, glob, URL or hub dataset to text.

Everything is read as a stream of pieces (text, is_last) of at most about CHUNK characters. is_last is True for the
last piece of a document. So no text has to fit into memory.
"""
import codecs
import glob
import gzip
import json
import os
import time
import urllib.error
import urllib.request
import zlib
from http.client import HTTPException
from itertools import chain
from pathlib import Path

from configurator import UserError, find_path
from lib.text import advice
from lib.text.tokenizer import TextError, encoded

CHUNK = 1 << 20  # characters per piece of a long text
_CONTROL = bytes({*range(32)} - {*b'\t\n\v\f\r\x1a\x1b'})  # bytes that text files almost never contain
WAIT = 1.0  # seconds before the second attempt to download; doubled before the third


def encoding_problems(name):
    """Return a list of error messages about the name of an encoding; empty if Python knows it."""
    try:
        ''.encode(name)
    except (LookupError, ValueError):
        return [f'encoding={name} is unknown; for Chinese text try gb18030']
    return []


def _encoding_advice(error, codec):
    """Suggest what to do about bytes that do not decode as `codec`: a likely encoding, or "not text"."""
    data = error.object
    marks = {'utf-32': codecs.BOM_UTF32_LE, 'utf-16': (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    for name, mark in marks.items():
        if data.startswith(mark) and codecs.lookup(codec).name != name:
            return f'; its byte order mark says --encoding={name}'
    if error.reason in ('unexpected end of data', 'incomplete multibyte sequence', 'truncated data'):
        return ', where it ends within a character; is the file truncated?'
    n_controls = len(data) - len(data.translate(None, _CONTROL))
    if b'\0' in data or 100 * n_controls > len(data):
        return ' and does not look like text; leave it out, or convert it to plain text'
    before = data[:error.start].decode('utf-8', 'ignore')
    # ten valid characters are no accident: text in another encoding rarely contains two that are valid UTF-8
    if codecs.lookup(codec).name == 'utf-8' and sum(not char.isascii() for char in before) > 10:
        return '; the text before it is UTF-8, so this byte is damaged: fix it there'
    guesses = [f'--encoding={name} ({use})' for name, use in (('gb18030', 'Chinese'), ('cp1252', 'Western European'))
               if name != codec and _begins_with(data, name)]
    if guesses:
        return f'; try {" or ".join(guesses)} and look at the preview, or save it as UTF-8'
    return '; save it as UTF-8'


def _begins_with(data, codec):
    """True if `data` is the beginning of a text in `codec`."""
    try:
        codecs.getincrementaldecoder(codec)().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def chunks(path, codec):
    """Yield the decoded text of a file, plain or gzip, without a byte order mark at its beginning.

    UserError names the first byte that does not decode as `codec`, and what to do.
    """
    decoder, done = codecs.getincrementaldecoder(codec)(), 0
    with open(path, 'rb') as raw:
        packed = raw.read(2) == b'\x1f\x8b'
        raw.seek(0)
        file = gzip.open(raw) if packed else raw
        while True:
            try:
                data = file.read(CHUNK)
                done += len(data)
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = done - len(error.object) + error.start
                raise UserError(f'{path} is not {codec.upper()} at byte {at:,} (0x{error.object[error.start]:02x})'
                                f'{_encoding_advice(error, codec)}') from None
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f'{path} is a damaged gzip file: {error}') from None
            if done == len(data):
                text = text.removeprefix('\ufeff')
            if text:
                yield text
            if not data:
                return


def _split_at(separator, stream):
    """Yield the parts between separators of a text that comes in chunks; a separator may cross two chunks."""
    rest = ''
    for chunk in stream:
        *complete, rest = (rest + chunk).split(separator)
        yield from complete
    if rest:
        yield rest


def document(text):
    """Yield the pieces of a document; an empty document has none."""
    for start in range(0, len(text), CHUNK):
        yield text[start:start + CHUNK], start + CHUNK >= len(text)


def _join_fields(record, keys, place):
    """Join the texts under `keys` of a JSON or parquet record; absent or null keys count as empty."""
    if len(keys) == 1 and type(text := record.get(keys[0])) is str:  # the usual case, made fast
        return text
    if not any(key in record for key in keys):
        raise UserError(f'{place}: no key {" or ".join(keys)} among {", ".join(map(str, record))}; use --text_key=...')
    values = [record.get(key) or '' for key in keys]
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, str):
            raise UserError(f'{place}: {key} holds {type(value).__name__}, expected text; use --text_key=...')
    return '\n'.join(filter(None, values))


def _text_of(keys):
    """Return the function (record, place) -> pieces that takes the text under `keys` from a record."""
    def extract(record, place):
        text = _join_fields(record, keys, place)
        try:
            encoded(text)
        except TextError as error:
            raise UserError(f'{place}: {error.message}') from None
        return document(text)
    return extract


def _json_lines(path, codec, extract):
    for number, line in enumerate(_split_at('\n', chunks(path, codec)), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise UserError(f'{path}:{number}: expected one JSON object per line, found {type(record).__name__}')
        except json.JSONDecodeError as error:
            raise UserError(f'{path}:{number}: not JSON ({error.msg}); expected one object per line') from None
        yield from extract(record, f'{path}:{number}')


def _is_json_lines(path, codec):
    """True if the first line is a JSON object. UserError if the file is named JSON but is not one object per line."""
    start = next(chunks(path, codec), '').lstrip()
    if start.startswith('{'):
        line = next((line for line in _split_at('\n', chunks(path, codec)) if line.strip()), '')
        try:
            return isinstance(json.loads(line), dict)
        except json.JSONDecodeError:
            pass
    if '.json' in Path(path).suffixes and start[:1] in ('{', '['):
        raise UserError(f"{path} is JSON, but not one object per line; convert it, for example: jq -c '.[]' FILE")
    return False


def _parquet(path, keys, extract):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'{path}: reading parquet needs the package pyarrow: pip install pyarrow') from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            have = [key for key in keys if key in columns] if keys else columns
            if not have:
                extract(dict.fromkeys(columns), path)  # raises an error that lists the columns
            for batch in file.iter_batches(batch_size=1024, columns=have):
                for record in batch.to_pylist():
                    yield from extract(record, path)
    except pyarrow.ArrowException as error:
        raise UserError(f'{path} is a damaged parquet file: {str(error).splitlines()[0]}') from None


def _hub(address, extract):
    """Stream a dataset of the Hugging Face hub, or a local folder with the same layout; nothing is stored on disk."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f'{address} needs the package datasets: pip install datasets') from None
    repository, _, split = address.removeprefix('hub:').partition('#')
    split = split or 'train'
    try:
        try:
            rows = load_dataset(repository, split=split, streaming=True)
        except RuntimeError:  # an old script-based dataset: use the hub's automatic parquet conversion
            rows = load_dataset(repository, split=split, streaming=True, revision='refs/convert/parquet')
        for batch in rows.iter(batch_size=1024):
            for values in zip(*batch.values(), strict=True):
                yield from extract(dict(zip(batch, values, strict=True)), address)
    except UserError:
        raise
    except Exception as error:  # network, hub and storage libraries each raise their own types
        reason = (str(error).splitlines() or [''])[0]
        raise UserError(f'cannot read {address}: {type(error).__name__}: {reason[:200]}; nothing was changed; '
                        'try again, or give local text, JSON lines or parquet with --input=PATH') from None


def read(path, codec, keys, delimiter='', extract=None):
    """Yield the pieces of one file or hub dataset. The kind of a file is recognised by its content, not its name.

    codec: the encoding of text files. keys: the keys of the text in JSON and parquet records. delimiter: the string
    between the documents of a text file; '' if the file is one document. extract: a function (record, place) -> pieces
    to use instead of the text under `keys`, the columns it needs; () = all. UserError names the file and the place.
    """
    extract = extract or _text_of(keys)
    if str(path).startswith('hub:'):
        return _hub(path, extract)
    with open(path, 'rb') as file:
        if file.read(4) == b'PAR1':
            return _parquet(path, keys, extract)
    if what := advice.not_text(path):
        raise UserError(f'{path} is {what}, not text; save its text as a plain file in UTF-8')
    if _is_json_lines(path, codec):
        return _json_lines(path, codec, extract)
    if delimiter:
        return chain.from_iterable(document(part.strip()) for part in _split_at(delimiter, chunks(path, codec)))
    return _one_document(chunks(path, codec))


def _one_document(stream):
    """Yield chunks as the pieces of one document, each when the next is there, to know which is the last."""
    previous = ''
    for chunk in stream:
        if previous:
            yield previous, False
        previous = chunk
    if previous:
        yield previous, True


def find(flag, words, folder):
    """Return the files that `words` name, in order: folders with everything in them, globs expanded, URLs downloaded.

    words: the values of the setting `flag`. A download goes to `folder`/input.txt. UserError if a word names nothing.
    """
    paths = []
    for word in words:
        if word.startswith('hub:'):
            paths.append(word)
        elif '://' in word:
            paths.append(download(word, folder / 'input.txt'))
        else:
            path = find_path(word)
            if path.is_dir():
                inside = sorted(path.rglob('*'), key=lambda p: p.as_posix())
                found = [p for p in inside if p.is_file() and not any(
                    part.startswith('.') for part in p.relative_to(path).parts)]
            else:
                found = [path] if path.is_file() else sorted(
                    p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if path.is_dir() and (others := advice.unreadable(path, found)):
                raise UserError(f'--{flag}={word}: {others}')
            if not found:
                reason = 'no such file or folder'
                if path.is_dir():
                    reason = 'no files in it'
                elif glob.has_magic(str(path)):
                    reason = 'the pattern matches no file'
                raise UserError(f'--{flag}={word}: {reason}')
            paths += found
    return paths


def download(url, path, tries=3):
    """Download `url` to `path` in at most `tries` attempts and return `path`; UserError if it fails, with no file left.
    """
    temp = Path(f'{path}.tmp')
    temp.parent.mkdir(parents=True, exist_ok=True)
    for wait in (WAIT, 2 * WAIT, 0)[-tries:]:
        try:
            request = urllib.request.Request(url, headers={'User-Agent': 'minuteGPT'})
            with urllib.request.urlopen(request, timeout=30) as reply, open(temp, 'wb') as file:
                size = 0
                while data := reply.read(CHUNK):
                    if not size and data.lstrip()[:15].lower().startswith((b'<!doctype html', b'<html')):
                        raise HTTPException('a web page instead of the text')
                    size += file.write(data)
                expected = int(reply.headers.get('Content-Length') or size)
                if not 0 < size == expected:
                    raise HTTPException(f'{size:,} of {expected:,} bytes')
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
            return path
        except urllib.error.HTTPError as error:
            reason = f'{error.code} {error.reason}'
            if error.code < 500:  # 404 and similar errors will not change
                break
        except (OSError, HTTPException) as error:
            reason = str(error)
        finally:
            temp.unlink(missing_ok=True)
        time.sleep(wait)
    raise UserError(f'download failed: {reason} from {url}; put the text at {path.parent / "input.txt"}, or pass '
                    'a copy with --input=PATH; python data/python_char/prepare.py needs no download')
