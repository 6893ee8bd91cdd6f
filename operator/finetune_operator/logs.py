"""The operator's log: lines for people, or JSON with the job's name as a field (chart value logFormat).

Knows nothing of who writes to it.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time

JOB: contextvars.ContextVar[str] = contextvars.ContextVar("job", default="")
"""namespace/name of the job that this task works on."""


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if job := JOB.get():
            line["job"] = job
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def configure(level: str, form: str) -> None:
    """Write to stderr. Raises ValueError for a level or format that is none."""
    if form not in ("text", "json"):
        raise ValueError(f"FINETUNE_LOG_FORMAT={form!r}: write text or json")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
