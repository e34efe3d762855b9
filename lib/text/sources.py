"""Where the tutorials' Chinese texts come from if neither --input nor data/NAME/input.txt gives one.

The texts are in the public domain, but not part of this repository. One address after the other is tried, and a
download is used only if its size and content are those of the text.
"""
import re
import sys
from dataclasses import dataclass

from configurator import UserError
from lib.machine.files import atomic_write
from lib.text.download import download, own_file
from lib.text.schema import parse_json

# The repository of the WHY42 tutorial, whose prepare.py scripts read a text next to them
TUTORIAL = [f'https://raw.githubusercontent.com/drriguz/nanoGPT/{branch}/data/NAME/input.txt'
            for branch in ('master', 'main')]


@dataclass
class Text:
    """A text of the tutorials.

    name: its folder under data/. title, page: what it is called and a page that has it, for the error message.
    holds: words that occur in it.
    least, most: its length in characters lies between them. n_chars: length of the tutorial's copy, 0 if unknown.
    other: the address of another edition, '' if there is none. extract: a function from that file to the text.
    remark: what is different about the other edition.
    """
    name: str
    title: str
    page: str
    holds: str
    least: int
    most: int
    n_chars: int = 0
    other: str = ''
    extract: object = str
    remark: str = ''

    def problem(self, content):
        """Return what shows that `content` is not this text, '' if it is."""
        if not self.least <= len(content) <= self.most:
            return f'{len(content):,} characters, expected {self.least:,} to {self.most:,}'
        return '' if self.holds in content else f'it does not contain {self.holds}'

    def fetch(self, folder):
        """Download the text into a data folder and return [its path]; UserError says how to provide it manually."""
        addresses = [address.replace('NAME', self.name) for address in TUTORIAL] + [self.other] * bool(self.other)
        reason = ''
        for address in addresses:
            path = folder / ('input.other.txt' if address == self.other else 'input.tutorial.txt')
            try:
                content = self._kept(path) or self._download(address, path)
            except UserError as error:
                reason = error.message.partition('; ')[0]
                continue
            if address == self.other:
                print(f'{self.title}: {self.remark}', file=sys.stderr)
            elif self.n_chars and len(content) != self.n_chars:
                print(f'warning: {self.title} has {len(content):,} characters, the tutorial\'s copy {self.n_chars:,}; '
                      'losses will differ', file=sys.stderr)
            return [str(path)]
        raise UserError(f'no text to read: {len(addresses)} addresses were tried ({reason}). {self.title} is in the '
                        f'public domain, for example at {self.page}. Save it in UTF-8 as {folder / "input.txt"}, or '
                        f'name your copy: python data/{self.name}/prepare.py --input=PATH')

    def _kept(self, path):
        """Return the text of an earlier download, '' if there is none.

        UserError if it was changed: downloading it again would overwrite somebody's work.
        """
        try:
            content = path.read_text(encoding='utf-8')
            wrong = self.problem(content)
        except FileNotFoundError:
            return ''
        except UnicodeDecodeError as error:
            wrong = str(error)
        if wrong:
            raise UserError(f'{path} is not {self.title} ({wrong}), remove it to download it again')
        return content

    def _download(self, address, path):
        print(f'downloading {address}', file=sys.stderr)
        raw = download(address, own_file(path.parent, address), tries=1)
        try:
            content = raw.read_text(encoding='utf-8-sig')
            if address == self.other:
                content = self.extract(content)
            wrong = self.problem(content)
        except (ValueError, KeyError, TypeError) as error:  # not UTF-8, or not laid out as `extract` expects
            wrong = str(error)
        finally:
            raw.unlink()
        if wrong:
            raise UserError(f'{address} is not {self.title}: {wrong}')
        with atomic_write(path) as temporary:
            temporary.write_text(content, encoding='utf-8', newline='')
        return content


def three_character_lines(content):
    """Return the Three Character Classic from the JSON of github.com/chinese-poetry, one line per three characters."""
    return '\n'.join(re.findall('[\u4e00-\u9fff]{3}', ''.join(parse_json(content)['paragraphs'])))


def gutenberg(content):
    """Return what is between the two lines with which Project Gutenberg begins and ends a book."""
    found = re.search(r'^\*\*\* ?START OF .*?\*\*\*$(.*?)^\*\*\* ?END OF ', content, re.S | re.M)
    if not found:
        raise ValueError('the marks of Project Gutenberg are missing')
    return found[1].strip() + '\n'


SANZIJING = Text(
    'sanzijing_char', '三字经', 'https://zh.wikisource.org/wiki/三字經', '人之初', 1_000, 2_500, n_chars=1_519,
    other='https://raw.githubusercontent.com/chinese-poetry/chinese-poetry/master/'
          '%E8%92%99%E5%AD%A6/sanzijing-traditional.simplified.json', extract=three_character_lines,
    remark='the edition of github.com/chinese-poetry, some characters of which differ from the tutorial\'s')
SHUIXU = Text(
    'shuixu_char', '水浒传', 'https://zh.wikisource.org/wiki/水滸傳', '宋江', 400_000, 1_300_000,
    other='https://www.gutenberg.org/cache/epub/23863/pg23863.txt', extract=gutenberg,
    remark='Project Gutenberg\'s edition has 70 chapters in traditional characters; the tutorial\'s has simplified '
           'characters and more chapters, so prompts and losses differ')
BOLUOJING = Text('boluojing_char', '大般若波罗蜜多经', 'https://cbetaonline.dila.edu.tw/zh/T0220', '般若',
                 4_000_000, 7_000_000)
SHUIXU_FULL = Text('shuixu_full', '水浒传 with its sequels', 'https://zh.wikisource.org/wiki/水滸傳', '宋江',
                   3_000_000, 8_000_000)
