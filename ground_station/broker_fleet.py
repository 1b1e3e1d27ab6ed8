"""What a fleet's mosquitto is told: mutual TLS by the fleet's authority, its revocation list, and rights per node, denied by default.

The client's certificate is its user name (CN). Rights lie in a file of mosquitto's dynamic-security plugin, written anew from the
records at each start and changed by commands while the broker runs (broker_rights.py). Known limits of mosquitto 2.0.11: it checks
certificates only at the handshake, reads certificates and the list again at SIGHUP (with a new TLS context, so that an old session
ticket is worth nothing), and lets a disabled client in when its certificate is good; so the list, the rights and the kick go together.
`max_queued_bytes` holds per client id, and a node may take several; `memory_limit` is not set, since the broker stops answering the
plugin's commands under it.
Leaves out: the process (broker.py).
"""

from __future__ import annotations

import glob
import json
import os
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from node_agent.shard import atomic_file

if TYPE_CHECKING:
    import paho.mqtt.client as mqtt

    from ground_station.fleet_records import FleetFolder

PLUGIN = "mosquitto_dynamic_security.so"
PLUGIN_FOLDERS = ("/usr/lib/*", "/usr/lib", "/usr/local/lib", "/opt/homebrew/lib")
RIGHTS_FILE = "dynamic-security.json"
GROUND_NAME = "localhost"


def find_plugin() -> Path:
    """mosquitto's dynamic-security plugin.  Raises: BrokerError."""
    from ground_station.broker import BrokerError

    for folder in PLUGIN_FOLDERS:
        for found in sorted(glob.glob(f"{folder}/{PLUGIN}")):
            return Path(found)
    raise BrokerError(
        f"{PLUGIN} is not below /usr/lib: a fleet's broker needs mosquitto 2.0 or newer with that plugin "
        "(Debian: apt-get install mosquitto)"
    )


def prepare(fleet: FleetFolder, port: int, bind: str, folder: Path) -> str:
    """Writes the file of rights into `folder`; returns mosquitto's configuration.

    Raises: BrokerError, FleetFolderError, OSError.
    """
    from ground_station import broker_rights
    from ground_station.broker import BrokerError, common_config
    from ground_station.fleet_records import CA_CERT, CRL, GROUND_CERT, GROUND_KEY

    rights = folder / RIGHTS_FILE
    with atomic_file(rights) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(json.dumps(broker_rights.initial(fleet.info.fleet, fleet.scan()[0]), indent=1).encode())
    files = {
        "cafile": fleet.path(CA_CERT).resolve(),
        "certfile": fleet.path(GROUND_CERT).resolve(),
        "keyfile": fleet.path(GROUND_KEY).resolve(),
        "crlfile": fleet.path(CRL).resolve(),
    }
    for path in (*files.values(), folder):
        if "\n" in str(path) or str(path) != str(path).strip():
            raise BrokerError(f"{str(path)!r} cannot be written into mosquitto's configuration: move that folder")
    lines = [
        f"plugin {find_plugin()}",
        f"plugin_opt_config_file {rights}",
        f"listener {port} {bind}",
        "allow_anonymous false",
        *(f"{name} {path}" for name, path in files.items()),
        "require_certificate true",
        "use_identity_as_username true",
        "tls_version tlsv1.2",  # or newer
        *common_config(folder),
    ]
    return "\n".join(lines) + "\n"


def ground_files(fleet: FleetFolder) -> tuple[Path, Path, Path]:
    """(authority, certificate, key) of the ground station."""
    from ground_station.fleet_records import CA_CERT, GROUND_CERT, GROUND_KEY

    return fleet.path(CA_CERT), fleet.path(GROUND_CERT), fleet.path(GROUND_KEY)


class _GroundContext(ssl.SSLContext):
    """Asks whoever answers for the ground station's certificate, at whatever address it was dialled.

    `up --bind` takes any address of this machine, also one that is not in the certificate; `localhost` is always in it, and no
    other certificate of the fleet is one for servers.
    """

    def wrap_socket(self, sock: socket.socket, *args, server_hostname: str | None = None, **more) -> ssl.SSLSocket:
        return super().wrap_socket(sock, *args, server_hostname=GROUND_NAME, **more)


def client_context(ca: Path, cert: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer with the ground station of this authority.  Raises: OSError, ValueError."""
    context = _GroundContext(ssl.PROTOCOL_TLS_CLIENT)  # which asks for a certificate and checks its name
    context.load_verify_locations(str(ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(str(cert), str(key))
    return context


def use_certificates(client: mqtt.Client, ca: Path, cert: Path, key: Path) -> None:
    """Gives a client of paho its certificate, and each later connection the one that lies there then.  Raises: as above."""
    context = client_context(ca, cert, key)
    client.tls_set_context(context)

    def again(*_: object) -> None:
        try:
            context.load_cert_chain(str(cert), str(key))
        except (OSError, ValueError):
            pass  # being replaced, or damaged: the old one is valid as long as it is

    client.on_pre_connect = again
