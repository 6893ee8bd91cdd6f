"""What is made of the result beside the adapter: the merged model, GGUF for llama.cpp and Ollama, ONNX for Transformers.js.

Every form is asked the probes before anything is published (proof.py).
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune_api.probing import Probe
from finetune_api.spec import WHOLE_MODEL_METHODS
from finetune_api.status import ExportedForm
from finetune_api.versions import MERGED

from ..job.context import Context
from ..models.architecture import context_length, read_config
from ..models.fetch import local_path
from ..models.load import load_model
from ..models.stopping import load_served_tokenizer, stop_ids
from ..process.errors import InfrastructureError, UserError
from . import onnx_model, proof
from .gguf_adapter import check_adapter, write_adapter
from .gguf_model import convert, quantise
from .merging import load_tuned, merge
from .modelfile import LEAST_CONTEXT, modelfile
from .usage import shared_system_text

GGUF, ONNX = "gguf", "onnx"


def check_convertible(context: Context, folder: str, tokenizer: Any, adapter: Sequence[str]) -> None:
    """In prepare: raises UserError when the model or its adapter (names of its parameters) cannot be converted, before a GPU is taken."""
    output = context.spec.output
    if output.gguf_adapter:
        check_adapter(context.read_json(f"{folder}/config.json"), adapter)
    if output.gguf:
        modelfile(tokenizer, "model.gguf", stop_ids(context, tokenizer, folder))
    with tempfile.TemporaryDirectory() as scratch:
        if output.gguf:
            try:
                convert(Path(folder), Path(scratch, "vocabulary.gguf"), "--vocab-only")
            except InfrastructureError as failure:
                message = f"output.gguf: llama.cpp's converter refuses this model or its tokenizer: {failure.message}"
                raise UserError("NoGGUF", message) from None
        if output.onnx:
            try:
                onnx_model.can_build(folder, scratch)
            except InfrastructureError as failure:
                message = f"output.onnx: onnxruntime-genai's builder refuses this model: {failure.message.rstrip('.')}; remove output.onnx"
                raise UserError("NoONNX", message) from None


def export(context: Context, bundle: Path) -> list[ExportedForm]:
    """Write what `output` asks for into the bundle; what is told of each form. Raises UserError for a form that is not what was tuned."""
    scratch = Path(context.layout.job, "forms")
    shutil.rmtree(scratch, ignore_errors=True)  # of a try that was killed
    scratch.mkdir()
    try:
        return _Export(context, bundle, scratch).made()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Export:
    """One export: what all forms share."""

    def __init__(self, context: Context, bundle: Path, scratch: Path) -> None:
        self.context, self.bundle, self.scratch = context, bundle, scratch
        self.output, self.folder = context.spec.output, local_path(context)
        self.adapter = context.spec.tuning.method not in WHOLE_MODEL_METHODS
        self.reward = context.spec.tuning.objective == "reward"
        self.tokenizer = load_served_tokenizer(context, self.folder)
        self.exam = proof.Exam([], [])
        self.told: list[ExportedForm] = []

    def made(self) -> list[ExportedForm]:
        """All forms, in the bundle."""
        whole = self.scratch / MERGED
        if self.adapter:
            self._merge(whole)
        else:
            self._ask_whole_models()
            shutil.copytree(self.context.layout.output, whole, ignore=shutil.ignore_patterns("*.bin", "checkpoint-*"))
        if self.output.gguf_adapter:
            self._gguf_adapter()
        if self.output.gguf:
            self._gguf(whole)
        if self.output.onnx:
            made = onnx_model.build(whole, self.bundle / ONNX, list(self.output.onnx), self.tokenizer)
            for files in made.values():
                self._prove("onnx", files, proof.ask_form("onnx", files[0], self.exam.questions))
        if self.output.merged and self.adapter:
            shutil.move(whole, self.bundle / MERGED)
        return self.told

    def _prove(self, field: str, files: Sequence[Path], said: proof.Said, name: str = "") -> None:
        told = name or str(files[0].relative_to(self.bundle))
        self.told.append(proof.prove(field, told, files, self.exam, said))

    def _merge(self, whole: Path) -> None:
        """Probes first: the adapter is gone from a model that it was merged into."""
        model = load_tuned(self.context, self.folder)
        if not self.reward:
            self.exam = proof.make_exam(proof.read_probes(self.context) or self._probes_of(model), model, self.tokenizer)
        if self.output.merged or self.output.gguf or self.output.onnx:
            merged = merge(self.context, model, self.folder, whole)
            if self.output.merged:
                self._prove("merged", sorted(whole.iterdir()), proof.ask_model(merged, self.exam.questions), MERGED)
            del merged
        del model
        gc.collect()

    def _probes_of(self, model: Any) -> list[Probe]:
        tuned = self._answered(model)
        with model.disable_adapter():
            return proof.make_probes(self.tokenizer, tuned, proof.ask_model(model, list(tuned)))

    def _ask_whole_models(self) -> None:
        """One after the other: memory for two of them is not there."""
        if self.reward:
            return
        probes = proof.read_probes(self.context)
        model = load_model(self.context, self.context.layout.output, dtype=torch.float32)
        tuned = {} if probes else self._answered(model)
        greedy = proof.make_exam(probes, model, self.tokenizer).greedy if probes else list(tuned)
        del model
        gc.collect()
        if not probes:
            base = load_model(self.context, self.folder, dtype=torch.float32)
            probes = proof.make_probes(self.tokenizer, tuned, proof.ask_model(base, list(tuned)))
        self.exam = proof.Exam(probes, greedy)

    def _answered(self, model: Any) -> proof.Said:
        """What the tuned model answers to rows of the job."""
        prompts = proof.prompts_of(self.context)
        return proof.ask_model(model, [(prompt, proof.answer_greedily(model, self.tokenizer, prompt)) for prompt in prompts])

    def _gguf_adapter(self) -> None:
        """The adapter as GGUF is asked on its base in F16, which is not kept."""
        file, base = self._gguf_folder() / "adapter.gguf", self.scratch / "base.gguf"
        write_adapter(Path(self.context.layout.output), self.context.read_json(f"{self.folder}/config.json"), file)
        convert(Path(self.folder), base)
        self._prove("ggufAdapter", [file], proof.ask_form("gguf", base, self.exam.questions, file))
        base.unlink()

    def _gguf(self, whole: Path) -> None:
        folder, kinds = self._gguf_folder(), self.output.gguf
        half = folder / "model-F16.gguf" if "F16" in kinds else self.scratch / "model-F16.gguf"
        convert(whole, half)
        for kind in kinds:
            file = folder / f"model-{kind}.gguf"
            if kind != "F16":
                quantise(half, file, kind)
            self._prove("gguf", [file], proof.ask_form("gguf", file, self.exam.questions))
        (folder / "Modelfile").write_text(self._modelfile(f"model-{kinds[0]}.gguf"))

    def _modelfile(self, file: str) -> str:
        context, generation = self.context, Path(self.folder, "generation_config.json")
        most = context_length(read_config(self.folder, context.spec.model.uri, trust=context.spec.model.trust_remote_code))
        wanted = max(LEAST_CONTEXT, context.spec.tuning.hyperparameters.max_length)
        return modelfile(
            self.tokenizer,
            file,
            stop_ids(context, self.tokenizer, self.folder),
            system=shared_system_text(context.read_json(context.layout.data_report)),
            sampling=json.loads(generation.read_text()) if generation.exists() else {},
            context=wanted if most is None else min(wanted, most),
        )

    def _gguf_folder(self) -> Path:
        folder = self.bundle / GGUF
        folder.mkdir(exist_ok=True)
        return folder
