"""Whether an adapter may be loaded beside a base: looked at before any engine sees it. Starts no torch.

An engine takes an adapter with NaN, and from then on answers with nothing, whoever asks; tensors of layers that the base does not have
it leaves out in silence; and whose adapter it is, it does not look at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_api.serving import OrderedModel

from ..models.weights import ADAPTER, ADAPTER_CONFIG, not_finite, shapes, weight_files
from ..process.errors import UserError
from .storage import Refused

Shape = tuple[int, ...]
_TOKENIZER = "tokenizer.json"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")
_DTYPES = ("BF16", "F16", "F32")
_KEPT_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Of peft's ways to begin: those that leave the base as it is."""
_NOT_SERVED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside the adapter (modules_to_save)",
    "lora_bias": "biases (lora_bias)",
    "trainable_token_indices": "tokens of its own (trainable_token_indices)",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
"""Settings of peft's that the engine has no answer to. By its own words (vllm/lora/peft_helper.py), and those it does not read."""
_WHOLE = "publish output.merged and serve it as a whole model (base.uri: model://NAME), or train with tuning.method lora"


@dataclass(frozen=True)
class Base:
    """What a replica serves."""

    folder: Path
    fingerprint: str

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor's shape, from the headers of its files."""
        return shapes(self.folder, "the base")

    @cached_property
    def modules(self) -> set[str]:
        """Names of all modules, and of those that they are in."""
        found: set[str] = set()
        for name in self.shapes:
            parts = name.split(".")[:-1]
            found.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return found

    @cached_property
    def ends(self) -> dict[str, str]:
        """Modules by their names from the layer's number on: libraries differ in what stands before it."""
        return {end: name for name in self.modules if (end := _end(name))}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return _document(self.folder / "config.json")

    @cached_property
    def tokens(self) -> dict[str, int] | None:
        """Its vocabulary, where it lies in a tokenizer.json."""
        return _vocabulary(self.folder / _TOKENIZER)


def check_base(model: OrderedModel, base: Base) -> None:
    """Raise Refused where the version is known to be tuned from another base: before anything is fetched."""
    if model.base_fingerprint and model.base_fingerprint != base.fingerprint:
        raise Refused(
            f"{model.name} was tuned from a base with fingerprint {model.base_fingerprint}, this endpoint serves {base.fingerprint}: "
            "serve it by an endpoint whose spec.base is the base that its job named"
        )


def check_adapter(folder: Path, base: Base, most_rank: int) -> None:
    """Raise Refused, which names file, tensor and fix, for an adapter that must not reach the engine."""
    _check_settings(folder)
    try:
        found = shapes(folder, "the adapter", ADAPTER_CONFIG)
    except UserError as failure:
        raise Refused(failure.message) from None
    _check_dtypes(folder / ADAPTER)
    _check_tensors(found, base, most_rank, transposed=bool(_document(folder / ADAPTER_CONFIG).get("fan_in_fan_out")))
    if (tensor := not_finite(folder / ADAPTER)) is not None:
        raise Refused(
            f"{ADAPTER}: tensor {tensor} holds values that are no numbers (NaN or infinite), which would silence every model of the engine; "
            "train again with a smaller learning rate, or name another version"
        )
    _check_tokenizer(folder, base)


def check_whole_numbers(folder: Path, name: str) -> None:
    """Raise Refused for a whole model whose files are none, or hold values that are no numbers, to the last one. `name`: the version's."""
    try:
        shapes(folder, name)  # its headers can be read
        files = weight_files(folder, name)
    except UserError as failure:
        raise Refused(failure.message) from None
    for file in files:
        if (tensor := not_finite(file)) is not None:
            raise Refused(
                f"{file.name}: tensor {tensor} holds values that are no numbers (NaN or infinite), of which {name} would make nothing else; "
                "train again with a smaller learning rate, or name another version"
            )


def _check_settings(folder: Path) -> None:
    config = _document(folder / ADAPTER_CONFIG)
    if not config:
        raise Refused(f"{ADAPTER_CONFIG} is no JSON object: publish the version again")
    if config.get("peft_type") != "LORA":
        raise Refused(f"{ADAPTER_CONFIG}: peft_type {config.get('peft_type')!r} is not served, LORA is; {_WHOLE}")
    for key, name in _NOT_SERVED.items():
        if config.get(key):
            raise Refused(f"{ADAPTER_CONFIG}: {name} is not served; {_WHOLE}")
    if config.get("bias") not in (None, "none"):
        raise Refused(f"{ADAPTER_CONFIG}: bias {config['bias']!r} is not served, none is; {_WHOLE}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _KEPT_INITS:
        raise Refused(
            f"{ADAPTER_CONFIG}: init_lora_weights {init!r} changes the base when the adapter is loaded, which is not served; {_WHOLE}"
        )


def _check_dtypes(file: Path) -> None:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for name, tensor in header.items():
        if name != "__metadata__" and tensor["dtype"] not in _DTYPES:
            raise Refused(f"{ADAPTER}: tensor {name} is of dtype {tensor['dtype']}; save the adapter in one of {', '.join(_DTYPES)}")


def _check_tensors(found: dict[str, Shape], base: Base, most_rank: int, *, transposed: bool) -> None:
    sides: dict[str, dict[str, tuple[str, Shape, bool]]] = {}
    for name, shape in found.items():
        parsed = _TENSOR.fullmatch(name)
        if parsed is None or len(shape) != 2:
            raise Refused(f"{ADAPTER}: tensor {name} {list(shape)} is none of a LoRA adapter's; {_WHOLE}")
        sides.setdefault(parsed["module"], {})[parsed["side"]] = (name, shape, parsed["embedding"] is not None)
    if not sides:
        raise Refused(f"{ADAPTER} holds no tensor: publish the version again")
    for module, pair in sides.items():
        first = next(iter(pair.values()))[0]
        if len(pair) != 2:
            raise Refused(f"{ADAPTER}: tensor {first} stands without its {'B' if 'A' in pair else 'A'}: publish the version again")
        (name_a, a, embedding), (name_b, b, _) = pair["A"], pair["B"]
        if a[0] != b[1]:
            raise Refused(f"{ADAPTER}: tensors {name_a} {list(a)} and {name_b} {list(b)} do not fit together: publish the version again")
        if a[0] > most_rank:
            raise Refused(f"{ADAPTER}: tensor {name_a} has rank {a[0]}, this endpoint takes {most_rank}: raise its spec.maxLoraRank")
        _check_shape(module, name_a, (b[0], a[1]), base, turned=transposed or embedding)


def _check_shape(module: str, tensor: str, made: Shape, base: Base, *, turned: bool) -> None:
    """`made`: shape of what the pair multiplies to. `turned`: the base keeps its weight the other way around."""
    known = _module_in(module.removesuffix(".base_layer"), base)
    if known is None:
        raise Refused(
            f"{ADAPTER}: tensor {tensor} belongs to {module}, which the base does not have, so it was tuned from another one: "
            "serve it by an endpoint whose spec.base is the base that its job named"
        )
    weight = base.shapes.get(f"{known}.weight")
    if weight is None or len(weight) != 2 or base.config.get("quantization_config"):  # fused or packed: nothing to compare with
        return
    if made not in ((weight, weight[::-1]) if turned else (weight,)):
        raise Refused(
            f"{ADAPTER}: tensor {tensor} makes {list(made)} of {known}, which is {list(weight)} in the base, so it was tuned from another "
            "one: serve it by an endpoint whose spec.base is the base that its job named"
        )


def _module_in(module: str, base: Base) -> str | None:
    """The base's name of a module, None where it has none."""
    if module in base.modules:
        return module
    if module.rpartition(".")[2] == "lm_head" and base.config.get("tie_word_embeddings"):
        return next((name for name in base.modules if name.rpartition(".")[2] in ("embed_tokens", "wte")), None)
    return base.ends.get(_end(module) or "")


def _end(module: str) -> str | None:
    """A module's name from the one before its first number on."""
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if not first else ".".join(parts[first - 1 :])


def _check_tokenizer(folder: Path, base: Base) -> None:
    own = _vocabulary(folder / _TOKENIZER)
    if own is None or base.tokens is None or own == base.tokens:
        return
    fix = "the engine uses the base's: tune with the base's own tokenizer, or serve a whole model"
    if added := sorted(set(own) - set(base.tokens)):
        raise Refused(f"{_TOKENIZER}: {len(added)} tokens are not in the base's, for example {_shown(added)}; {fix}")
    other = sorted(token for token in base.tokens if own.get(token) != base.tokens[token])
    raise Refused(f"{_TOKENIZER}: {len(other)} tokens have other numbers than the base's, or none, for example {_shown(other)}; {fix}")


def _shown(tokens: Iterable[str]) -> str:
    return repr(next(iter(tokens)))[:40]


def _vocabulary(file: Path) -> dict[str, int] | None:
    from tokenizers import Tokenizer

    if not file.is_file():
        return None
    try:
        return dict(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
    except Exception as failure:  # tokenizers raises nothing more special
        raise Refused(f"{file.name} cannot be read ({str(failure)[:100]}): publish the version again") from None


def _document(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where it is none."""
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
