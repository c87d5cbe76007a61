"""Mutated inputs of every kind but slides give a result or one line.

`benchmarks/mutated_inputs.py` reads thousands of them.
"""

from collections import Counter

import pytest

from tests.faults.intact_inputs import write_inputs
from tests.faults.judge import LINE, WHOLE, Judge, judge_message
from tests.faults.mutated_inputs import make_mutant
from tests.faults.mutated_runs import judge_mutants

COUNT, SEED = 150, 0
# Intact, but weights of another network than a ResNet-50.
REFUSED = {"encoder_foreign", "encoder_torch", "encoder_old_torch"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def judge():
    judge = Judge()
    yield judge
    judge.close()


@pytest.mark.timeout(300)
def test_mutated_files_give_a_result_or_one_line(tmp_path, inputs, judge):
    judged = judge_mutants(inputs, tmp_path, COUNT, SEED, [judge])
    bad = [(one.name, one.seed, one.done, one.verdict) for one in judged if not one.verdict.is_good]
    assert bad == []
    outcomes = Counter(one.verdict.outcome for one in judged)
    # Neither are all refused, nor does mutating do nothing.
    assert outcomes[LINE] > COUNT // 3
    assert outcomes[WHOLE] > COUNT // 10
    assert {one.name for one in judged} == {intact.name for intact in inputs}


@pytest.mark.timeout(300)
def test_intact_files_are_read(inputs, judge):
    for intact in inputs:
        path = intact.folder / intact.path if intact.path else intact.folder
        verdict = judge(intact.reader, path, [])
        assert verdict.outcome == (LINE if intact.name in REFUSED else WHOLE), verdict
        assert verdict.gib < 0.2


def test_the_judge_notices_tracebacks_dead_processes_and_memory(tmp_path, judge):
    missing = judge("head", tmp_path / "none.safetensors", [])
    assert (missing.outcome, "none.safetensors" in missing.text) == (LINE, True)
    assert judge("no such reader", tmp_path, []).outcome == "traceback KeyError"
    assert judge("a reader that dies", tmp_path, []).outcome == "process ended: SIGKILL"
    greedy = judge("a reader that takes 1.5 GiB", tmp_path, [])
    assert greedy.outcome == "1.5 GiB"


def test_a_message_is_one_line_that_names_the_file():
    assert judge_message("a/b.h5: not a file", ["b.h5"])[0] == LINE
    assert judge_message("not a file", ["b.h5"])[0] == "message without the file's name"
    assert judge_message("b.h5: a\nb", ["b.h5"])[0] == "message of several lines"
    assert judge_message("b.h5: \x1b[31m", ["b.h5"])[0] == "message of several lines"
    assert judge_message("b.h5: " + "x" * 3000, ["b.h5"])[0] == "message without end"


def test_a_seed_is_a_mutation(tmp_path, inputs):
    made = [make_mutant(inputs[0], tmp_path / str(n), seed) for n, seed in enumerate((7, 7, 8, 9))]
    contents = [path.read_bytes() for path, _ in made]
    assert (contents[0], made[0][1]) == (contents[1], made[1][1])
    assert len(set(contents)) > 1
