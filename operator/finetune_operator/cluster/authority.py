"""Who the operator and the replicas of endpoints believe: two certificate authorities, kept in a Secret of the operator's namespace.

One signs what the operator shows to replicas, the other what replicas show to the operator. Each endpoint's Secret, which its namespace
can read, has a key of its own, the certificate for it, and the first authority's certificate: with it one can play that endpoint's
replica, and nobody else. Knows nothing of what is asked.
"""

from __future__ import annotations

import base64
import hashlib
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..settings import Settings
from .errors import APIError
from .transport import Cluster

_LIFETIME, _RENEW_BEFORE = timedelta(days=3650), timedelta(days=1000)
_REPLICA_LIFETIME, REPLICA_PERIOD = timedelta(days=800), timedelta(days=365)
"""A replica's certificate is replaced, and its pods with it, so long after the one before."""
_CLIENT_LIFETIME = timedelta(days=30)
_CLIENTS, _REPLICAS = "clients", "replicas"


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, as PEM texts."""

    certificate: str
    key: str


@dataclass(frozen=True)
class Authority:
    """Both authorities."""

    clients: Signed
    replicas: Signed

    def replica(self, uid: str, now: datetime) -> dict[str, str]:
        """Files of an endpoint's Secret: what its replicas show, and whose word they take."""
        made = _issue(self.replicas, "finetune-replica", ExtendedKeyUsageOID.SERVER_AUTH, now, _REPLICA_LIFETIME, host_of(uid))
        return {"tls.crt": made.certificate, "tls.key": made.key, "ca.crt": self.clients.certificate}

    def digest(self) -> str:
        """Another one where either authority is."""
        return hashlib.sha256((self.clients.certificate + self.replicas.certificate).encode()).hexdigest()[:8]

    def client_context(self, now: datetime) -> ssl.SSLContext:
        """For asking replicas: `server_hostname` is host_of() of their endpoint. Good for some weeks."""
        made = _issue(self.clients, "finetune-operator", ExtendedKeyUsageOID.CLIENT_AUTH, now, _CLIENT_LIFETIME)
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=self.replicas.certificate)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        with tempfile.TemporaryDirectory() as folder:  # ssl reads keys from files only
            pem = Path(folder, "tls.pem")
            pem.touch(mode=0o600)
            pem.write_text(made.key + made.certificate)
            context.load_cert_chain(pem)
        return context


def host_of(uid: str) -> str:
    """The name that the replicas of the endpoint of that UID show; no DNS has it."""
    return f"{uid}.endpoints.finetune.dev"


def new_authority(now: datetime) -> Authority:
    """Both, made anew."""
    return Authority(*(_self_signed(f"finetune-{role}", now) for role in (_CLIENTS, _REPLICAS)))


async def ensure_authority(cluster: Cluster, settings: Settings) -> Authority:
    """Those in the chart's Secret, made when there are none, renewed when they end within some years. Raises APIError.

    Several operators may look at once: the write is conditional, and who loses takes the winner's. Without a Secret, new ones.
    """
    while True:
        now = datetime.now(UTC)
        if not settings.serving_authority_secret:
            return new_authority(now)
        found = await cluster.get("Secret", settings.namespace, settings.serving_authority_secret)
        data = {name: base64.b64decode(text).decode(errors="replace") for name, text in (found.get("data") or {}).items()}
        known = Authority(*(Signed(data.get(f"{role}.crt", ""), data.get(f"{role}.key", "")) for role in (_CLIENTS, _REPLICAS)))
        if _lasts(known.clients, now) and _lasts(known.replicas, now):
            return known
        made = new_authority(now)
        texts = dict[str, str]()
        for role, signed in ((_CLIENTS, made.clients), (_REPLICAS, made.replicas)):
            texts |= {f"{role}.crt": signed.certificate, f"{role}.key": signed.key}
        found["data"] = {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
        try:
            await cluster.replace({"apiVersion": "v1", "kind": "Secret", **found})
        except APIError as failure:
            if not failure.conflict:
                raise
            continue
        return made


def _lasts(signed: Signed, now: datetime) -> bool:
    try:
        serialization.load_pem_private_key(signed.key.encode(), None)
        return x509.load_pem_x509_certificate(signed.certificate.encode()).not_valid_after_utc - now > _RENEW_BEFORE
    except (ValueError, TypeError):
        return False


def _builder(subject: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, lasts: timedelta) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + lasts)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _self_signed(name: str, now: datetime) -> Signed:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key(), now, _LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
    return _signed(builder.sign(key, hashes.SHA256()), key)


def _issue(by: Signed, name: str, usage: x509.ObjectIdentifier, now: datetime, lasts: timedelta, host: str = "") -> Signed:
    authority = x509.load_pem_x509_certificate(by.certificate.encode())
    signer = serialization.load_pem_private_key(by.key.encode(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, authority.subject, key.public_key(), now, lasts)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
    builder = builder.add_extension(x509.KeyUsage(True, False, False, False, False, False, False, False, False), critical=True)
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    if host:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    return _signed(builder.sign(signer, hashes.SHA256()), key)


def _signed(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Signed:
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Signed(certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode())
