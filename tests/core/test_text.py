import pytest

from scellst_ray.core.text import errors_in_one_line, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: b", "a: b"),
        ("a\n b\t\tc\r\n", "a b c"),
        ("a\x00\x1b[31m\ud800b", "a??[31m?b"),
        ("µm ü 日", "µm ü 日"),
        ("", ""),
    ],
)
def test_text_becomes_one_printable_line(text, line):
    assert one_line(text) == line
    assert len(one_line(text * 5000)) < 2000
    assert one_line(text).isprintable()


def test_errors_keep_their_words_in_one_line():
    @errors_in_one_line()
    def read(text):
        raise ValueError(text)

    for text in ("h.json: two\nlines", "h.json: plain"):
        with pytest.raises(ValueError, match=r"^h\.json: (two lines|plain)$"):
            read(text)


def test_other_errors_stay():
    with pytest.raises(KeyError, match="a"), errors_in_one_line():
        {}["a\nb"]
