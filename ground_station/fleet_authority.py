"""The fleet's certificate authority: what `fleet init` makes, certificates for requests of boards, the revocation list.

EC P-256 throughout. Certificates begin in the past, since a board without a clock that survives power cuts may believe it is
yesterday. The revocation list ends with the authority: it is read where it is written, so an old one is no risk, while one that
has run out would shut every node out. Leaves out: who may have a certificate (enrol_server.py), and the records (fleet_records.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import ipaddress
import logging
import os
import ssl
import time
from collections.abc import Iterable

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ground_station import fleet_records
from ground_station.enrol_request import Request
from ground_station.fleet_records import FleetFolder, FleetFolderError, NodeRecord
from node_agent import enrolment

log = logging.getLogger("spacemoe.fleet")
DAY_S = 86_400
CA_DAYS, GROUND_DAYS = 3652, 397
BACKDATE_DAYS, NODE_BACKDATE_DAYS = 30, 1
GROUND_DUE_DAYS = 60
"""The ground station's certificate is replaced when fewer days are left."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def found(folder: FleetFolder) -> None:
    """Makes every key and certificate of a new fleet folder, inside its lock.  Raises: OSError."""
    import zmq

    now_utc_s = time.time()
    ca_key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"{folder.info.fleet} fleet authority", folder.info.fleet)
    certificate = (
        _begun(name, name, ca_key.public_key(), now_utc_s - BACKDATE_DAYS * DAY_S, now_utc_s + CA_DAYS * DAY_S)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    signing = ed25519.Ed25519PrivateKey.generate()
    folder.store(fleet_records.CA_KEY, _key_pem(ca_key))
    folder.store(fleet_records.CA_CERT, _pem(certificate))
    folder.store(fleet_records.CURVE_KEY, zmq.curve_keypair()[1] + b"\n")
    folder.store(fleet_records.SIGNING_KEY, _key_pem(signing))
    public = signing.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    folder.store(fleet_records.SIGNING_PUBLIC, f"{public.hex()}\n".encode())
    write_revocations(folder)
    renew_ground(folder)


def certificate_of(folder: FleetFolder, name: str) -> x509.Certificate:
    """A certificate of the folder.  Raises: FleetFolderError."""
    try:
        return x509.load_pem_x509_certificate(folder.read(name))
    except (ValueError, FileNotFoundError):
        raise FleetFolderError(f"{folder.path(name)} holds no certificate: restore it from a backup") from None


def renew_ground(folder: FleetFolder, hosts: Iterable[str] | None = None) -> x509.Certificate:
    """A new key and certificate for the ground station (CN = ground), also under other hosts.  Raises: FleetFolderError, OSError."""
    with folder.locked():
        if hosts is not None:
            folder.store_info(dataclasses.replace(folder.info, hosts=tuple(hosts)))
        ca, ca_key = _authority(folder)
        key = ec.generate_private_key(ec.SECP256R1())
        now_utc_s = time.time()
        names = [_general_name(host) for host in dict.fromkeys((*folder.info.hosts, *LOCAL_NAMES))]
        certificate = (
            _begun(
                _name(enrolment.GROUND, folder.info.fleet),
                ca.subject,
                key.public_key(),
                max(now_utc_s - BACKDATE_DAYS * DAY_S, ca.not_valid_before_utc.timestamp()),
                min(now_utc_s + GROUND_DAYS * DAY_S, ca.not_valid_after_utc.timestamp()),
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(_issuer_key(ca), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        folder.store(fleet_records.NEXT_GROUND_KEY, _key_pem(key))
        folder.store(fleet_records.GROUND_CERT, _pem(certificate))
        settle_ground(folder)
        return certificate


def settle_ground(folder: FleetFolder) -> None:
    """Lets the key that waits follow its certificate; leaves one alone whose certificate has not come. Needs no lock.

    Whoever reads between the two renames finds a pair that does not fit, and reads again.
    """
    key = folder.path(fleet_records.NEXT_GROUND_KEY)
    with contextlib.suppress(OSError):  # it does not fit (ssl.SSLError), or another process was quicker
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(folder.path(fleet_records.GROUND_CERT), key)
        os.replace(key, folder.path(fleet_records.GROUND_KEY))


def renew_ground_if_due(folder: FleetFolder, left_days: float = GROUND_DUE_DAYS) -> x509.Certificate | None:
    """The new certificate where the old one ends within `left_days`, begins in the future or lacks a host, else None.

    Raises: FleetFolderError, OSError.
    """
    with folder.locked():
        old = certificate_of(folder, fleet_records.GROUND_CERT)
        now_utc_s = time.time()
        due_utc_s = old.not_valid_after_utc.timestamp() - left_days * DAY_S
        # made while the clock was ahead; where the clock is before the authority itself, another would not be valid either
        born_utc_s = certificate_of(folder, fleet_records.CA_CERT).not_valid_before_utc.timestamp()
        early = born_utc_s <= now_utc_s < old.not_valid_before_utc.timestamp()
        return renew_ground(folder) if now_utc_s >= due_utc_s or early or not _fits(old, folder) else None


def refresh(folder: FleetFolder) -> list[str]:
    """What is due when a ground station starts, in words: a revocation that was cut short is carried out, a ground certificate
    near its end is replaced.  Raises: FleetFolderError, FleetBusyError, OSError."""
    with folder.locked():
        write_revocations(folder)
        made = renew_ground_if_due(folder)
    return [] if made is None else [f"new certificate of the ground station until {made.not_valid_after_utc:%Y-%m-%d}"]


def issue(folder: FleetFolder, request: Request) -> x509.Certificate:
    """Signs a certificate for TLS clients; the caller holds the lock and stores it.  Raises: FleetFolderError."""
    ca, ca_key = _authority(folder)
    now_utc_s = time.time()
    return (
        _begun(
            _name(request.node, folder.info.fleet),
            ca.subject,
            request.public_key,
            max(now_utc_s - NODE_BACKDATE_DAYS * DAY_S, ca.not_valid_before_utc.timestamp()),
            min(now_utc_s + folder.info.certificate_days * DAY_S, ca.not_valid_after_utc.timestamp()),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(enrolment.curve_urn(request.curve_public))]),
            critical=False,
        )
        .add_extension(_issuer_key(ca), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def stored_certificate(folder: FleetFolder, record: NodeRecord) -> x509.Certificate | None:
    """The node's current certificate as it was issued, where it is still there.  Raises: FleetFolderError."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        certificate = x509.load_pem_x509_certificate(folder.read(_certificate_file(record.id)))
        if serial_of(certificate) == record.serial:
            return certificate
    return None


def store_certificate(folder: FleetFolder, node: str, certificate: x509.Certificate) -> None:
    """Keeps what was issued, in case the answer gets lost. Inside the lock.  Raises: OSError."""
    folder.store(_certificate_file(node), _pem(certificate))


def serial_of(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def revoked_now(record: NodeRecord, *serials: str) -> tuple[str, ...]:
    """`record.revoked_serials` with further ones; empty ones do not count."""
    return tuple(dict.fromkeys((*record.revoked_serials, *filter(None, serials))))


def held_serials(record: NodeRecord) -> tuple[str, ...]:
    """The node's certificates whether or not they have run out, which a clock that is ahead could not tell."""
    return tuple(filter(None, (record.serial, record.previous_serial)))


def live_serials(record: NodeRecord, now_utc_s: float) -> tuple[str, ...]:
    """The node's certificates that have not run out."""
    ends = ((record.serial, record.not_after_utc_s), (record.previous_serial, record.previous_not_after_utc_s))
    return tuple(serial for serial, end_utc_s in ends if serial and end_utc_s > now_utc_s)


def write_revocations(folder: FleetFolder) -> int:
    """Writes the revocation list anew; how many serials it holds: what the records say, and what stood on it before.

    No serial ever goes off it: a clock that is ahead for a moment would let a stolen board in again when it is set right. A damaged
    record is logged and does not keep the others' revocations waiting.  Raises: FleetFolderError, FleetBusyError, OSError.
    """
    with folder.locked():
        ca, ca_key = _authority(folder)
        now_utc_s = time.time()
        listed, number = _known_revocations(folder)
        records, damaged = folder.scan()
        for error in damaged:
            log.error("%s", error)
        for record in records.values():
            listed |= {serial: listed.get(serial, now_utc_s) for serial in record.revoked_serials}
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(ca.subject)
            .last_update(_time(max(now_utc_s - NODE_BACKDATE_DAYS * DAY_S, ca.not_valid_before_utc.timestamp())))
            .next_update(ca.not_valid_after_utc)
            .add_extension(x509.CRLNumber(number + 1), critical=False)
            .add_extension(_issuer_key(ca), critical=False)
        )
        for serial, utc_s in listed.items():
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(_time(utc_s)).build()
            )
        signed = builder.sign(ca_key, hashes.SHA256())
        folder.store(fleet_records.CRL, signed.public_bytes(serialization.Encoding.PEM))
        return len(listed)


def _known_revocations(folder: FleetFolder) -> tuple[dict[str, float], int]:
    """When each serial of the present list was revoked, and the list's number."""
    try:
        crl = x509.load_pem_x509_crl(folder.read(fleet_records.CRL))
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        return {f"{each.serial_number:x}": each.revocation_date_utc.timestamp() for each in crl}, number
    except FileNotFoundError:
        return {}, 0  # the first one
    except (ValueError, x509.ExtensionNotFound) as error:
        if isinstance(error, FleetFolderError):
            raise
        # it is made of the records: nothing is lost but the dates, and the number must not fall back
        return {}, int(time.time())


def _authority(folder: FleetFolder) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = certificate_of(folder, fleet_records.CA_CERT)
    try:
        key = serialization.load_pem_private_key(folder.read(fleet_records.CA_KEY), None)
    except (ValueError, TypeError, UnsupportedAlgorithm, FileNotFoundError) as error:
        if isinstance(error, FleetFolderError):
            raise
        raise FleetFolderError(f"{folder.path(fleet_records.CA_KEY)} holds no key: restore it from a backup") from None
    if key.public_key() != certificate.public_key():
        raise FleetFolderError(
            f"{folder.path(fleet_records.CA_KEY)} and {fleet_records.CA_CERT} do not belong together: restore both"
        )
    return certificate, key


def _fits(certificate: x509.Certificate, folder: FleetFolder) -> bool:
    """Whether the ground certificate has every host, and the key beside it is its own."""
    try:
        names = set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        key = serialization.load_pem_private_key(folder.read(fleet_records.GROUND_KEY), None)
    except FleetFolderError:
        raise
    except (x509.ExtensionNotFound, ValueError, TypeError, UnsupportedAlgorithm, FileNotFoundError):
        return False
    return {_general_name(host) for host in folder.info.hosts} <= names and key.public_key() == certificate.public_key()


def _begun(subject, issuer, public_key, not_before_utc_s: float, not_after_utc_s: float) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(not_before_utc_s))
        .not_valid_after(_time(not_after_utc_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(common: str, fleet: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _key_usage(**allowed: bool) -> x509.KeyUsage:
    every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    every += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in every})


def _issuer_key(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _time(utc_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(utc_s), datetime.timezone.utc)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate_file(node: str) -> str:
    return f"{fleet_records.CERTIFICATES}/{fleet_records.check_node(node)}.pem"
