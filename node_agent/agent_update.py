"""Which updates of the agent a node takes, and what it does with one that has come: the middle between delivery and the slots.

Code is taken from signers only, on loopback too. What was tried here and did not become good is refused from then on.
Leaves out: frames and chunks (delivery.py), files on the disk (delivery_store.py), unpacking and trials (agent_slots.py).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from node_agent.agent_slots import MAX_PACKAGE_BYTES, PackageError, Slots
from node_agent.delivery_frame import PACKAGES, AgentOffer
from node_agent.delivery_store import Store, StoreError
from node_agent.signature import is_signed, update_statement

log = logging.getLogger("node_agent.update")


class AgentUpdates:
    """For one thread. `on_staged(text)` is called when the next start of the agent is a new one: it should be soon."""

    def __init__(self, slots: Slots, root: Path, signers: tuple[str, ...], on_staged: Callable[[str], None]):
        """`root`: a folder of this node for packages on their way."""
        self._slots, self._root, self._signers, self._on_staged = slots, root, signers, on_staged
        self.store = Store(root, folder=PACKAGES)

    def is_good(self, offer: AgentOffer) -> bool:
        """Whether this very agent runs, and has proved good."""
        return self._slots.is_good(offer.sha256)

    def check(self, offer: AgentOffer) -> None:
        """Raises: StoreError for an update that is not to be taken (now)."""
        if not self._signers:
            raise StoreError(
                "signature",
                "this node takes no updates of its agent: give [update] or [bundle] signers in its configuration",
            )
        statement = update_statement(offer.name, offer.bytes, offer.sha256)
        if not is_signed(statement, offer.signature, self._signers):
            raise StoreError(
                "signature", f"the update {offer.name} has a wrong signature: sign it with the key of this fleet"
            )
        if offer.bytes > MAX_PACKAGE_BYTES:
            raise StoreError("disk", f"the update {offer.name} has {offer.bytes} bytes, over {MAX_PACKAGE_BYTES}")
        state = self._slots.state()
        if state.trial:
            raise StoreError(
                "busy", f"an update is on trial in slot {state.trial}: wait until it is good or falls back"
            )
        if offer.sha256 in state.failed:
            raise StoreError(
                "failed",
                f"the update {offer.name} was tried here and did not become good: mend it and make another package",
            )

    def stage(self, offer: AgentOffer) -> None:
        """Takes over a package that is whole and verified.  Raises: StoreError, OSError."""
        self.check(offer)
        package = self.store.gather(offer.files)
        if package is None:
            raise StoreError("load", f"the update {offer.name} is missing or altered: send it again")
        try:
            slot = self._slots.install(package, offer.sha256)
        except PackageError as error:
            raise StoreError("load", f"{offer.name}: {error}") from None
        finally:
            shutil.rmtree(self._root, ignore_errors=True)
        log.info("update %s is in slot %s", offer.name, slot)
        self._on_staged(f"the update {offer.name} is in slot {slot}: starting it")
