"""The certificate of the operator's endpoints: made by the operator (or cert-manager), kept in a Secret, renewed while it runs.

Knows nothing of what is served with it.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import logging
import ssl
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..cluster.errors import APIError
from ..cluster.transport import KubernetesCluster
from ..settings import Settings

log = logging.getLogger("finetune.certificate")
_SECONDS_WHILE_MISSING = 2.0
_LIFETIME, _RENEW_BEFORE = timedelta(days=3650), timedelta(days=365)


@dataclass(frozen=True)
class Certificate:
    """PEM texts."""

    certificate: str
    key: str
    authorities: str = ""
    """What clients trust. The certificate is its own authority; beside a new one is the one before, until all have the new one."""

    def ssl_context(self) -> ssl.SSLContext:
        """Server side, TLS 1.2 or later."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load_into(context)
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Serve this one from the next connection on."""
        with tempfile.TemporaryDirectory() as folder:  # ssl reads keys from files only
            pem = Path(folder, "tls.pem")
            pem.touch(mode=0o600)
            pem.write_text(self.key + self.certificate)
            context.load_cert_chain(pem)

    @property
    def readable(self) -> bool:
        """Whether it is a certificate at all."""
        try:
            x509.load_pem_x509_certificate(self.certificate.encode())
        except ValueError:
            return False
        return True

    def fits(self, hosts: list[str], now: datetime) -> bool:
        """Whether it names the hosts and will not expire soon."""
        try:
            parsed = x509.load_pem_x509_certificate(self.certificate.encode())
            names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound):
            return False
        return parsed.not_valid_after_utc - now > _RENEW_BEFORE and set(hosts) <= set(names.get_values_for_type(x509.DNSName))


def generate(hosts: list[str], now: datetime) -> Certificate:
    """A new self-signed certificate for the hosts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(True, False, False, False, False, True, False, False, False), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Certificate(certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode())


def hosts_of(settings: Settings) -> list[str]:
    """Names that pods and the API server reach the endpoints by."""
    service, namespace = settings.service_name, settings.namespace
    return [f"{service}.{namespace}.svc", f"{service}.{namespace}.svc.cluster.local", "localhost"]


class CertificateMissing(Exception):
    """The Secret has no certificate to serve, and somebody else has to put one there."""


async def ensure(cluster: KubernetesCluster, settings: Settings) -> Certificate:
    """The certificate in the chart's Secret; made or renewed when needed. Without a Secret, a new one.

    Several operators may look at once: the write is conditional, and who loses takes the winner's. Raises CertificateMissing.
    """
    hosts, now = hosts_of(settings), datetime.now(UTC)
    if not settings.tls_secret:
        new = generate(hosts, now)
        return dataclasses.replace(new, authorities=new.certificate)
    while True:
        try:
            secret = await cluster.get("Secret", settings.namespace, settings.tls_secret)
        except APIError as failure:
            if not failure.not_found:
                raise
            who = "cert-manager makes it for the Certificate of that name" if settings.tls_managed else "the chart makes it"
            raise CertificateMissing(f"it is not there ({who})") from None
        data = {k: base64.b64decode(v).decode(errors="replace") for k, v in (secret.get("data") or {}).items()}
        known = Certificate(data.get("tls.crt", ""), data.get("tls.key", ""), data.get("ca.crt") or data.get("tls.crt", ""))
        if settings.tls_managed:
            if known.certificate and known.key:
                return known
            raise CertificateMissing("it has no tls.crt and tls.key yet (cert-manager's Certificate of that name says why)")
        if known.fits(hosts, now):
            return known
        new = generate(hosts, now)
        new = dataclasses.replace(new, authorities=new.certificate + (known.certificate if known.readable else ""))
        texts = {"tls.crt": new.certificate, "tls.key": new.key, "ca.crt": new.authorities}
        secret["data"] = {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
        try:
            await cluster.replace({"apiVersion": "v1", "kind": "Secret", **secret})
        except APIError as failure:
            if not failure.conflict:
                raise
            continue
        return new


AUTHORITIES_LIMIT = 64 * 1024
"""Bytes of an administrator's authorities: every job's ConfigMap has them."""


def read_authorities(path: str) -> str:
    """The certificates in a PEM file, and nothing else that stands there. Raises ValueError."""
    try:
        found = x509.load_pem_x509_certificates(Path(path).read_bytes())
    except (OSError, ValueError) as failure:
        raise ValueError(f"{path}: no PEM certificates can be read (chart value trainer.caBundle): {failure}") from None
    text = "".join(certificate.public_bytes(serialization.Encoding.PEM).decode() for certificate in found)
    if len(text) > AUTHORITIES_LIMIT:
        raise ValueError(
            f"{path}: {len(text) // 1024} KiB of certificates, and {AUTHORITIES_LIMIT // 1024} KiB are the limit (chart value "
            "trainer.caBundle): name your own authorities only, the public ones are trusted anyway"
        )
    return text


class Identity:
    """The certificate that is served now. It may come after the operator."""

    certificate: Certificate
    context: ssl.SSLContext

    def __init__(self, cluster: KubernetesCluster, settings: Settings) -> None:
        self._cluster, self._settings = cluster, settings
        self.waits_for = "the certificate is not looked at yet"
        """Why nothing can be served; empty when it can."""

    async def found(self) -> None:
        """Wait until there is one to serve."""
        while True:
            try:
                self.certificate = await ensure(self._cluster, self._settings)
                self.context = self.certificate.ssl_context()
            except (CertificateMissing, APIError, ssl.SSLError) as failure:
                waits_for = f"waiting for Secret {self._settings.namespace}/{self._settings.tls_secret}: {failure}"
                if waits_for != self.waits_for:
                    log.warning("%s", waits_for)
                self.waits_for = waits_for
                await asyncio.sleep(_SECONDS_WHILE_MISSING)
            else:
                self.waits_for = ""
                return

    async def keep(self, look: Callable[[Certificate], Awaitable[None]]) -> None:
        """Look at the Secret again and again, and let everybody trust what is there before it is served. Until cancelled."""
        while True:
            try:
                new = await ensure(self._cluster, self._settings) if self._settings.tls_secret else self.certificate
                await look(new)
                if new != self.certificate:
                    log.info("serving a new certificate")
                    new.load_into(self.context)
                    self.certificate = new
            except (CertificateMissing, APIError, ssl.SSLError) as failure:
                log.warning("Secret %s is looked at again later: %s", self._settings.tls_secret, failure)
            await asyncio.sleep(self._settings.certificate_seconds)
