"""Suspected secrets and personal data in a row: reported, never refused. A pattern is added as one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PATTERNS = {
    "privateKey": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "awsKey": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "githubToken": r"\bgh[pousr]_[A-Za-z0-9]{36}\b",
    "huggingFaceToken": r"\bhf_[A-Za-z0-9]{30,}\b",
    "apiKey": r"\bsk-[A-Za-z0-9_-]{20,}\b",
    "slackToken": r"\bxox[abprs]-[A-Za-z0-9-]{10,}\b",
    "jsonWebToken": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "password": r"(?i:\b(?:password|passwd|secret)\s*[:=]\s*[^\s,;]{8,64})",
    "email": r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,4}\b",
    "iban": r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
    "paymentCard": r"\b(?:[0-9][ -]?){13,18}[0-9]\b",
    "phone": r"(?<![\w.])\+[0-9]{1,3}[ .-]?(?:[0-9][ .-]?){7,11}[0-9]\b",
    "socialSecurityNumber": r"\b[0-9]{3}-[0-9]{2}-[0-9]{4}\b",
}
_ANY = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()))
_LIMIT = 100_000


def _luhn(text: str) -> bool:
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    return sum(d if i % 2 == 0 else (d * 2 - 9 if d > 4 else d * 2) for i, d in enumerate(digits)) % 10 == 0


def _iban(text: str) -> bool:
    packed = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in packed[4:] + packed[:4])) % 97 == 1


def findings(texts: Sequence[str]) -> tuple[str, ...]:
    """Kinds of suspected secrets and personal data in the texts; check digits are verified where there are some."""
    found = set()
    for text in texts:
        for match in _ANY.finditer(text[:_LIMIT]):
            kind = str(match.lastgroup)
            if (kind == "paymentCard" and not _luhn(match.group())) or (kind == "iban" and not _iban(match.group())):
                continue
            found.add(kind)
    return tuple(sorted(found))
