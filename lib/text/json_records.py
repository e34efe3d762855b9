"""JSON in the shapes people use: one object per line, or one array of objects; anything else is refused by name.

Text that only looks like JSON at its first character is left to be read as text.
"""
import json
import re
from itertools import chain

from configurator import UserError
from lib.text.schema import parse_json

ENOUGH = 1 << 26  # characters of a first line to look at
LONGEST = 1 << 28  # characters of one object
_DECODER, _SPACE = json.JSONDecoder(), re.compile('[\ufeff\\s]*')


def beginning(stream):
    """Return (the beginning of a text with at least one line, the whole stream) of a stream of chunks."""
    start = []
    for chunk in stream:
        start.append(chunk)
        if '\n' in chunk.strip() or len(start) >= ENOUGH >> 20:
            break
    return ''.join(start), chain(start, stream)


def read(label, start, stream):
    """Return an iterator of (place, record) if the text is JSON, else None.

    label: the name of the file. start: its beginning. stream: its chunks from the beginning on. UserError for JSON in
    another shape.
    """
    lines = [line for line in start.split('\n', 100)[:100] if line.strip()]
    if not lines:
        return None
    named = '.json' in label.rpartition('/')[2]
    first = _value(lines[0])
    if type(first) is dict:
        return _lines(label, stream)
    if re.match(r'\ufeff?\s*\[\s*(\{\s*"|\]\s*$)', start) or named and type(first) is list and len(lines) == 1:
        if len(lines) > 1 and type(first) is list and type(_value(lines[1])) is list:
            raise UserError(f'{label}:1: expected one JSON object per line, found list')
        return _array(label, stream)
    if type(_value(lines[0].strip().rstrip(','))) is dict:
        raise UserError(f'{label}:1: a comma after a JSON object; expected one object per line and nothing else')
    if _begins_with_object(start, named):
        if '\n' not in start.strip():  # a line that is longer than the beginning, or damaged
            return _lines(label, stream)
        raise UserError(f'{label} is JSON, but not one object per line; convert it, for example: jq -c . FILE')
    others = [type(_value(line)) for line in lines[1:10]]
    if first is not None and named or type(first) is list and others and all(kind is list for kind in others):
        raise UserError(f'{label}:1: expected one JSON object per line, found {type(first).__name__}')
    if others[:-1] and all(kind is dict for kind in others[:-1]) and (named or len(others) > 2):
        raise UserError(f'{label}:1: not JSON, but the next lines are: is its beginning cut off? Remove the first line')
    if named and start.lstrip()[:1] in ('{', '['):
        raise UserError(f"{label} is JSON, but not one object per line; convert it, for example: jq -c '.[]' FILE")
    return None


def _begins_with_object(start, named):
    """True if a text begins with a JSON object of several lines, which a notebook is, or with most of a large one."""
    if not re.match(r'\s*\{\s*"(?:[^"\\\n]|\\.)*"\s*:', start.removeprefix('\ufeff')):
        return False
    try:
        _DECODER.raw_decode(start.removeprefix('\ufeff').lstrip())
        return True
    except RecursionError:
        return True
    except ValueError:
        return named or len(start) >= ENOUGH >> 7


def _value(line):
    """Return the value of a line of JSON, None if it is not JSON (or null)."""
    try:
        return parse_json(line.strip())  # of white space and U+001E, which begins each line of a JSON sequence
    except ValueError:
        return None


def _lines(label, stream):
    number, rest = 0, []
    for chunk in chain(stream, ['\n']):
        first, *others = chunk.split('\n')
        rest.append(first)
        if not others:
            continue
        for line in (''.join(rest), *others[:-1]):
            number += 1
            if not line.strip():
                continue
            try:
                record = parse_json(line.strip())
            except ValueError as error:
                reason = getattr(error, 'msg', error)
                raise UserError(f'{label}:{number}: not JSON ({reason}); expected one object per line') from None
            if not isinstance(record, dict):
                raise UserError(f'{label}:{number}: expected one JSON object per line, found {type(record).__name__}')
            yield f'{label}:{number}', record
        rest = [others[-1]]


class _Buffer:
    """A text that comes in chunks, of which only the part that is being parsed is in memory."""

    def __init__(self, stream):
        self.stream, self.text, self.at = stream, '', 0

    def more(self, least=1):
        """Append the next chunks, `least` characters or more; return whether there were any."""
        chunks, size = [], 0
        while size < least and (chunk := next(self.stream, '')):
            chunks.append(chunk)
            size += len(chunk)
        self.text, self.at = self.text[self.at:] + ''.join(chunks), 0
        return size > 0

    def next_character(self):
        """Return the next character that is not white space, '' at the end; it is not consumed."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at:self.at + 1]

    def value(self):
        """Consume and return the next JSON value; ValueError if there is none."""
        while True:
            size = len(self.text) - self.at
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
                return value
            except RecursionError:
                raise ValueError('it is nested too deeply') from None
            except ValueError:
                if size > LONGEST or not self.more(max(1, size)):  # doubled: a long value is not parsed often
                    raise


def _array(label, stream):
    """Yield the objects of a text that is one array."""
    buffer, number = _Buffer(stream), 0
    buffer.next_character()
    buffer.at += 1  # the bracket
    while (char := buffer.next_character()) != ']':
        try:
            if number:
                if char != ',':
                    raise ValueError(f'found {char!r}' if char else 'it is cut off')
                buffer.at += 1
            buffer.next_character()
            record = buffer.value()
        except ValueError as error:
            raise UserError(f'{label} is a JSON array with damage after object {number:,} '
                            f'({getattr(error, "msg", error)})') from None
        number += 1
        if not isinstance(record, dict):
            raise UserError(f'{label}: expected an array of JSON objects, found {type(record).__name__} in place '
                            f'{number:,}')
        yield f'{label}, object {number:,}', record
    buffer.at += 1
    if buffer.next_character():
        raise UserError(f'{label} is a JSON array with more text after its end')
