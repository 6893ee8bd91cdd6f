"""The bodies of requests and of errors, in OpenAI's form. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT, _FLAG = msgspec.json.Decoder(str), msgspec.json.Decoder(bool)
_ENCODE = msgspec.json.Encoder().encode


class Refusal(Exception):
    """A request that is not carried out: status, and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, code: str, kind: str = "invalid_request_error", param: str | None = None, **headers: str
    ) -> None:
        """`headers`: more headers of the answer, with _ for -."""
        super().__init__(message)
        self.status, self.message, self.code, self.kind, self.param = status, message, code, kind, param
        self.headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

    def body(self) -> bytes:
        """As the answer's body."""
        return _ENCODE({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})


class Body:
    """A request's body: the fields that matter are read, the others stay the bytes that they are."""

    __slots__ = ("_fields", "model", "stream")

    def __init__(self, raw: bytes) -> None:
        """Raises Refusal. Of a field that stands there twice the last counts, here and for the replica."""
        try:
            self._fields = _FIELDS.decode(raw)
        except RecursionError:
            raise Refusal(400, "the body is nested too deeply", code="invalid_json") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
            raise Refusal(400, f"the body is no JSON object: {failure}", code="invalid_json") from None
        try:
            self.model = _TEXT.decode(self._fields["model"])
        except KeyError:
            raise Refusal(400, "model is missing: name one that GET /v1/models lists", code="missing_model", param="model") from None
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise Refusal(400, "model is no text: name one that GET /v1/models lists", code="invalid_model", param="model") from None
        try:
            self.stream = "stream" in self._fields and bytes(self._fields["stream"]) != b"null" and _FLAG.decode(self._fields["stream"])
        except msgspec.MsgspecError:
            raise Refusal(400, "stream is neither true nor false", code="invalid_value", param="stream") from None

        if self._is_set("prompt_logprobs") or (self._is_set("echo") and self._is_set("logprobs")):
            # beside adapters it ends vLLM's engine, or is told wrongly (vllm-project/vllm#16668, #51594)
            told = "log-probabilities of the prompt are not served: leave out prompt_logprobs, and echo beside logprobs"
            raise Refusal(400, told, code="unsupported_parameter", param="prompt_logprobs" if "prompt_logprobs" in self._fields else "echo")

    def _is_set(self, field: str) -> bool:
        return bytes(self._fields.get(field, b"null")) not in (b"null", b"false")

    def named(self, model: str) -> bytes:
        """The body with another name of the model."""
        self._fields["model"] = msgspec.Raw(_ENCODE(model))
        return _ENCODE(self._fields)


def broken_stream(message: str) -> bytes:
    """The event that tells a stream's reader that no more comes, since the replica failed."""
    error: dict[str, Any] = {"message": message, "type": "server_error", "param": None, "code": "upstream_failed"}
    return b"\n\ndata: " + _ENCODE({"error": error}) + b"\n\n"
