"""A certificate authority for tests."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Authority:
    """Signs certificates for 127.0.0.1, and writes everything as PEM; keys for this user alone."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(self.key.public_key(), name, authority=True)
        self.ca = self._write(f"{name}-ca.pem", self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, subject: str, *, days: tuple[float, float] = (-1, 1), passphrase: str = "") -> tuple[str, str]:
        """(certificate, key), valid from and to so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), subject, authority=False, days=days)
        hide: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase:
            hide = serialization.BestAvailableEncryption(passphrase.encode())
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hide)
        return (
            self._write(f"{self.name}-{subject}.pem", certificate.public_bytes(serialization.Encoding.PEM)),
            self._write(f"{self.name}-{subject}.key", pem),
        )

    def _sign(
        self, public: Any, subject: str, *, authority: bool, days: tuple[float, float] = (-9, 9)
    ) -> x509.Certificate:
        def called(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = x509.CertificateBuilder().subject_name(called(subject)).issuer_name(called(self.name))
        builder = builder.public_key(public).serial_number(x509.random_serial_number())
        begin, end = (now + datetime.timedelta(days=count) for count in days)
        builder = builder.not_valid_before(begin).not_valid_after(end).add_extension(names, critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        return builder.sign(self.key, hashes.SHA256())

    def _write(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.write_bytes(data)
        path.chmod(0o600)
        return str(path)
