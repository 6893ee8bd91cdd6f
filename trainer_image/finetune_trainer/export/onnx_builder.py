"""Make one ONNX file, in a process of its own: the builder keeps the weights that it has read in memory.

    python -m finetune_trainer.export.onnx_builder MODEL FOLDER KIND

MODEL is a folder of transformers', KIND `int8` or `q4`; FOLDER/onnx/model_KIND.onnx is written. With `check` as KIND nothing is but
a few settings: whether onnxruntime-genai's builder knows the model's architecture is all that is asked.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

PRECISIONS = {"int8": "int8", "q4": "int4"}
"""The builder's names of what Transformers.js calls a dtype."""
ONE_FILE = 2**31 - 2**20
"""Bytes of a file, at most: protobuf has no larger messages. What is more lies beside it."""


def main(model: str, folder: str, kind: str) -> None:
    """Build, and lay it out."""
    target = Path(folder)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        _build(model, scratch, PRECISIONS.get(kind, "int4"), dry=kind == "check")
        if kind != "check":
            lay_out(Path(scratch), target / "onnx", f"model_{kind}.onnx", ONE_FILE)


def _build(model: str, folder: str, precision: str, *, dry: bool) -> None:
    importlib.import_module("onnxruntime_genai.models")  # which lets its modules be imported under names of their own
    builder = importlib.import_module("builder")
    if dry:
        for kind in {
            builder.Model,
            *(kind for kind in vars(builder).values() if isinstance(kind, type) and issubclass(kind, builder.Model)),
        }:
            kind.make_model = kind.save_model = lambda *_: None
    with contextlib.redirect_stdout(sys.stderr):
        options = builder.parse_extra_options("", model, folder, precision, "cpu", f"{folder}/cache", ["hf_token=false"])
        builder.create_model("", model, folder, precision, "cpu", f"{folder}/cache", **options)


def lay_out(built: Path, folder: Path, name: str, one_file: int) -> None:
    """Move what was built to FOLDER/NAME: in one file, or beside FOLDER/NAME_data where it is larger than `one_file` bytes."""
    import onnx

    folder.mkdir(exist_ok=True)
    size = json.loads((built / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    graph, data = onnx.load(str(built / "model.onnx"), load_external_data=False), built / "model.onnx.data"
    for value in (*graph.graph.input, *graph.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "kv_cache_dim":  # Transformers.js makes the empty cache by it
                dimension.dim_value = size
    if data.exists() and (built / "model.onnx").stat().st_size + data.stat().st_size > one_file:
        for tensor in graph.graph.initializer:
            _relocate(tensor, f"{name}_data")
        shutil.move(data, folder / f"{name}_data")
    else:
        onnx.external_data_helper.load_external_data_for_model(graph, str(built))
    onnx.save(graph, str(folder / name))


def _relocate(tensor: Any, file: str) -> None:
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = file


if __name__ == "__main__":
    main(*sys.argv[1:])
