"""Which client of the fleet's broker may do what: rights by the records, kept by mosquitto's dynamic-security plugin.

The ground station may do all below the fleet's topics and change rights. An enrolled node publishes its own leaves and hears its
own commands; everybody else has no rights at all. A node that is cut off loses its role, is disabled and thereby disconnected;
mosquitto sends no last will then, so that `Rights` says for it that it is offline.
Leaves out: certificates and their revocation (broker_fleet.py), when it is done (allow_list.FleetWatch).
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import paho.mqtt.client as mqtt

from ground_station.broker_fleet import ground_files, use_certificates
from ground_station.fleet_records import FleetFolder, NodeRecord
from node_agent import enrolment, wire

log = logging.getLogger("spacemoe.fleet")

COMMANDS = "$CONTROL/dynamic-security/v1"
ANSWERS = f"{COMMANDS}/response"
CONNECT_S = 10.0
ANSWER_S = 10.0
KEEPALIVE_S = 10
COMMANDS_AT_ONCE = 64
MAX_ANSWER_BYTES = 64 * 1024 * 1024
GROUND_ROLE = "ground"
NODE_ROLE = "node-"
DENIED = {
    "publishClientSend": False,
    "publishClientReceive": False,
    "subscribe": False,
    "unsubscribe": False,
}

Command = dict[str, Any]


class RightsError(RuntimeError):
    """The broker's rights cannot be seen or set; the text names the next step."""


# ---------------------------------------------------------------- pure: who may do what


def _acl(kind: str, topic: str) -> dict[str, Any]:
    return {"acltype": kind, "topic": topic, "priority": 0, "allow": True}


def node_role(fleet: str, node: str) -> dict[str, Any]:
    """The rights of one node: what node_agent.control publishes and subscribes to, all of it its own but the ground's status."""
    topics = wire.Topics(fleet)
    own = (topics.birth, topics.status, topics.telemetry, topics.history, topics.clock, topics.event, topics.result)
    status, ground = topics.status(node), topics.ground_status()
    commands = topics.command(node, "#")
    return {
        "rolename": NODE_ROLE + node,
        "acls": [
            *(_acl("publishClientSend", topic(node)) for topic in own),
            *(_acl("publishClientReceive", topic) for topic in (commands, status, ground)),
            *(_acl("subscribeLiteral", topic) for topic in (status, ground)),
            _acl("subscribePattern", commands),
        ],
    }


def ground_role(fleet: str) -> dict[str, Any]:
    """All below the fleet's topics, and changing rights."""
    kinds = ("publishClientSend", "publishClientReceive", "subscribePattern", "unsubscribePattern")
    below = (f"{wire.TOPIC_ROOT}/{fleet}/#", "$CONTROL/dynamic-security/#")
    return {"rolename": GROUND_ROLE, "acls": [_acl(kind, topic) for topic in below for kind in kinds]}


def _client(name: str, role: str | None) -> dict[str, Any]:
    client: dict[str, Any] = {"username": name, "roles": [] if role is None else [{"rolename": role}]}
    return client if role is not None else client | {"disabled": True}


def initial(fleet: str, records: Mapping[str, NodeRecord]) -> dict[str, Any]:
    """The plugin's file for these records. No passwords: certificates say who somebody is."""
    enrolled = [name for name, record in records.items() if record.state == "enrolled"]
    return {
        "defaultACLAccess": DENIED,
        "clients": [
            _client(enrolment.GROUND, GROUND_ROLE),
            *(_client(name, NODE_ROLE + name if name in enrolled else None) for name in records),
        ],
        "groups": [],
        "roles": [ground_role(fleet), *(node_role(fleet, name) for name in enrolled)],
    }


def _same_role(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    def rows(role: Mapping[str, Any]) -> set:
        return {(row["acltype"], row["topic"], row["allow"]) for row in role["acls"]}

    return rows(there) == rows(wanted)


def changes(
    fleet: str,
    records: Mapping[str, NodeRecord],
    clients: Mapping[str, Mapping[str, Any]],
    roles: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Command], frozenset[str]]:
    """Commands that make the broker's clients and roles what the records say, and who loses rights by them.

    `clients`, `roles`: as the plugin lists them, by name. Empty where all is as it should be.
    """
    commands: list[Command] = []
    cut = set()
    for name in sorted({*records, *clients} - {enrolment.GROUND}):
        record, client, role = records.get(name), clients.get(name), NODE_ROLE + name
        held = [each["rolename"] for each in client.get("roles", ())] if client else []
        if record is not None and record.state == "enrolled":
            wanted = node_role(fleet, name)
            if role in roles and not _same_role(roles[role], wanted):
                commands.append({"command": "modifyRole", **wanted})
            elif role not in roles:
                commands.append({"command": "createRole", **wanted})
            if client is None:
                commands.append({"command": "createClient", **_client(name, role)})
            elif held != [role]:
                commands.append({"command": "modifyClient", **_client(name, role)})
            if client is not None and client.get("disabled"):
                commands.append({"command": "enableClient", "username": name})
            continue
        if client is not None and (held or not client.get("disabled")):
            commands.append({"command": "disableClient", "username": name})
            if held:
                cut.add(name)
                commands.append({"command": "modifyClient", "username": name, "roles": []})
        if role in roles:
            commands.append({"command": "deleteRole", "rolename": role})
        if client is None and record is not None:
            commands.append({"command": "createClient", "username": name, "roles": []})
            commands.append({"command": "disableClient", "username": name})
        if client is not None and record is None:
            commands.append({"command": "deleteClient", "username": name})
    return commands, frozenset(cut)


# ---------------------------------------------------------------- the broker


class Rights:
    """A client of the fleet's broker with the ground station's certificate, between `start` and `stop`, or inside `with`.

    Methods may be called from any thread but paho's.
    """

    def __init__(self, folder: FleetFolder, host: str, port: int):
        """Raises: RightsError for certificates that cannot be used, FleetFolderError."""
        self._fleet = folder.info.fleet
        self._topics = wire.Topics(self._fleet)
        self.host, self.port = host, port
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._connected = False
        self._refusal = ""
        self._answers: dict[str, dict[str, Any]] = {}
        self._waiting: set[str] = set()
        self._statuses: dict[str, wire.Status] = {}
        self._records = frozenset(folder.scan()[0])
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=f"rights-{self._fleet}-{secrets.token_hex(4)}",
            protocol=mqtt.MQTTv5,
        )
        try:
            use_certificates(self._client, *ground_files(folder))
        except (OSError, ValueError) as error:
            raise RightsError(
                f"the ground station's certificate in {folder.root} cannot be used ({error}): run as the folder's owner"
            ) from None
        self._client.reconnect_delay_set(min_delay=0.1, max_delay=1.0)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message

    def start(self) -> Rights:
        """Raises: RightsError."""
        self._client.connect_async(self.host, self.port, keepalive=KEEPALIVE_S, clean_start=True)
        self._client.loop_start()
        try:
            self._await_connection()
        except RightsError:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def __enter__(self) -> Rights:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------ what others call

    def reconcile(self, records: Mapping[str, NodeRecord]) -> frozenset[str]:
        """Makes the broker's rights what the records say; returns who was cut off by that. Does nothing where all is right.

        Raises: RightsError.
        """
        self._records = frozenset(records)
        listed = self.ask([{"command": "listClients", "verbose": True}, {"command": "listRoles", "verbose": True}])
        try:
            clients = {each["username"]: each for each in listed[0]["data"]["clients"]}
            roles = {each["rolename"]: each for each in listed[1]["data"]["roles"]}
            commands, cut = changes(self._fleet, records, clients, roles)
        except (KeyError, TypeError) as error:
            raise RightsError(
                f"the broker's list of rights cannot be read ({error!r}): is its plugin another one?"
            ) from None
        for start in range(0, len(commands), COMMANDS_AT_ONCE):
            self.ask(commands[start : start + COMMANDS_AT_ONCE])
        self._say_offline(cut)
        return cut

    def kick(self, nodes: Iterable[str]) -> None:
        """Disconnects clients that are disabled, where they are connected.  Raises: RightsError."""
        commands = [{"command": "disableClient", "username": node} for node in sorted(nodes)]
        if commands:
            self.ask(commands)

    def ask(self, commands: list[Command]) -> list[dict[str, Any]]:
        """The plugin's answers to commands, in their order.  Raises: RightsError for an error among them, or none in time."""
        names = [secrets.token_hex(8) for _ in commands]
        message = {"commands": [command | {"correlationData": name} for command, name in zip(commands, names)]}
        with self._asking:
            self._await_connection()
            with self._changed:
                self._answers.clear()
                self._waiting = set(names)
            self._client.publish(COMMANDS, json.dumps(message), qos=1)
            with self._changed:
                there = self._changed.wait_for(
                    lambda: self._waiting <= self._answers.keys() or not self._connected, ANSWER_S
                )
                answers, self._waiting = dict(self._answers), set()
        missing = [command["command"] for command, name in zip(commands, names) if name not in answers]
        if missing or not there:
            raise RightsError(
                f"the broker at {self.host}:{self.port} does not answer {', '.join(missing[:3])}: is it the fleet's own?"
            )
        for command, name in zip(commands, names):
            if "error" in answers[name]:
                about = command.get("username") or command.get("rolename") or ""
                raise RightsError(
                    f"the broker refuses {command['command']} {about}: {str(answers[name]['error'])[:200]}"
                )
        return [answers[name] for name in names]

    # ------------------------------------------------------------ inside

    def _await_connection(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._connected, CONNECT_S):
                raise RightsError(
                    f"no broker at {self.host}:{self.port} that takes the ground station's certificate"
                    f"{' (' + self._refusal + ')' if self._refusal else ''}: see that it runs"
                )

    def _say_offline(self, nodes: Iterable[str]) -> None:
        for node in nodes:
            with self._changed:
                status = self._statuses.get(node)
            if status is not None and status.status == "online":
                gone = wire.encode(wire.Status(node, "offline", status.bd_seq))
                self._client.publish(self._topics.status(node), gone, qos=1, retain=True)

    def _on_connect(self, client: mqtt.Client, _userdata, _flags, reason, _properties) -> None:
        if reason.is_failure:
            with self._changed:
                self._refusal = str(reason)
            return
        client.subscribe(
            [(ANSWERS, mqtt.SubscribeOptions(qos=1)), (self._topics.status("+"), mqtt.SubscribeOptions(qos=1))]
        )

    def _on_subscribe(self, _client, _userdata, _mid, reasons, _properties) -> None:
        with self._changed:
            refused = [str(reason) for reason in reasons if reason.is_failure]
            self._connected, self._refusal = not refused, ", ".join(refused)
            self._changed.notify_all()

    def _on_disconnect(self, _client, _userdata, _flags, reason, _properties) -> None:
        with self._changed:
            self._connected, self._refusal = False, str(reason)
            self._changed.notify_all()

    def _on_message(self, _client, _userdata, message: mqtt.MQTTMessage) -> None:
        try:
            if message.topic == ANSWERS:
                self._take_answers(message.payload)
            else:
                node, _ = self._topics.parse_node(message.topic)
                status = wire.decode(wire.Status, message.payload)
                with self._changed:
                    if node in self._records and status.node == node:
                        self._statuses[node] = status
        except (wire.WireError, ValueError, UnicodeDecodeError, AttributeError, RecursionError):
            pass  # of nodes: the control plane counts them

    def _take_answers(self, payload: bytes) -> None:
        """Raises: ValueError, AttributeError."""
        if len(payload) > MAX_ANSWER_BYTES:
            return
        answers = json.loads(payload).get("responses", [])
        with self._changed:
            for each in answers:
                name = each.get("correlationData")
                if name in self._waiting:  # others' answers come here too
                    self._answers[name] = each
            self._changed.notify_all()
