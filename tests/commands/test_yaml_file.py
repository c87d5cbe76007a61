"""Files of settings: what they may hold, and what is refused in one line."""

import os

import pytest

from scellst_ray.commands import table
from scellst_ray.commands.flags import flags_of
from scellst_ray.commands.yaml_file import MAX_BYTES, read_settings

FLAGS = flags_of(table.COMMANDS["extract"].load_settings())


def read(folder, content):
    path = folder / "a.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_settings(str(path), FLAGS)


@pytest.mark.parametrize(
    ("text", "slides"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("[a, b]", ["a", "b"]),
        ("\n- a\n- b", ["a", "b"]),
        ("007", ["007"]),
        ("[007, 1e5, yes]", ["007", "1e5", "yes"]),
        ("'[\"a,b\", c]'", ["a,b", "c"]),
        ("[]", []),
        ("null", None),
    ],
)
def test_a_list_is_one_value_several_or_text(tmp_path, text, slides):
    assert read(tmp_path, f"slides: {text}\n") == {"slides": slides}


@pytest.mark.parametrize("text", ["yes", "on", "true", "True"])
def test_words_for_true(tmp_path, text):
    assert read(tmp_path, f"store-embeddings: {text}\n") == {"store_embeddings": "true"}


@pytest.mark.parametrize(
    ("encoding", "mark"), [("utf-8", b""), ("utf-8", b"\xef\xbb\xbf"), ("utf-16", b"")]
)
def test_encodings_of_editors(tmp_path, encoding, mark):
    content = mark + "out: läufe\n".encode(encoding)
    assert read(tmp_path, content) == {"out": "läufe"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("- a\n", "expected lines of `key: value`"),
        ("", "expected lines of `key: value`"),
        ("42", "expected lines of `key: value`"),
        ("a: [\n", "line 2: while parsing"),
        ("core_px: null\n", "core_px has no value"),
        ("cor_px: 3\n", "Did you mean 'core_px'?"),
        (f"{'x' * 500}: 3\n", "there is no key 'xxxxx"),
        (f"{'x' * 5000}: 3\n", "line 1: "),
        ("core_px: 100\ncore-px: 200\n", "line 2: core_px is given twice"),
        ("core_px: [1]\n", "line 1: core_px: expected one value"),
        ("out: {a: 1}\n", "line 1: out: expected one value"),
        ("slides: {a: 1}\n", "line 1: slides: expected a list of values"),
        ("slides: [a, null]\n", "line 1: slides: expected a list of values"),
        ("slides: [[a]]\n", "line 1: slides: expected a list of values"),
        ('slides: ""\n', "line 1: slides: expected at least one value"),
        ("? [a]\n: b\n", "line 1: a key is one word"),
        ("out: &a x\nmanifest: *a\n", "line 2: *a stands for another value"),
        (b"out: l\xe4ufe\n", "is no text in UTF-8 (byte 6)"),
        (b"#" * (MAX_BYTES + 1), "has more than 1,048,576 bytes"),
    ],
)
def test_what_is_refused(tmp_path, content, reason):
    with pytest.raises(ValueError, match=r"a\.yaml") as refused:
        read(tmp_path, content)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "is no file"), (".", "is no file"), ("b", "does not exist")):
        with pytest.raises(ValueError, match=reason):
            read_settings(str(tmp_path / name), FLAGS)
