"""llama.cpp in this process, by its C interface (package xllamacpp has it whole, but no names for these parts of it in Python).

Only what a form is made and asked with: rows quantised, a model loaded, logits of given tokens. What llama.cpp refuses it may also
answer by ending the process: models are loaded in one of their own (asking.py).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

Rows = np.ndarray[Any, Any]
_Pointer = ctypes.c_void_p
_CONTEXT_DEFAULTS = (512, 2048, 512)
"""n_ctx, n_batch, n_ubatch: the first of llama_context_params, by which another llama.cpp is told."""


class _Settings(ctypes.Structure):
    """llama_model_params or llama_context_params: larger than either, since they are taken and given by value and never looked into further."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", _Pointer),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_int, _long, _size = ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_quantize_chunk": (_size, (_int, _Pointer, _Pointer, _long, _long, _long, _Pointer)),
    "ggml_row_size": (_size, (_int, _long)),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_Settings, ()),
    "llama_context_default_params": (_Settings, ()),
    "llama_model_load_from_file": (_Pointer, (ctypes.c_char_p, _Settings)),
    "llama_model_free": (None, (_Pointer,)),
    "llama_model_get_vocab": (_Pointer, (_Pointer,)),
    "llama_vocab_n_tokens": (_int, (_Pointer,)),
    "llama_init_from_model": (_Pointer, (_Pointer, _Settings)),
    "llama_free": (None, (_Pointer,)),
    "llama_set_n_threads": (None, (_Pointer, _int, _int)),
    "llama_get_memory": (_Pointer, (_Pointer,)),
    "llama_memory_clear": (None, (_Pointer, ctypes.c_bool)),
    "llama_batch_init": (_Batch, (_int, _int, _int)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (_int, (_Pointer, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_Pointer, _int)),
    "llama_adapter_lora_init": (_Pointer, (_Pointer, ctypes.c_char_p)),
    "llama_set_adapters_lora": (_int, (_Pointer, ctypes.POINTER(_Pointer), _size, ctypes.POINTER(ctypes.c_float))),
}


@functools.cache
def library() -> Any:
    """The shared library with the types of its functions."""
    found = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert found is not None and found.origin is not None
    loaded = ctypes.CDLL(found.origin)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def quantize_rows(rows: Rows, kind: int, into: Rows) -> None:
    """Quantise [rows, columns] in fp32 to ggml's type `kind`: `into` holds [rows, bytes of a row]. Other threads go on meanwhile."""
    count, columns = rows.shape
    assert rows.dtype == np.float32 and rows.flags.c_contiguous and into.flags.c_contiguous
    size = library().ggml_quantize_chunk(kind, rows.ctypes.data, into.ctypes.data, 0, count, columns, None)
    assert size == into.nbytes, "ggml writes as many bytes as it says beforehand"


def row_bytes(kind: int, columns: int) -> int:
    """Bytes of a row in ggml's type `kind`."""
    return int(library().ggml_row_size(kind, columns))


class LlamaModel:
    """A loaded GGUF model, for sequences of at most `length` tokens."""

    def __init__(self, model: int, context: int, length: int) -> None:
        self._context, self._library = context, library()
        self._vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(model))
        self._batch = self._library.llama_batch_init(length, 0, 1)

    def logits(self, tokens: list[int], since: int) -> Rows:
        """[len(tokens) - since, vocabulary]: the logits after each token from place `since` on."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        batch, found = self._batch, []
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.seq_id[place][0] = token, place, 1, 0
            batch.logits[place] = place >= since
        if (code := self._library.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama.cpp cannot compute {len(tokens)} tokens: llama_decode says {code}")
        for place in range(since, len(tokens)):
            row = self._library.llama_get_logits_ith(self._context, place)
            found.append(np.ctypeslib.as_array(row, (self._vocabulary,)).copy())
        return np.stack(found)


@contextmanager
def loaded(file: Path, length: int, threads: int, adapter: Path | None = None) -> Iterator[LlamaModel]:
    """A GGUF model, with a GGUF adapter on it where one is given. Raises RuntimeError where llama.cpp does not load one of them."""
    lib = library()
    lib.llama_backend_init()
    settings = lib.llama_context_default_params()
    if tuple(settings.words[:3]) != _CONTEXT_DEFAULTS:
        raise RuntimeError("this llama.cpp has other settings than the one that this was written for")
    settings.words[0] = settings.words[1] = length
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    context = lib.llama_init_from_model(model, settings) if model else None
    if not context:
        raise RuntimeError(f"llama.cpp does not load {file.name}")
    lib.llama_set_n_threads(context, threads, threads)
    if adapter is not None:
        lora = lib.llama_adapter_lora_init(model, str(adapter).encode())
        if not lora or lib.llama_set_adapters_lora(context, (_Pointer * 1)(lora), 1, (ctypes.c_float * 1)(1.0)) != 0:
            raise RuntimeError(f"llama.cpp does not load {adapter.name}")
    try:
        yield LlamaModel(model, context, length)
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)
