"""From a file, folder, glob, address or hub name to text.

Everything is read as a stream of pieces (text, ends) of at most about CHUNK characters, where `ends` is True on the
last piece of a document, so that no text has to fit into memory.
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
from lib.text.tokenizer import TextError, encoded

CHUNK = 1 << 20  # characters in a piece of a long text
_CONTROL = bytes({*range(32)} - {*b'\t\n\v\f\r\x1a\x1b'})  # bytes that a text hardly ever has
WAIT = 1.0  # seconds before the second try of a download; doubled for the third


def encoding_problems(name):
    """Return what is wrong with the name of an encoding, in a list that is empty for a known one."""
    try:
        ''.encode(name)
    except (LookupError, ValueError):
        return [f'encoding={name} is unknown; for Chinese text try gb18030']
    return []


def _advice(error, codec):
    """Return how to go on with bytes that are not `codec`; what their encoding is can only be guessed."""
    data = error.object
    marks = {'utf-32': codecs.BOM_UTF32_LE, 'utf-16': (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    for name, mark in marks.items():
        if data.startswith(mark) and codecs.lookup(codec).name != name:
            return f'; its byte order mark says --encoding={name}'
    if error.reason in ('unexpected end of data', 'incomplete multibyte sequence', 'truncated data'):
        return ', where it ends within a character; was it cut short?'
    if b'\0' in data or 100 * (len(data) - len(data.translate(None, _CONTROL))) > len(data):
        return ' and does not look like text; leave it out, or give what it holds as plain text'
    before = data[:error.start].decode('utf-8', 'ignore')  # two characters of another encoding may pass by chance
    if codecs.lookup(codec).name == 'utf-8' and sum(not char.isascii() for char in before) > 10:
        return '; what stands before is, so this byte is damaged: mend it there'
    guesses = [f'--encoding={name} ({use})' for name, use in (('gb18030', 'Chinese'), ('cp1252', 'Western European'))
               if name != codec and _reads(data, name)]
    return f'; try {" or ".join(guesses)} and look at the preview, or save it as UTF-8' if guesses else (
        '; save it as UTF-8')


def _reads(data, codec):
    """True where `data` is the beginning of a text in `codec`."""
    try:
        codecs.getincrementaldecoder(codec)().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def chunks(path, codec):
    """Yield the decoded text of a file, plain or gzip; a byte order mark at its very beginning is dropped.

    UserError names the first byte that is not `codec`, and what to do.
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
                                f'{_advice(error, codec)}') from None
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f'{path} is a damaged gzip file: {error}') from None
            if done == len(data):
                text = text.removeprefix('\ufeff')
            if text:
                yield text
            if not data:
                return


def _divide(stream, separator):
    """Yield what lies between separators, whatever the chunks."""
    rest = ''
    for chunk in stream:
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    if rest:
        yield rest


def document(text):
    """Yield a document in pieces; an empty one has none."""
    for start in range(0, len(text), CHUNK):
        yield text[start:start + CHUNK], start + CHUNK >= len(text)


def _fields(record, keys, place):
    """Join the text under `keys` of a JSON or parquet record; keys that are absent or null count as empty."""
    if len(keys) == 1 and type(text := record.get(keys[0])) is str:  # nearly always
        return text
    if not any(key in record for key in keys):
        raise UserError(f'{place}: no key {" or ".join(keys)} among {", ".join(map(str, record))}; say --text_key=...')
    values = [record.get(key) or '' for key in keys]
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, str):
            raise UserError(f'{place}: {key} holds {type(value).__name__}, expected text; say --text_key=...')
    return '\n'.join(filter(None, values))


def _json_lines(path, codec, keys):
    for number, line in enumerate(_divide(chunks(path, codec), '\n'), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise UserError(f'{path}:{number}: expected one JSON object a line, found {type(record).__name__}')
            text = _fields(record, keys, f'{path}:{number}')
            if '\\u' in line:  # only such an escape can bring in half a character
                encoded(text)
        except json.JSONDecodeError as error:
            raise UserError(f'{path}:{number}: not JSON ({error.msg}); expected one object a line') from None
        except TextError as error:
            raise UserError(f'{path}:{number}: {error.message}') from None
        yield from document(text)


def _is_json_lines(path, codec):
    """True where the first line holds a JSON object; a file called JSON but laid out otherwise is refused."""
    start = next(chunks(path, codec), '').lstrip()
    if start.startswith('{'):
        line = next((line for line in _divide(chunks(path, codec), '\n') if line.strip()), '')
        try:
            return isinstance(json.loads(line), dict)
        except json.JSONDecodeError:
            pass
    if '.json' in Path(path).suffixes and start[:1] in ('{', '['):
        raise UserError(f"{path} is JSON, but not one object a line; turn it into that, for example: jq -c '.[]' FILE")
    return False


def _parquet(path, keys):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'{path}: reading parquet needs the package pyarrow: pip install pyarrow') from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            have = [key for key in keys if key in columns]
            if not have:
                _fields(dict.fromkeys(columns), keys, path)  # says which there are
            for batch in file.iter_batches(batch_size=1024, columns=have):
                for record in batch.to_pylist():
                    yield from document(_fields(record, keys, path))
    except pyarrow.ArrowException as error:
        raise UserError(f'{path} is a damaged parquet file: {str(error).splitlines()[0]}') from None


def _hub(address, keys):
    """Stream a dataset of the Hugging Face hub, or of a local folder laid out like one: nothing is kept on disk."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f'{address} needs the package datasets: pip install datasets') from None
    repository, _, split = address.removeprefix('hub:').partition('#')
    split = split or 'train'
    try:
        try:
            rows = load_dataset(repository, split=split, streaming=True)
        except RuntimeError:  # a repository that is still a script; the hub keeps a parquet copy of each beside it
            rows = load_dataset(repository, split=split, streaming=True, revision='refs/convert/parquet')
        for batch in rows.iter(batch_size=1024):
            for values in zip(*batch.values(), strict=True):
                yield from document(_fields(dict(zip(batch, values, strict=True)), keys, address))
    except Exception as error:  # network, hub and storage libraries each have their own
        reason = (str(error).splitlines() or [''])[0]
        raise UserError(f'cannot read {address}: {type(error).__name__}: {reason[:200]}; nothing was changed; '
                        'try again, or give local text, JSON lines or parquet with --input=PATH') from None


def read(path, codec, keys, delimiter=''):
    """Yield the pieces of one source, told apart by its content, not its name.

    codec: the encoding of text. keys: where records hold their text. delimiter: what stands between the documents of
    a text file ('' it is one document). Raises UserError naming file and place.
    """
    if str(path).startswith('hub:'):
        return _hub(path, keys)
    with open(path, 'rb') as file:
        if file.read(4) == b'PAR1':
            return _parquet(path, keys)
    if _is_json_lines(path, codec):
        return _json_lines(path, codec, keys)
    if delimiter:
        return chain.from_iterable(document(part.strip()) for part in _divide(chunks(path, codec), delimiter))
    return _whole(chunks(path, codec))


def _whole(stream):
    """Yield chunks as pieces of one document, holding one back to know the last."""
    held = ''
    for chunk in stream:
        if held:
            yield held, False
        held = chunk
    if held:
        yield held, True


def find(flag, words, folder):
    """Return the files that `words` name: addresses are downloaded, folders walked, globs expanded, all in order."""
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
            if not found:
                raise UserError(f'--{flag}={word}: ' + (
                    'no files in it' if path.is_dir() else 'the pattern matches no file' if glob.has_magic(str(path))
                    else 'no such file or folder'))
            paths += found
    return paths


def download(url, path, tries=3):
    """Fetch `url` to `path` in at most `tries` tries; a failure leaves nothing behind and raises UserError."""
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
            if error.code < 500:  # 404 and its like will not change
                break
        except (OSError, HTTPException) as error:
            reason = str(error)
        finally:
            temp.unlink(missing_ok=True)
        time.sleep(wait)
    raise UserError(f'download failed: {reason} from {url}; put the text at {path.parent / "input.txt"}, or name a '
                    'copy with --input=PATH; python data/python_char/prepare.py needs no download')
