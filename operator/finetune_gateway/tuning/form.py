"""A multipart upload as it comes: the file's bytes go through, small fields are kept. Does no I/O."""

from __future__ import annotations

from collections.abc import Iterator

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..bodies import Refusal

_FIELD_BYTES = 1024
_HEADER_BYTES = 8192
_FIELDS = 16


class UploadForm:
    """Takes the body in pieces, gives the file's bytes; `fields` and `filename` are whole once `ended` says so."""

    def __init__(self, content_type: str, *, file_field: str = "file") -> None:
        """Raises Refusal (400) where it is no multipart form."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise Refusal(400, "send multipart/form-data with a boundary", code="invalid_content_type")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.ended = False
        self._file_field = file_field
        self._chunks: list[bytes] = []
        self._name, self._headers, self._value = "", {}, bytearray()  # type: str, dict[bytes, bytes], bytearray
        self._header = self._header_value = b""
        self._parts = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header,
                "on_header_value": self._on_header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._all,
            },
        )

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The file's bytes in these. Raises Refusal (400)."""
        try:
            self._parser.write(data)
        except MultipartParseError as failure:
            raise Refusal(400, f"the form cannot be read: {failure}", code="invalid_form") from None
        chunks, self._chunks = self._chunks, []
        yield from chunks

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _FIELDS:
            raise Refusal(400, f"the form has more than {_FIELDS} parts", code="invalid_form")
        self._name, self._headers, self._value = "", {}, bytearray()

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._bounded(self._header)

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._bounded(self._header_value)

    def _bounded(self, header: bytes) -> None:
        if len(header) > _HEADER_BYTES:
            raise Refusal(400, "a header of the form is too long", code="invalid_form")

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._header_value
        self._header = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == self._file_field:
            if self.filename is not None:
                raise Refusal(400, f"{self._file_field} is there twice", code="invalid_form", param=self._file_field)
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif self._name in self.fields:
            raise Refusal(400, f"{self._name[:80]} is there twice", code="invalid_form", param=self._name[:80])

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file_field:
            self._chunks.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _FIELD_BYTES:
            raise Refusal(400, f"{self._name[:80]} is too long", code="invalid_value", param=self._name[:80])

    def _end(self) -> None:
        if self._name != self._file_field:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _all(self) -> None:
        self.ended = True
