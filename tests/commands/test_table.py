"""The table of commands: all names in it can be imported, and its texts agree with settings."""

from dataclasses import is_dataclass

import pytest

from scellst_ray.commands.flags import flags_of
from scellst_ray.commands.table import COMMANDS, GROUPS, begins_others

NAMES = list(COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_every_target_is_there(name):
    command = COMMANDS[name]
    settings = command.load_settings()
    assert is_dataclass(settings)
    assert callable(command.load_work())
    assert settings.__doc__.splitlines()[0] == command.about


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_is_in_one_group_and_has_a_help(name):
    command = COMMANDS[name]
    flags = flags_of(command.load_settings())
    grouped = [*" ".join(command.groups.values()).split(), *command.hidden]
    assert sorted(grouped) == sorted(flags)
    for flag in flags.values():
        if flag.name not in command.hidden:
            assert flag.text.endswith("."), flag
            assert "Not used" not in flag.text


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_line_of_that_command(name):
    example = COMMANDS[name].example
    assert example.startswith(f"scellst-ray {name}")
    assert len(example) <= 76  # help is folded at 80, and indents it


def test_first_words_of_two():
    first = {name.split()[0] for name in NAMES if " " in name}
    assert all(begins_others(word) for word in first)
    assert set(GROUPS) == first - set(NAMES)
    assert not begins_others("extract")
