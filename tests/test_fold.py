"""lib/text/fold.py: a prompt in the character width of the book, and escapes in a shell."""
import pytest

from lib.text.fold import fold, unescape, unknown_character

BOOK = '武松道：“不要问，只管吃酒！”\n枣来。'  # full-width marks, no space


@pytest.mark.parametrize('typed, wanted', [
    ('武松道:“不要问,只管', '武松道：“不要问，只管'),
    ('吃酒!', '吃酒！'),
    ('枣 来', '枣来'), ('枣   来', '枣来'),
])
def test_a_prompt_in_half_width_becomes_the_books_full_width(typed, wanted):
    assert fold(typed, BOOK)[0] == wanted


def test_full_width_marks_become_half_width_for_a_book_that_has_only_those():
    assert fold('ROMEO：no，no！', "ROMEOno:,!\n")[0] == 'ROMEO:no,no!'


@pytest.mark.parametrize('typed', ['武松道：“不要问，', '武松', '', '\n'])
def test_a_prompt_that_the_vocabulary_holds_is_left_alone(typed):
    assert fold(typed, BOOK) == (typed, '')


def test_marks_of_which_the_book_has_both_widths_follow_only_beside_chinese_and_only_if_another_one_had_to():
    both = BOOK + ', '  # a few half-width commas, as Water Margin has
    assert fold('武松道:不要问,只管', both)[0] == '武松道：不要问，只管'
    assert fold('武松道：不要问,只管', both) == ('武松道：不要问,只管', '')
    assert fold('武松道:3,4', both + '34')[0] == '武松道：3,4'


def test_spaces_stay_where_the_book_has_spaces():
    assert fold('枣 来', BOOK + ' ') == ('枣 来', '')


@pytest.mark.parametrize('typed', ['武松道"不要', "武松道'不要"])
def test_a_straight_quotation_mark_is_ambiguous_and_stays(typed):
    assert fold(typed, BOOK + '＂＇') == (typed, '')


def test_a_character_without_a_twin_in_the_book_stays_for_the_error_message():
    assert fold('林冲;', BOOK) == ('林冲;', '')


def test_the_note_names_each_change_once_and_the_way_back():
    note = fold('武松道:不要问,只管,吃 酒', BOOK)[1]
    assert note == ("prompt: ':' became '：', ',' became '，', spaces between Chinese characters were dropped, "
                    'as in the training text; --fold=False keeps it as typed')


@pytest.mark.parametrize('typed, chars, wanted', [
    (r'a\nb', 'ab\n', 'a\nb'), (r'\t', 'ab', '\t'), (r'\r\n', 'ab', '\r\n'),
    (r'a\nb', 'ab\\', r'a\nb'),  # the vocabulary has a backslash, which may be meant
    (r'\q', 'ab', r'\q'),
])
def test_escapes_are_read_unless_the_vocabulary_has_a_backslash(typed, chars, wanted):
    assert unescape(typed, chars) == wanted


def test_a_stop_string_that_cannot_occur_is_found_by_its_first_unknown_character():
    assert unknown_character('道：x', BOOK) == 'x'
    assert unknown_character('道：', BOOK) == unknown_character('', BOOK) == ''


def test_the_two_long_prompts_of_the_tutorial_fit_water_margins_vocabulary():
    chars = set('武松道：“不要问，只管用瓢舀来吃酒。贩枣的客人那里买三五斤枣来一发算钱”竟抢先要下, \n')
    prompt = '武松道:“不要问,只管用瓢舀来吃酒。贩枣的客人那里,买三五斤枣 来,一发算钱。”竟抢先要下'
    folded, _ = fold(prompt, chars)
    assert set(folded) <= chars and '：“不要问，' in folded and ',' not in folded
    sutra = set('如是我闻：一时，佛在舍卫国祇树给孤独园与\n　')
    folded, _ = fold('如是我闻:一时,佛在舍卫国祇树给孤独园,与', sutra)
    assert folded == '如是我闻：一时，佛在舍卫国祇树给孤独园，与'
