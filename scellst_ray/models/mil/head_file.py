"""The file of a head: reading it, and the checks that every reader and the writer share.

A head comes from other machines and other software. Therefore a part that cannot be is refused with
a message that names the file. Unknown keys of the JSON objects are passed over, since releases may
add keys within a version of the format. Unknown tensors are refused, since they belong to another
network.

Letters of shapes: D embedding, K members of an ensemble (mostly 1), H hidden, G genes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays

from scellst_ray.core.text import errors_in_one_line

HEAD_FORMAT = "scellst_ray.mil_head"
HEAD_VERSION = 2
# Version 1 had one formula, Formula().
READ_VERSIONS = ("1", "2")
# Keys that the info of a stored head must have; further keys are kept.
INFO_KEYS = ("genes", "scaling", "embedding_dim", "encoder_digest", "training_slides", "metrics")
LOSSES = ("mse", "nb", "nb_total")
# Tensors whose values must be above 0: one divides embeddings, one multiplies expression.
POSITIVE = ("std_D", "gene_scale_G")
LARGEST = 1e300


@dataclass(frozen=True)
class Formula:
    """The computation of a head, from embeddings to expression; the defaults are ours.

    Attributes:
        negative_slope: Slope of the hidden layers' LeakyReLU below 0; 0 is ReLU.
        dropout: Share of hidden values dropped in training.
        beta: Sharpness of the last softplus, log(1 + exp(beta z)) / beta.
        loss: Loss of the training. 'mse': squared error of scaled log-normalised expression.
            'nb': negative binomial likelihood of counts, given by mean and inverse dispersion.
            'nb_total': the same, given by total count and logits (likelihood.py).
        ensemble: Number K of members: networks that share nothing but their inputs.
    """

    negative_slope: float = 0.0
    dropout: float = 0.0
    beta: float = 1.0
    loss: Literal["mse", "nb", "nb_total"] = "mse"
    ensemble: int = 1

    def __post_init__(self) -> None:
        """Refuse values of another type or outside of their range.

        Raises:
            ValueError: A value is out of range. The message names the field, its value and the
                range.
        """
        slope, dropout, beta = (
            value if _is_number(value) else np.nan
            for value in (self.negative_slope, self.dropout, self.beta)
        )
        allowed = {
            "negative_slope": (0 <= slope < 1, "a number from 0 to below 1"),
            "dropout": (0 <= dropout < 1, "a number from 0 to below 1"),
            "beta": (beta > 0, "a positive number"),
            "loss": (self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            "ensemble": (_is_count(self.ensemble), "at least 1"),
        }
        for name, (is_allowed, expected) in allowed.items():
            if not is_allowed:
                value = str(getattr(self, name))[:60]
                message = f"{name} is {value}, expected {expected}."
                raise ValueError(message)

    @property
    def counts(self) -> bool:
        """Whether the head is for counts: it then gives counts in a spot of size factor 1."""
        return self.loss != "mse"


@dataclass(frozen=True)
class HeadFile:
    """The checked content of a head's file.

    Attributes:
        tensors: All tensors by name, float32; FORMAT.md lists them.
        info: Info of the head (see INFO_KEYS).
        formula: Its computation.
    """

    tensors: dict[str, NDArray[np.float32]]
    info: dict[str, Any]
    formula: Formula


@errors_in_one_line()
def parse_head(data: bytes, source: str, sha256: str | None = None) -> HeadFile:
    """Return the checked content of a head's file.

    Args:
        data: Content of the file.
        source: Name of the file for messages.
        sha256: SHA-256 of the expected head in hex; None: any head.

    Raises:
        ValueError: The content is not the expected head, is no whole safetensors file, has another
            format or version, or describes a head that cannot be. The message names `source`.
    """
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        message = (
            f"{source}: it is not the head of this run: its SHA-256 is {found[:16]}..., and "
            f"identity.head in run.json is {sha256[:16]}... The file was replaced or damaged: put "
            "the run's own head back, or predict again into another folder"
        )
        raise ValueError(message)
    tensors, metadata = _parse_safetensors(data, source)
    form, version = metadata.get("format"), metadata.get("format_version")
    if form != HEAD_FORMAT or version not in READ_VERSIONS:
        message = (
            f"{source}: format {form!r} version {version!r}, expected {HEAD_FORMAT!r} version "
            f"{' or '.join(READ_VERSIONS)}. Give a head written by `scellst-ray train` of this "
            "version."
        )
        raise ValueError(message)
    stored_formula = _parse_object(metadata.get("formula", "{}"), "formula", source)
    known = {field.name for field in fields(Formula)}
    try:
        formula = Formula(**{k: v for k, v in stored_formula.items() if k in known})
    except ValueError as error:
        message = f"{source}: formula: {error} Give a head written by `scellst-ray train`."
        raise ValueError(message) from error
    info = _parse_object(metadata.get("info"), "info", source)
    check_head(tensors, info, formula, source)
    return HeadFile(tensors, info, formula)


def check_head(
    tensors: Mapping[str, NDArray[Any]], info: Mapping[str, Any], formula: Formula, source: str
) -> None:
    """Refuse a head whose parts do not fit each other, or whose numbers cannot be.

    Raises:
        ValueError: A part does not fit. The message names `source` and the part.
    """
    problem = (
        _info_problem(info, tensors, formula.ensemble)
        or _shape_problem(tensors, len(info["genes"]), formula)
        or _value_problem(tensors, formula)
    )
    if problem:
        message = f"{source}: {problem}"
        raise ValueError(message)


def _parse_safetensors(
    data: bytes, source: str
) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """Return tensors and metadata of a safetensors file with float32 tensors only."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        entries = {k: v for k, v in dict(header).items() if k != "__metadata__"}
        other = {k: v["dtype"] for k, v in entries.items() if v["dtype"] != "F32"}
        tensors = {} if other else parse_arrays(data)
        metadata = dict(header.get("__metadata__") or {})
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        message = (
            f"{source}: its {len(data)} bytes are not a whole safetensors file ({error}). "
            "Expected a head written by `scellst-ray train`: copy it again."
        )
        raise ValueError(message) from error
    if other:
        name = min(other)
        message = (
            f"{source}: tensor {name} has the type {other[name]}, expected F32. Give a head "
            "written by `scellst-ray train`."
        )
        raise ValueError(message)
    return tensors, metadata


def _parse_object(text: str | None, name: str, source: str) -> dict[str, Any]:
    """Return a JSON object of the header."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        value, reason = None, f" ({error})"
    else:
        reason = ""
    if not isinstance(value, dict):
        message = (
            f"{source}: {name} is {str(text)[:60]}{reason}, expected a JSON object. Give a head "
            "written by `scellst-ray train`."
        )
        raise ValueError(message)
    return value


def _info_problem(
    info: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], ensemble: int
) -> str | None:
    """Return what is wrong with the info, or None; `genes` is then a list of names."""
    missing = [key for key in INFO_KEYS if key not in info]
    if missing or "last.weight" not in tensors or "mean_D" not in tensors:
        return (
            f"it holds {sorted(tensors)} and info {sorted(info)}; info lacks {missing}. "
            f"Expected the tensors of a MIL head and info with {list(INFO_KEYS)}."
        )
    genes, dim, scaling = info["genes"], info["embedding_dim"], info["scaling"]
    genes_problem = _genes_problem(genes)
    if genes_problem:
        return genes_problem
    num_genes, num_features = (
        len(tensors[name]) if tensors[name].ndim else 0 for name in ("last.weight", "mean_D")
    )
    if (len(genes) * ensemble, dim) != (num_genes, num_features) or not _is_count(dim):
        return (
            f"info names {len(genes)} genes and embedding_dim "
            f"{dim}, but the tensors hold {num_genes / ensemble:g} genes and {num_features} "
            "features. Save the panel and the encoder that the head was trained with."
        )
    if not isinstance(scaling, dict):
        return f"scaling is {str(scaling)[:60]}, expected one number per gene for each slide."
    wrong = [slide for slide, scale in scaling.items() if not _is_scale(scale, len(genes))]
    if wrong:
        return (
            f"scaling of slides {wrong[:5]} does not have one positive number per gene "
            f"({len(genes)}). Save the scale that robust_scale returned for this panel."
        )
    return _text_problem(info)


def _genes_problem(genes: object) -> str | None:
    """Return why these are no list of distinct names, or None."""
    if not isinstance(genes, list) or not genes or not all(map(_is_name, genes)):
        odd = genes if not isinstance(genes, list) else [g for g in genes if not _is_name(g)]
        return f"genes holds {str(odd)[:80]}, expected a list of names. Train the head again."
    doubled = [gene for gene, count in Counter(genes).items() if count > 1]
    if not doubled:
        return None
    return (
        f"gene {doubled[0]} is twice in the panel ({len(doubled)} such genes), so its expression "
        "is not defined. Train the head with each gene once."
    )


def _text_problem(info: Mapping[str, Any]) -> str | None:
    """Return which further entry of the info has another type than its readers expect, or None."""
    domain = info.get("domain")
    limit = domain.get("limit") if isinstance(domain, dict) else None
    slides = info["training_slides"]
    sound = {
        "encoder_digest": (_is_name(info["encoder_digest"]), "a text"),
        "encoder": (_is_name(info.get("encoder", "?")), "a text"),
        "training_slides": (
            isinstance(slides, list) and all(map(_is_name, slides)),
            "a list of slide_ids",
        ),
        "cells": (isinstance(info.get("cells", {}), dict), "an object"),
        "supervision": (isinstance(info.get("supervision", {}), dict), "an object"),
        "domain": (domain is None or isinstance(domain, dict), "an object"),
        "domain.limit": (limit is None or (_is_number(limit) and limit >= 0), "a number or null"),
    }
    for name, (is_sound, expected) in sound.items():
        if not is_sound:
            value = limit if name == "domain.limit" else info.get(name)
            return f"{name} is {str(value)[:60]}, expected {expected}. Train the head again."
    return None


def _shape_problem(
    tensors: Mapping[str, NDArray[Any]], num_genes: int, formula: Formula
) -> str | None:
    """Return which tensor is missing, unknown or of another shape, or None."""
    members, dim = formula.ensemble, len(tensors["mean_D"])
    last = tensors["last.weight"]
    hidden_dim = last.shape[1] if last.ndim == 2 else 0
    rows = members * hidden_dim
    shapes: dict[str, tuple[int, ...]] = {"mean_D": (dim,), "std_D": (dim,)}
    for layer, width in (("layers.0", dim), ("layers.2", hidden_dim), ("layers.4", hidden_dim)):
        shapes |= {f"{layer}.weight": (rows, width), f"{layer}.bias": (rows,)}
    shapes["last.weight"] = (members * num_genes, hidden_dim or 1)
    shapes["last.bias"] = (members * num_genes,)
    if formula.counts:
        shapes |= {"gene_scale_G": (num_genes,), "log_dispersion": (members * num_genes,)}
    names = [*shapes, *(name for name in tensors if name not in shapes)]
    for name in names:
        found = None if name not in tensors else tuple(tensors[name].shape)
        if found != shapes.get(name):
            is_text = "missing" if found is None else str(list(found))
            expected = list(shapes[name]) if name in shapes else "no tensor of this name"
            return f"tensors do not fit a MIL head: {name} is {is_text}, expected {expected}."
    return None


def _value_problem(tensors: Mapping[str, NDArray[Any]], formula: Formula) -> str | None:
    """Return which tensor holds numbers that cannot be, or None."""
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            return (
                f"{name} holds NaN or infinity, so every expression would. Copy the head again, or "
                "train it again with a lower learning rate."
            )
        if name in POSITIVE and not (values > 0).all():
            return f"{name} holds {values.min():g}, expected numbers above 0. Train the head again."
    if formula.loss == "nb_total":
        with np.errstate(over="ignore"):
            if not np.isfinite(np.exp(tensors["log_dispersion"].astype(np.float32))).all():
                largest = float(tensors["log_dispersion"].max())
                return f"log_dispersion holds {largest:g}, expected less than 88. Train it again."
    return None


def _is_number(value: object) -> bool:
    """Return whether this is a number that a float can hold; NaN and infinity are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST < value < LARGEST


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and bool(value.strip())


def _is_scale(values: object, num_genes: int) -> bool:
    """Return whether these are positive numbers, one per gene."""
    if not isinstance(values, list) or len(values) != num_genes:
        return False
    return all(_is_number(value) and value > 0 for value in values)
