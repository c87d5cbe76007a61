"""YAML is read in bounded time and memory, and its scalars stay text."""

import pytest
import yaml

from scellst_ray.commands.yaml_text import compose, explain, parse_list, scalar_text, split_words

LAUGHS = "a: &a [lol, lol]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    "text", ["007", "1e400", ".inf", "2020-02-45", "NO", "9" * 5000, "59:59", "0x1f"]
)
def test_a_scalar_stays_as_it_is_written(text):
    assert scalar_text(compose(text)) == text
    assert scalar_text(compose(f"'{text}'")) == text


def test_null_is_no_text():
    assert [scalar_text(compose(text)) for text in ("null", "~", "'null'")] == [None, None, "null"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "line 2: *a stands for another value; write the value itself"),
        ("a: &a [*a]", "line 1: *a stands for another value; write the value itself"),
        ("a: " + "[" * 100_000, "line 1: lists or keys within each other, deeper than 4"),
        ("a: " + "{b: " * 5000, "line 1: lists or keys within each other, deeper than 4"),
        ("a: 1\n---\na: 1\n", "line 2: expected a single document in the stream, but found"),
        ("a: 1\n\tb: 2\n", "line 2: "),
        ("a: \x00\n", "unacceptable character #x0000"),
    ],
)
def test_what_is_refused(text, reason):
    with pytest.raises(yaml.YAMLError) as refused:
        compose(text)
    assert explain(refused.value).startswith(reason)
    assert "\n" not in explain(refused.value)


def test_lists_in_a_word():
    assert parse_list('["a,b", "c"]') == ["a,b", "c"]
    assert parse_list("[a, 007, NO]") == ["a", "007", "NO"]
    assert parse_list("[]") == []
    assert split_words("a, b,,c,") == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["[a", "[a, [b]]", "[{a: b}]", "[a, null]", "[*a]", "[" * 9999])
def test_what_is_no_list(text):
    with pytest.raises(ValueError, match=r'expected A,B or \["A", "B"\]'):
        parse_list(text)


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_no_words_between_commas(text):
    with pytest.raises(ValueError, match="expected at least one value"):
        split_words(text)
