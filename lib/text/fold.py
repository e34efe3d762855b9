"""From what a user types to what a model's vocabulary holds: character width and escapes such as \\n in a prompt.

A book in Chinese has '：' where a reader's keyboard has ':'. A character model knows only the characters of its book,
so the prompt follows the book, as long as there is no doubt what was meant.
"""
import re
import unicodedata

HALF = ''.join(map(chr, range(0x21, 0x7f)))  # the printable ASCII characters
FULL = ''.join(chr(ord(char) + 0xfee0) for char in HALF)  # the same in full width, U+FF01 to U+FF5E
TWIN = dict(zip(HALF + FULL, FULL + HALF))
CHINESE = '\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff'  # the characters that Chinese is written with
MARKS = ',:;?!()'  # punctuation that has the same meaning in both widths
# characters whose usual Chinese counterpart is not their full-width form
CHINESE_FORMS = dict(zip('."\'<>-$', '。“‘《》—￥', strict=True))
ESCAPES = {r'\n': '\n', r'\t': '\t', r'\r': '\r'}


def fold(text, chars):
    """Return (text, note): `text` in the character width of the vocabulary `chars`, and one line about the changes.

    A character that the vocabulary lacks is replaced by the same one in the other width if the vocabulary has that.
    If this turns a mark into full width, the text is one with full-width marks, so the other marks next to Chinese
    characters follow, even if the vocabulary has both forms. Spaces between Chinese characters are dropped if the
    vocabulary has none. A quotation mark (" or ') stays, because it may stand for an opening or a closing one.
    The note is '' if nothing was changed.
    """
    known, replaced = set(chars), {}

    def replace(char):
        replaced[char] = TWIN[char]
        return TWIN[char]

    folded = ''.join(replace(char) if char not in known and TWIN.get(char) in known and char not in '"\'' else char
                     for char in text)
    if any(twin in FULL for twin in replaced.values()):
        near = f'(?<=[{CHINESE}])[{re.escape(MARKS)}]|[{re.escape(MARKS)}](?=[{CHINESE}])'
        folded = re.sub(near, lambda m: replace(m[0]) if TWIN[m[0]] in known else m[0], folded)
    spaces = 0
    if ' ' not in known:
        folded, spaces = re.subn(f'(?<=[{CHINESE}]) +(?=[{CHINESE}])', '', folded)
    changes = [f"'{old}' became '{new}'" for old, new in replaced.items()]
    changes += ['spaces between Chinese characters were dropped'] * bool(spaces)
    if not changes:
        return text, ''
    return folded, f'prompt: {", ".join(changes)}, as in the training text; --fold=False keeps it as typed'


def unescape(text, chars):
    r"""Return `text` with \n, \t and \r replaced by the characters they stand for, unless `chars` has a backslash.

    A shell passes "\n" as two characters. A vocabulary without a backslash cannot mean those.
    """
    if '\\' in chars:
        return text
    return re.sub(r'\\[ntr]', lambda m: ESCAPES[m[0]], text)


def unknown_character(text, chars):
    """Return the first character of `text` that the vocabulary `chars` lacks, '' if it has all of them."""
    return next((char for char in text if char not in chars), '')


def similar_characters(char):
    """Return characters that are easily confused with `char`: full-width, normalised and Chinese forms."""
    full_width = chr(ord(char) + 0xFEE0) if '!' <= char <= '~' else '\u3000' if char == ' ' else ''
    found = [full_width, unicodedata.normalize('NFKC', char), CHINESE_FORMS.get(char, '')]
    found += [ascii for ascii, chinese in CHINESE_FORMS.items() if chinese == char]
    return [similar for similar in found if len(similar) == 1 and similar != char]
