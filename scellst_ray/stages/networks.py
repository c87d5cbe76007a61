"""The stages that run networks: maps of a segmenter, embeddings of crops, the expression head.

They work on rows, like the other stages (stages/make.py). Letters of shapes: N nuclei, D length of
an embedding, H length of the hidden layer.
"""

import logging
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from scellst_ray.core import schemas
from scellst_ray.core.logs import log_fields
from scellst_ray.models.cellvit.checkpoint import load_cellvit
from scellst_ray.models.cellvit.inference import pack_maps, segment_tiles, tokens_of
from scellst_ray.models.device import Device
from scellst_ray.models.encoder.encoder import Encoder, embed_crops, load_encoder
from scellst_ray.models.encoder.weights_file import local_weights
from scellst_ray.models.mil.head import MilHead, load_head, stored_hidden
from scellst_ray.nuclei import hv_maps
from scellst_ray.stages.rows import Outcome, TileRow
from scellst_ray.stages.tiles import CellsSpec, guarded, todo

logger = logging.getLogger(__name__)


class Network:
    """Stage that runs the segmenting network on pixels; the result is its maps."""

    def __init__(self, spec: CellsSpec, device: Device) -> None:
        """Load the network."""
        assert spec.weights is not None
        torch.set_num_threads(spec.num_threads)
        self.spec, self.device = spec, device
        self.model = load_cellvit(local_weights(spec.weights))
        _check_digest(spec.weights, self.model.digest, spec.weights_digest)
        self.pack = _pack_on_cpu if device == "cpu" else pack_maps

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Add `maps`, uint32 [side, side]; for encoder tokens add float16 [side/16, side/16, D].

        Tiles share a batch. If the batch fails, each tile is tried alone, so that only the tile at
        fault fails.
        """
        waiting = todo(rows)
        outcome = Outcome()
        with guarded(outcome, "network"):
            self._run(waiting)
        if outcome.get("error") is None:
            for row in waiting:
                row["seconds_network"] = outcome["seconds_network"] / len(waiting)
            return rows
        for row in waiting:
            with guarded(row, "network"):
                self._run([row])
            end_process_if_broken(self.device, row)
        return rows

    def _run(self, rows: list[TileRow]) -> None:
        found = segment_tiles(
            self.model,
            [row["image"] for row in rows],
            self.spec.side_px,
            self.device,
            self.spec.precision,
            tokens=self.spec.encoder == "tokens",
            window_px=self.spec.window_px,
            pack=self.pack,
        )
        for row, (maps, tokens) in zip(rows, found, strict=True):
            row["maps"] = maps
            if tokens is not None:
                row["tokens"] = tokens


class Embed:
    """Stage that makes embeddings of crops, tokens or types, and then the head's hidden layer."""

    def __init__(self, spec: CellsSpec, device: Device) -> None:
        """Load the networks."""
        torch.set_num_threads(spec.num_threads)
        self.spec, self.device = spec, device
        self.encoder: Encoder | None = None
        if spec.needs_crops:
            self.encoder = load_encoder(local_weights(spec.encoder))
            _check_digest(spec.encoder, self.encoder.digest, spec.encoder_digest)
            self.encoder.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head: MilHead | None = None
        if spec.head_uri is not None:
            self.head = load_head(spec.head_uri, spec.head_digest)[0].to(device)

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Replace `crops`, or `tokens` and `boxes`, by vector columns of `cells`."""
        for row in todo(rows):
            with guarded(row, "embed"):
                if self.spec.encoder == "tokens":
                    embedding_ND = tokens_of(row.pop("tokens"), row.pop("boxes"))
                elif self.encoder is None:
                    embedding_ND = one_hot(row["cells"]["nucleus_type"], self.spec.type_names)
                else:
                    crops = row.pop("crops")
                    encoder = self._normalising(self.encoder, row["slide_id"])
                    embedding_ND = embed_crops(encoder, crops, self.device, self.spec.precision)
                row["cells"] = self._with_vectors(row["cells"], embedding_ND)
            end_process_if_broken(self.device, row)
        return rows

    def _normalising(self, encoder: Encoder, slide_id: str) -> Encoder:
        """Return the encoder with the colours of this slide, if `colours_from` is given.

        Raises:
            ValueError: the colours of this slide are not known.
        """
        if self.spec.colours is None:
            return encoder
        if slide_id not in self.spec.colours:
            message = (
                f"colours_from has no crops of slide {slide_id!r}: run `extract --crops` on that "
                "folder first, with this slide in its manifest"
            )
            raise ValueError(message)
        mean, std = self.spec.colours[slide_id]
        return replace(encoder, mean=mean, std=std)

    def _with_vectors(self, cells: pa.Table, embedding_ND: NDArray[np.float16]) -> pa.Table:
        if self.spec.store_embeddings:
            field = schemas.vector("embedding", embedding_ND.shape[1])
            cells = cells.append_column(field, vectors(embedding_ND))
        if self.head is not None:
            with torch.inference_mode():
                x_ND = torch.from_numpy(embedding_ND).to(self.device)
                hidden_NH = stored_hidden(self.head.hidden(x_ND)).cpu().numpy()
                distance_N = stored_distance(self.head, x_ND).cpu().numpy()
            field = schemas.vector("hidden", hidden_NH.shape[1])
            cells = cells.append_column(field, vectors(hidden_NH))
            cells = cells.append_column(schemas.DISTANCE, pa.array(distance_N))
        return cells


def _pack_on_cpu(
    binary_B2HW: Tensor, hv_B2HW: Tensor, types_BYHW: Tensor, window_px: int | None
) -> Tensor:
    """Return the same bits as `pack_maps` in a tenth of the time, by OpenCV on each tile."""
    binary, hv, types = (m.float().numpy() for m in (binary_B2HW, hv_B2HW, types_BYHW))
    tiles = zip(binary, hv, types, strict=True)
    packed = [hv_maps.pack_maps(b_2HW, hv_2HW, t_YHW, window_px) for b_2HW, hv_2HW, t_YHW in tiles]
    return torch.from_numpy(np.stack(packed).view(np.int32))


def _check_digest(weights: str, found: str, expected: str | None) -> None:
    """Refuse weights other than those with which the run was started.

    Raises:
        ValueError: the file has changed, or this node has another file under its name.
    """
    if expected is not None and found != expected:
        message = (
            f"{weights}: this node has {found}, and the run was started with {expected}; give "
            "every node the same file and start the run again"
        )
        raise ValueError(message)


def end_process_if_broken(device: Device, row: TileRow) -> None:
    """End this process if its GPU no longer works, so that Ray starts a new one.

    After an illegal access or a memory fault every later call on a CUDA context fails quickly. An
    actor that continued would turn the rest of the cohort into failures.
    """
    if device == "cpu" or row.get("error") is None:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        logger.critical(
            "slide %s, tile %s: the GPU stopped working (%s); ending this worker",
            row["slide_id"],
            row["tile_id"],
            row["error"],
            extra=log_fields(row["slide_id"], row["tile_id"], row["stage"]),
        )
        os._exit(1)


def one_hot(types: pa.ChunkedArray, names: tuple[str, ...]) -> NDArray[np.float16]:
    """Return type names as float16 [N, D], with a one in the column of the type.

    The sCellST paper compares its encoder with this input, which knows only a cell's type.

    Raises:
        ValueError: a type is not among the names.
    """
    number_N = pc.index_in(types, pa.array(names, pa.string()))
    if number_N.null_count:
        unknown = sorted(set(types.to_pylist()) - set(names))
        message = f"types {unknown} are none of the segmenter's: {', '.join(names)}"
        raise ValueError(message)
    return np.asarray(np.eye(len(names), dtype=np.float16)[number_N.to_numpy()])


def stored_distance(head: MilHead, x_ND: Tensor) -> Tensor:
    """Return the distances of cells from the training instances, float16 [N].

    A distance is the root mean square of standardised features (runs/domain_shift.py). A distance
    beyond float16, or one that is not finite, becomes the largest float16.
    """
    z_ND = (x_ND.float() - head.mean_D) / head.std_D
    most = torch.finfo(torch.float16).max
    distance_N = z_ND.square().mean(1).sqrt().nan_to_num(nan=most, posinf=most)
    return distance_N.clamp(max=most).half()


def vectors(values: np.ndarray) -> pa.FixedSizeListArray:
    """Return a float16 array [N, D] as an Arrow column, without copying."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), pa.float16())
    field = pa.field("item", pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(field, values.shape[1]))
