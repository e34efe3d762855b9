"""Encodings of text: whether the beginning of a file is in the one that was asked for, and which it is otherwise."""
import codecs
import re

from configurator import UserError

_CONTROL = bytes({*range(32)} - {*b'\t\n\v\f\r\x1a\x1b'})  # bytes that text files almost never contain
# characters that most texts consist of
_USUAL = re.compile('[\t\r\n -~\xa0-\u04ff\u2010-\u2040\u3000-\u303f\u3041-\u30ff\u4e00-\u9fff\uff00-\uff5e]')
_USUAL_HERE = re.compile('[\uac00-\ud7a3\U0001f300-\U0001faff]')  # Korean, emoji
# what encodings contain that write everything in ASCII, which is valid UTF-8 and would be read as other characters
ISO_2022 = re.compile('\x1b\\$[@AB()*+]')
ISO_2022_KINDS = ('jp', 'kr', 'jp_2', 'jp_3', 'jp_2004', 'jp_ext')
SEVEN_BITS = {'hz': re.compile(r'~\{[!-~]+~\}'), 'utf-7': re.compile(r'\+[A-Za-z0-9+/]{2,}-?'),
              'unicode_escape': re.compile(r'\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}')}


def problems(name):
    """Return a list of error messages about the name of an encoding; empty if Python knows it."""
    try:
        ''.encode(name)
    except (LookupError, ValueError):
        return [f'encoding={name} is unknown; for Chinese text try gb18030']
    return []


def advice(error, codec):
    """Suggest what to do about bytes that do not decode as `codec`: a likely encoding, or "not text"."""
    data = error.object
    marks = {'utf-32': codecs.BOM_UTF32_LE, 'utf-16': (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    for name, mark in marks.items():
        if data.startswith(mark) and codecs.lookup(codec).name != name:
            return f'; its byte order mark says --encoding={name}'
    if error.reason in ('unexpected end of data', 'incomplete multibyte sequence', 'truncated data'):
        return ', where it ends within a character; is the file truncated?'
    if name := unmarked(data):
        return f'; try --encoding={name}'
    n_controls = len(data) - len(data.translate(None, _CONTROL))
    if b'\0' in data or 100 * n_controls > len(data):
        return ' and does not look like text; leave it out, or convert it to plain text'
    before = data[:error.start].decode('utf-8', 'ignore')
    # ten valid characters are no accident: text in another encoding rarely contains two that are valid UTF-8
    if codecs.lookup(codec).name == 'utf-8' and sum(not char.isascii() for char in before) > 10:
        return '; the text before it is UTF-8, so this byte is damaged: fix it there'
    guesses = [f'--encoding={name} ({use})' for name, use in (('gb18030', 'Chinese'), ('cp1252', 'Western European'))
               if name != codec and _decoded(data, name)]
    if guesses:
        return f'; try {" or ".join(guesses)} and look at the preview, or save it as UTF-8'
    return '; save it as UTF-8'


def unmarked(data):
    """Return the name of the two- or four-byte encoding that `data` is in without a byte order mark, '' if in none."""
    data = data[:4096]
    for name, size in (('utf-32-le', 4), ('utf-32-be', 4), ('utf-16-le', 2), ('utf-16-be', 2)):
        text = data[:len(data) // size * size].decode(name, 'replace')
        if text and len(_USUAL.findall(text)) > 0.9 * len(text):
            return name
    return ''


def _decoded(data, codec):
    """Return the beginning of a text in `codec`, '' if it is none."""
    try:
        return codecs.getincrementaldecoder(codec)().decode(data)
    except ValueError:
        return ''


def _seven_bit(data):
    """Return the name of the encoding that writes this ASCII with other characters, '' if there is none."""
    ascii_text = data.decode('ascii')
    if ISO_2022.search(ascii_text):
        return next((name for end in ISO_2022_KINDS if _decoded(data, name := f'iso2022_{end}')), 'iso2022_jp')
    is_json = data.lstrip()[:1] in (b'{', b'[', b'"')  # which has its own escapes
    for name, mark in SEVEN_BITS.items():
        if not mark.search(ascii_text) or name == 'unicode_escape' and is_json:
            continue
        text = _decoded(data, name)
        others = ''.join(char for char in text if not char.isascii())
        least = 0.2 if name == 'unicode_escape' else 0.01  # programs contain escapes, too
        # by accident, the characters would come from everywhere in Unicode
        usual = len(_USUAL.findall(others) + _USUAL_HERE.findall(others)) > 0.9 * len(others)
        alike = usual or len({ord(char) >> 8 for char in others}) < 5
        if len(others) > least * len(text) and alike:
            return name
    return ''


def check(label, data, codec):
    """Raise UserError if the beginning of a file is in another encoding than `codec`, which would garble it."""
    name = codecs.lookup(codec).name
    if name.startswith('utf-8') or not data:
        if data.isascii() and (other := _seven_bit(data)):
            raise UserError(f'{label} looks like {other.upper()}, which writes other characters in ASCII; try '
                            f'--encoding={other}, or --encoding=ascii if it is meant as it stands')
        return
    try:
        text = codecs.getincrementaldecoder('utf-8')().decode(data)
    except UnicodeDecodeError:
        return
    if name.startswith(('utf-16', 'utf-32')) and '\0' not in text or sum(not char.isascii() for char in text) > 10:
        raise UserError(f'{label} is UTF-8, not {codec.upper()}; leave --encoding out, and if other files are '
                        f'{codec.upper()}, save those as UTF-8: all files of a text have one encoding')
