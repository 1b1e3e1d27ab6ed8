"""How a board gets its certificate: keys that never leave it, a request, and an answer that is checked before it counts.

The first certificate costs the pack's one-time claim token; the next ones are asked for with the certificate that is still valid.
A key is on the disk before its certificate is asked for, so that a try that was cut short goes on with the same key. The token is
renamed to `<token>.used` when its certificate is there, and then overwritten and removed: a token under its own name is always
a fresh one, and a fresh one beside a valid certificate means a new identity.
The cryptography package is imported inside functions: an agent that has nothing to ask for does not load it.
Leaves out: HTTP and TLS (est_client.py), how two files change as one (key_pair.py), when to renew (renewal.py).
"""

from __future__ import annotations

import fcntl
import os
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator

from node_agent import curve_key, enrolment, est_client, key_pair, secret_file
from node_agent.config import Config
from node_agent.errors import CertificateError, ClockError, ConfigError, EnrolError, RefusedError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

RETRY_S = (2.0, 60.0)
REFUSED_RETRY_S = 60.0
MAX_AUTHORITIES = 16


@dataclass(frozen=True)
class Identity:
    """Who asks, whom, and where its files are."""

    node: str
    fleet: str
    host: str
    port: int
    ca: Path
    cert: Path
    key: Path
    curve_key: Path
    token: Path | None = None

    @property
    def used_token(self) -> Path | None:
        return self.token.with_name(self.token.name + ".used") if self.token else None


@dataclass(frozen=True)
class Certificate:
    """What is said of a certificate: no secret. `serial` in hex."""

    serial: str
    not_before_utc_s: float
    not_after_utc_s: float
    curve_public: str


def identity(config: Config) -> Identity:
    """The identity that a configuration names.  Raises: ConfigError where it has no [enrol]."""
    asked, broker = config.enrol, config.broker
    if asked is None or broker is None:
        raise ConfigError("the configuration has no [enrol]: this node's certificate is not got, but copied")
    return Identity(
        config.node.id,
        config.node.fleet,
        asked.host,
        asked.port,
        asked.ca,
        broker.cert,
        broker.key,
        config.link.secret_key_file,
        asked.token_file,
    )


# ---------------------------------------------------------------- what is there


def current(who: Identity, now_s: float | None = None) -> Certificate:
    """The certificate that this node has and may use.

    Raises: CertificateError saying why there is none, ClockError where only the clock speaks against it, ConfigError.
    """
    from cryptography import x509

    key_pair.settle(who.cert, who.key)
    if not who.curve_key.exists():
        raise CertificateError(f"there is no data-plane key {who.curve_key}")
    try:
        key = _load_key(who.key)
        cert = x509.load_pem_x509_certificate(secret_file.read(who.cert, enrolment.MAX_ANSWER_BYTES))
    except FileNotFoundError as error:
        raise CertificateError(f"there is no certificate yet ({Path(error.filename).name} is missing)") from None
    except (OSError, ValueError) as error:
        raise CertificateError(f"{who.cert} or {who.key} cannot be used ({_brief(error)})") from None
    return check(who, cert, key.public_key(), time.time() if now_s is None else now_s)


def check(who: Identity, cert: x509.Certificate, key: ec.EllipticCurvePublicKey, now_s: float) -> Certificate:
    """Says what is in a certificate, once it is ours, of our authority, for our keys, and valid at `now_s`.

    Raises: CertificateError, ClockError, ConfigError for an authority's file that cannot be used.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def want(good: object, text: str) -> None:
        if not good:
            raise CertificateError(f"a certificate {text}: it is not used")

    want(any(_issued_by(cert, authority, InvalidSignature) for authority in _authorities(who)), f"is not of {who.ca}")
    want(_is_of(cert, key), f"is of another key than {who.key.name}")
    public = curve_key.own_key(who.curve_key)[0].decode()
    try:
        subject = [(each.oid, each.value) for each in cert.subject]
        extensions = cert.extensions
        usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        uris = extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.UniformResourceIdentifier
        )
        constraints = [each.value for each in extensions if isinstance(each.value, x509.BasicConstraints)]
    except (ValueError, x509.ExtensionNotFound) as error:
        raise CertificateError(f"a certificate lacks an extension ({_brief(error)}): it is not used") from None
    for oid, name in ((NameOID.COMMON_NAME, who.node), (NameOID.ORGANIZATION_NAME, who.fleet)):
        given = [value for kind, value in subject if kind == oid]
        want(given == [name], f"names {str(given)[:120]} and not {name}")
    want(ExtendedKeyUsageOID.CLIENT_AUTH in usages, "is not for clients")
    want(not any(each.ca for each in constraints), "is an authority's")
    want(uris == [enrolment.curve_urn(public)], f"is not bound to the data-plane key {public}")
    begin_s, end_s = cert.not_valid_before_utc.timestamp(), cert.not_valid_after_utc.timestamp()
    if now_s < begin_s:
        raise ClockError(
            f"the certificate is valid from {est_client.clock_text(begin_s)} and this machine's clock says "
            f"{est_client.clock_text(now_s)}: set the clock"
        )
    want(now_s < end_s, f"has expired on {est_client.clock_text(end_s)}")
    return Certificate(f"{cert.serial_number:x}", begin_s, end_s, public)


def _authorities(who: Identity) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificates(secret_file.read(who.ca, enrolment.MAX_PACK_FILE_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"[enrol] ca {who.ca} cannot be used ({_brief(error)}): put the node's pack on the card again"
        ) from None
    return found[:MAX_AUTHORITIES]


def _issued_by(cert: x509.Certificate, authority: x509.Certificate, invalid: type[Exception]) -> bool:
    try:
        cert.verify_directly_issued_by(authority)
    except (ValueError, TypeError, invalid):
        return False
    return True


def _is_of(cert: x509.Certificate, key: ec.EllipticCurvePublicKey) -> bool:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return cert.public_key() == key
    except (ValueError, UnsupportedAlgorithm):  # a key of a kind that is not ours
        return False


def _brief(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:120]


# ---------------------------------------------------------------- keys and requests


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises: OSError, ValueError; no text of theirs holds the key."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    raw = secret_file.read(path, enrolment.MAX_REQUEST_BYTES)
    try:
        key = load_pem_private_key(raw, None)
    except Exception:  # its texts may quote what it was given
        raise ValueError(f"{path} holds no private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} holds no elliptic-curve key")
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others: chmod 600 {path}")
    return key


def own_key(path: Path, replace: bool = False) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in a file, made there when there is none; `replace`: also where it cannot be used.

    Raises: ConfigError, OSError.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        return _load_key(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if not replace:
            raise ConfigError(f"{_brief(error)}: mend or remove it") from None
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.parent.mkdir(parents=True, exist_ok=True)
    secret_file.write(path, key.private_bytes(*form))
    return key


def request(who: Identity, key: ec.EllipticCurvePrivateKey, curve_public: str) -> bytes:
    """PKCS #10 (DER): this node's name, and the URI of its data-plane key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    name = [x509.NameAttribute(NameOID.COMMON_NAME, who.node), x509.NameAttribute(NameOID.ORGANIZATION_NAME, who.fleet)]
    urn = x509.UniformResourceIdentifier(enrolment.curve_urn(curve_public))
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(name))
    builder = builder.add_extension(x509.SubjectAlternativeName([urn]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


# ---------------------------------------------------------------- the exchange


def _ask(
    who: Identity, path: str, key: ec.EllipticCurvePrivateKey, tls: object, login: tuple[str, str] | None
) -> tuple[bytes, Certificate]:
    """(PEM, what is in it), checked.  Raises: EnrolError, CertificateError, ConfigError."""
    from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

    public = curve_key.own_key(who.curve_key)[0].decode()
    answer = est_client.post(who.host, who.port, tls, path, request(who, key, public), login)
    try:
        found = pkcs7.load_der_pkcs7_certificates(answer)
    except Exception as error:  # a parser's error of whatever kind: the answer is a stranger's until it is checked
        raise CertificateError(f"the answer is no PKCS #7 with certificates ({type(error).__name__})") from None
    ours = [cert for cert in found if _is_of(cert, key.public_key())]
    if len(ours) != 1:
        raise CertificateError(
            f"the answer holds {len(ours)} certificates of this node's key, not one: nothing is stored"
        )
    made = check(who, ours[0], key.public_key(), time.time())
    return ours[0].public_bytes(Encoding.PEM), made


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time asks for this folder's certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def obtain(who: Identity) -> tuple[Certificate, bool]:
    """(certificate, whether it is new): the one that is there, or one for the claim token. One try.

    Raises: EnrolError, RefusedError, CertificateError, ConfigError where there is neither.
    """
    with _alone(who.key.parent):
        held = why = None
        try:
            held = current(who)
        except CertificateError as error:
            why = error
        fresh = who.token is not None and who.token.exists()
        if not fresh and held is not None:
            if who.used_token:
                secret_file.wipe(who.used_token)
            return held, False
        if not fresh and isinstance(why, ClockError):
            raise why
        token_file = who.token if fresh else who.used_token
        if token_file is None or not token_file.exists():
            raise ConfigError(
                f"{why}, and no claim token ({who.token or '[enrol] token_file'}): on the ground station, add node {who.node} "
                f"again, and put its new pack on the card"
            )
        return _claim(who, token_file, beside=held is not None), True


def _claim(who: Identity, token_file: Path, beside: bool) -> Certificate:
    """`beside`: a pair that works stays until the new one is there."""
    try:
        token = secret_file.read(token_file, enrolment.MAX_REQUEST_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not enrolment.TOKEN.fullmatch(token):
        raise ConfigError(f"{token_file} holds no claim token: put the node's pack on the card again")
    key = own_key(key_pair.next_key(who.key), replace=True) if beside else own_key(who.key)
    pem, made = _ask(who, enrolment.ENROL, key, est_client.context(who.ca), (who.node, token))
    os.replace(token_file, who.used_token)
    secret_file.sync_folder(who.used_token.parent)
    key_pair.store(who.cert, who.key, pem)
    secret_file.wipe(who.used_token)
    return made


def renew(who: Identity) -> Certificate:
    """A new key and its certificate, by the certificate that is still valid. One try; the next goes on with the same new key.

    Raises: EnrolError, RefusedError, CertificateError, ConfigError.
    """
    with _alone(who.key.parent):
        current(who)
        key = own_key(key_pair.next_key(who.key), replace=True)
        pem, made = _ask(who, enrolment.RENEW, key, est_client.context(who.ca, (who.cert, who.key)), None)
        key_pair.store(who.cert, who.key, pem)
        return made


def pause_s(failures: int, draw: float) -> float:
    """After so many failures in a row; `draw` 0-1 spreads a fleet that starts at one moment."""
    low_s, high_s = RETRY_S
    return min(high_s, low_s * 2 ** min(failures, 16)) * (0.5 + draw / 2)


def until_enrolled(
    who: Identity, once: bool, say: Callable[[str], None], wait: Callable[[float], object] = time.sleep
) -> tuple[Certificate, bool]:
    """Tries for ever, or once; `say` is told why a try failed.  Raises: ConfigError; with `once` also what `obtain` raises."""
    failures = 0
    while True:
        try:
            return obtain(who)
        except (EnrolError, CertificateError) as error:
            if once:
                raise
            refused = isinstance(error, RefusedError)
            delay_s = REFUSED_RETRY_S if refused else pause_s(failures, random.random())
            failures += 1
            say(f"{error}; trying again in {delay_s:.0f} s")
        wait(delay_s)
