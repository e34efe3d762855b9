"""From a file or hub dataset to text; lib/text/inputs.py finds the files.

Everything is read as a stream of pieces (text, is_last) of at most about CHUNK characters. is_last is True for the
last piece of a document. So no text has to fit into memory.
"""
import codecs
from itertools import chain

from configurator import UserError
from lib.machine.console import reason
from lib.text import containers, encodings, json_records
from lib.text.download import HUB_MIRROR
from lib.text.tokenizer import EOT, TextError, encoded

CHUNK = 1 << 20  # characters per piece of a long text
MOST_PACKED = 1000  # text is rarely packed into a hundredth of its size, and never into a thousandth


def chunks(path, codec):
    """Yield the decoded text of a file; of an archive, all its texts one after the other. See decoded."""
    for label, stream, kind in containers.parts(path):
        yield from decoded(label, stream, codec, kind)


def decoded(label, stream, codec, kind=''):
    """Yield the decoded text of a binary stream, without a byte order mark at its beginning.

    UserError names the first byte that does not decode as `codec`, and what to do. kind: see containers.parts.
    """
    decoder, done = codecs.getincrementaldecoder(codec)(), 0
    while True:
        try:
            data = stream.read(CHUNK)
            if not done:
                encodings.check(label, data, codec)
            done += len(data)
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = done - len(error.object) + error.start
            raise UserError(f'{label} is not {codec.upper()} at byte {at:,} (0x{error.object[error.start]:02x})'
                            f'{encodings.advice(error, codec)}') from None
        except UnicodeError as error:  # of codecs such as idna
            raise UserError(f'{label} is not {codec.upper()}: {error}') from None
        except containers.DAMAGE as error:
            if not kind:
                raise
            raise containers.damage(label, f'{kind} file', error) from None
        if '\0' in text:
            name = encodings.unmarked(data)
            raise UserError(f'{label} holds NUL, which no text does; '
                            f'{f"try --encoding={name}" if name else "leave it out, or convert it to plain text"}')
        if done == len(data):
            text = text.removeprefix('\ufeff')
        if text:
            yield text
        if not data:
            return


def _split_at(separator, stream):
    """Yield the parts between separators of a text that comes in chunks; a separator may cross two chunks."""
    before, overlap = [], len(separator) - 1
    for chunk in stream:
        hold = before.pop() if before else ''
        *complete, rest = (hold[len(hold) - overlap:] + chunk if overlap else chunk).split(separator)
        hold = hold[:len(hold) - overlap] if overlap else hold
        if not complete:
            before += [hold, rest]
            continue
        yield ''.join([*before, hold, complete[0]])
        yield from complete[1:]
        before = [rest]
    if rest := ''.join(before):
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


def _texts(label, stream, keys, delimiter, extract):
    """Yield the pieces of one decoded text: of its records if it is JSON, else of its documents."""
    start, stream = json_records.beginning(stream)
    if records := json_records.read(label, start, stream):
        for place, record in records:
            yield from extract(record, place)
    elif delimiter:
        for part in _split_at(delimiter, stream):
            yield from document(part.strip())
    else:
        yield from _one_document(stream)


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
            for group in range(file.num_row_groups):
                _check_group(path, file.metadata.row_group(group))
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=have):
                    for record in batch.to_pylist():
                        yield from extract(record, path)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError, OverflowError) as error:
        raise containers.damage(path, 'parquet file', error) from None


def _check_group(path, group):
    """Raise UserError if a row group of a parquet file claims more than its bytes can hold, or than memory should."""
    packed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
    if group.total_byte_size > max(MOST_PACKED * packed, 1 << 24) or group.total_byte_size > 1 << 33 or (
            group.num_rows > max(MOST_PACKED * packed, 1 << 24)):
        raise UserError(f'{path}: a row group of {packed:,} bytes claims {group.num_rows:,} rows and '
                        f'{group.total_byte_size:,} bytes; it is damaged, or made to fill the memory')


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
        raise UserError(f'cannot read {address}: {reason(error)}; nothing was changed; try again, {HUB_MIRROR}, or '
                        'give local text, JSON lines or parquet with --input=PATH') from None


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
    return chain.from_iterable(_texts(label, decoded(label, stream, codec, kind), keys, delimiter, extract)
                               for label, stream, kind in containers.parts(path))


def _one_document(stream):
    """Yield chunks as the pieces of one document, each when the next is there, to know which is the last."""
    previous = ''
    for chunk in stream:
        if previous:
            yield previous, False
        previous = chunk
    if previous:
        yield previous, True


def heed_marks(pieces, kind):
    """Yield pieces divided at end-of-text marks, which is how GPT-2's corpora are passed around.

    kind: of the tokenizer. Where it has no such mark, the text is unchanged and a line on stderr says so.
    """
    if kind in ('gpt2', 'bpe'):
        yield from divide_at(EOT, pieces)
        return
    for text, is_last in pieces:
        if EOT in text:
            containers.note(f'the text holds {EOT}, which the {kind} tokenizer reads as {len(EOT)} characters; with '
                            '--tokenizer=gpt2 or bpe it is the end of a document')
        yield text, is_last


def divide_at(mark, pieces):
    """Yield pieces with documents divided at each `mark` in them, which is left out; it may cross two pieces."""
    hold, is_open = '', False
    for text, is_last in pieces:
        *complete, rest = (hold + text).split(mark)
        for part in complete:
            if part:
                yield from document(part)
            elif is_open:
                yield '', True
            is_open = False
        keep = 0 if is_last else min(len(rest), len(mark) - 1)
        sure, hold = rest[:len(rest) - keep], rest[len(rest) - keep:]
        if sure or is_open and is_last:
            yield sure, is_last
            is_open = not is_last
