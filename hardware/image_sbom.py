"""The bill of materials of an image: Debian's packages and the agent's wheels, as CycloneDX 1.6 JSON.

Licences: of a wheel what its metadata says; of a Debian package the names in its machine-readable copyright file, where it has one
(they are names, not SPDX identifiers, and of all files in the source). Hashes are of the .deb and .whl files that were installed.
Leaves out: which file came from where (dpkg's own database is on the image), known weaknesses.

Source: CycloneDX 1.6 JSON schema; package URLs (purl) by the types deb and pypi.
"""

from __future__ import annotations

import re
import time
import uuid
from urllib.parse import quote

from hardware.image_bootstrap import SUITE, Bootstrap
from hardware.image_wheels import Wheel


def packages(status: str) -> list[dict[str, str]]:
    """Name, version, architecture and source of every installed package in dpkg's status file, by name."""
    found = []
    for stanza in status.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed") and "Package" in fields:
            source = fields.get("Source", fields["Package"]).split(" ")[0]
            found.append(
                {
                    "name": fields["Package"],
                    "version": fields["Version"],
                    "arch": fields["Architecture"],
                    "source": source,
                }
            )
    return sorted(found, key=lambda each: each["name"])


def document(
    title: str,
    kit_version: str,
    key: str,
    bootstrap: Bootstrap,
    status: str,
    licences: dict[str, str],
    wheels: tuple[Wheel, ...],
) -> dict:
    """The whole document; same inputs, same text."""
    parts = []
    for each in packages(status):
        name, version = each["name"], each["version"]
        part = {
            "type": "library",
            "bom-ref": f"deb:{name}",
            "name": name,
            "version": version,
            "purl": f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={each['arch']}&distro={SUITE}",
            "properties": [{"name": "debian:source", "value": each["source"]}],
        }
        if name in bootstrap.sha256:
            part["hashes"] = [{"alg": "SHA-256", "content": bootstrap.sha256[name]}]
        if name in licences:
            part["licenses"] = [{"license": {"name": licences[name]}}]
        parts.append(part)
    for wheel in wheels:
        part = {
            "type": "library",
            "bom-ref": f"pypi:{wheel.name}",
            "name": wheel.name,
            "version": wheel.version,
            "purl": f"pkg:pypi/{quote(wheel.name)}@{quote(wheel.version, safe='')}?file_name={quote(wheel.file)}",
            "hashes": [{"alg": "SHA-256", "content": wheel.sha256}],
        }
        if wheel.licence:
            part["licenses"] = [{"license": {"name": wheel.licence}}]
        parts.append(part)
    kit = {"type": "application", "bom-ref": "spacemoe-kit", "name": "spacemoe-kit", "version": kit_version}
    parts.append(
        kit | {"purl": f"pkg:pypi/spacemoe-kit@{kit_version}", "licenses": [{"license": {"id": "Apache-2.0"}}]}
    )
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'spacemoe:sbom:{key}')}",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(bootstrap.epoch_s)),
            "component": {"type": "operating-system", "bom-ref": "image", "name": title, "version": kit_version},
        },
        "components": parts,
    }
