"""Files of heads that cannot be are refused by the readers with and without torch alike."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from scellst_ray.models.mil.head import MilHead, formula_of, head_from_bytes, head_to_bytes
from scellst_ray.models.mil.head_file import HEAD_FORMAT, Formula
from scellst_ray.models.mil.stored_head import read_last_layer
from tests.support.mil_heads import info_of

GENES = ["EPCAM", "CD3E", "ERBB2"]


@pytest.fixture(scope="module")
def parts():
    """Return tensors of a small head for counts with two members, as NumPy arrays."""
    torch.manual_seed(0)
    head = MilHead(4, 3, 5, formula_of("ours", "nb_total", 2))
    return {name: value.numpy() for name, value in head.state_dict().items()}


def file_of(tensors, info=None, formula='{"loss": "nb_total", "ensemble": 2}', **metadata):
    info = info if isinstance(info, str) else json.dumps(info or info_of(embedding_dim=4))
    metadata = {"format": HEAD_FORMAT, "format_version": "2", "info": info} | metadata
    return safetensors.numpy.save(tensors, metadata | {"formula": formula})


def answers(content, path):
    """Return what each reader says: the error, or None."""
    path.write_bytes(content)
    found = []
    for read in (lambda: head_from_bytes(content, str(path)), lambda: read_last_layer(str(path))):
        try:
            read()
        except ValueError as error:
            found.append(str(error))
        else:
            found.append(None)
    return found


def check_refused(content, path, words):
    with_torch, without = answers(content, path)
    assert with_torch == without
    assert with_torch is not None
    assert with_torch.startswith(str(path))
    assert words in with_torch
    assert "\n" not in with_torch


def test_keys_of_a_later_release_are_passed_over(parts, tmp_path):
    formula = '{"loss": "nb_total", "ensemble": 2, "new": {"a": [1]}}'
    info = info_of(embedding_dim=4, new=None)
    content = file_of(parts, info, formula, new="1")
    assert answers(content, tmp_path / "head") == [None, None]
    layer = read_last_layer(str(tmp_path / "head"))
    assert layer.formula == Formula(loss="nb_total", ensemble=2)
    assert layer.info["new"] is None


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("[]", "formula is [], expected a JSON object"),
        ("null", "formula is null"),
        ("{", "formula is { ("),
        ("[" * 100_000, "expected a JSON object"),
        ('{"beta": "x"}', "formula: beta is x, expected a positive number"),
        ('{"beta": NaN}', "formula: beta is nan"),
        ('{"beta": Infinity}', "formula: beta is inf"),
        ('{"dropout": null}', "formula: dropout is None"),
        ('{"negative_slope": true}', "formula: negative_slope is True"),
        ('{"ensemble": 1.5}', "formula: ensemble is 1.5, expected at least 1"),
        ('{"loss": ["mse"]}', "formula: loss is ['mse'], expected one of mse"),
    ],
)
def test_a_formula_that_cannot_be_is_refused(parts, tmp_path, formula, words):
    check_refused(file_of(parts, formula=formula), tmp_path / "head", words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"genes": ["A", "A", "B"]}, "gene A is twice in the panel"),
        ({"genes": [1, None, ["x"]]}, "genes holds [1, None, ['x']], expected a list of names"),
        ({"genes": ["A", " ", "B"]}, "genes holds [' ']"),
        ({"genes": ["A", "B", "\ud800"]}, "genes holds"),
        ({"genes": "ABC"}, "genes holds ABC"),
        ({"genes": []}, "genes holds []"),
        ({"scaling": None}, "scaling is None"),
        ({"scaling": {"C2": None}}, "scaling of slides ['C2']"),
        ({"scaling": {"C2": [1, 0, 1]}}, "scaling of slides ['C2'] does not have one positive"),
        ({"scaling": {"C2": [1, -2, 1]}}, "scaling of slides ['C2']"),
        ({"scaling": {"C2": [1, np.nan, 1]}}, "scaling of slides ['C2']"),
        ({"scaling": {"C2": [1, 10**400, 1]}}, "scaling of slides ['C2']"),
        ({"embedding_dim": 4.5}, "embedding_dim 4.5"),
        ({"embedding_dim": None}, "embedding_dim None"),
        ({"encoder_digest": None}, "encoder_digest is None, expected a text"),
        ({"encoder": 7}, "encoder is 7, expected a text"),
        ({"training_slides": None}, "training_slides is None"),
        ({"cells": []}, "cells is [], expected an object"),
        ({"domain": {"limit": "far"}}, "domain.limit is far, expected a number or null"),
        ({"supervision": None}, "supervision is None"),
    ],
)
def test_info_that_cannot_be_is_refused(parts, tmp_path, changes, words):
    info = info_of(embedding_dim=4, genes=GENES) | changes
    check_refused(file_of(parts, info), tmp_path / "head", words)


@pytest.mark.parametrize("info", ["null", "[]", "7", "", "{", "[" * 100_000, '"text"'])
def test_info_that_is_no_object_is_refused(parts, tmp_path, info):
    check_refused(file_of(parts, info), tmp_path / "head", "info is ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"last.weight": np.full((6, 5), np.nan, np.float32)}, "last.weight holds NaN"),
        ({"layers.2.bias": np.full(10, np.inf, np.float32)}, "layers.2.bias holds NaN or inf"),
        ({"mean_D": np.array([0, 0, np.nan, 0], np.float32)}, "mean_D holds NaN"),
        ({"std_D": np.array([1, 1, 0, 1], np.float32)}, "std_D holds 0, expected numbers above 0"),
        ({"gene_scale_G": np.array([1, -1, 1], np.float32)}, "gene_scale_G holds -1"),
        ({"log_dispersion": np.full(6, 200, np.float32)}, "log_dispersion holds 200"),
        ({"layers.0.weight": np.zeros((10, 9), np.float32)}, "layers.0.weight is [10, 9]"),
        ({"last.bias": np.zeros((6, 1), np.float32)}, "last.bias is [6, 1], expected [6]"),
        ({"last.weight": np.zeros(6, np.float32)}, "do not fit a MIL head"),
        ({"last.weight": np.zeros((6, 0), np.float32)}, "do not fit a MIL head"),
        ({"last.weight": np.zeros((), np.float32)}, "names 3 genes"),
        ({"new.weight": np.zeros(3, np.float32)}, "new.weight is [3], expected no tensor"),
        ({"last.bias": None}, "last.bias is missing"),
        ({"std_D": None}, "std_D is missing"),
        ({"mean_D": None}, "Expected the tensors of a MIL head"),
        ({"last.bias": np.zeros(6, np.float64)}, "last.bias has the type F64, expected F32"),
        ({"last.bias": np.zeros(6, np.float16)}, "last.bias has the type F16, expected F32"),
    ],
)
def test_tensors_that_cannot_be_are_refused(parts, tmp_path, changes, words):
    tensors = {k: v for k, v in (parts | changes).items() if v is not None}
    check_refused(file_of(tensors), tmp_path / "head", words)


def test_a_declared_giant_is_refused(tmp_path):
    for size in (1 << 62, 1 << 40, 50):
        content = size.to_bytes(8, "little") + b'{"__metadata__": {}}'
        check_refused(content, tmp_path / "head", "are not a whole safetensors file")
    entry = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    for header in (entry, {"a": 1}, {"a": {}}, [], None, {"__metadata__": 1}):
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text
        check_refused(content, tmp_path / "head", "are not a whole safetensors file")


def test_a_diverged_head_is_not_written():
    head = MilHead(20, 3)
    torch.nn.init.constant_(head.last.bias, torch.nan)
    with pytest.raises(ValueError, match=r"last\.bias holds NaN or infinity"):
        head_to_bytes(head, info_of())


def test_another_head_than_the_expected_one_is_refused(parts, tmp_path):
    content = file_of(parts)
    sha256 = hashlib.sha256(content).hexdigest()
    path = tmp_path / "head"
    path.write_bytes(content)
    assert read_last_layer(str(path), sha256).genes == GENES
    assert head_from_bytes(content, "head", sha256)[1]["genes"] == GENES
    flipped = bytearray(content)
    flipped[-1] ^= 0x40
    path.write_bytes(flipped)
    for read in (
        lambda: head_from_bytes(bytes(flipped), str(path), sha256),
        lambda: read_last_layer(str(path), sha256),
    ):
        with pytest.raises(ValueError, match="it is not the head of this run: its SHA-256"):
            read()
