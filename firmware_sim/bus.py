"""What satellites of 3U, 6U and 12U are like thermally: four nodes (panel, body, avionics, battery) and what links them.

Mass, area and total heat capacity are common engineering values [U], and so are all shares, paints and conductances: parameters
to be replaced by a mission's own, never facts about a satellite.
"""

from __future__ import annotations

from dataclasses import dataclass

from firmware_sim.environment import SOLAR_W_M2
from firmware_sim.thermal import Network, ThermalError

PANEL, BODY, AVIONICS, BATTERY = range(4)
NODES = ("panel", "body", "avionics", "battery")


@dataclass(frozen=True)
class Bus:
    """A satellite's structure. Area: the body's outside; the panel is a wing that follows the sun, sized by its power."""

    name: str
    mass_kg: float
    area_m2: float
    capacity_j_per_k: float
    # Of the total heat capacity, in the order of NODES.
    capacity_shares: tuple[float, float, float, float] = (0.10, 0.60, 0.15, 0.15)
    # The body is partly cells, partly paint and bare metal: with 12 W inside it comes near the 5 C of BUPT-1's plate.
    body_absorptivity: float = 0.62
    body_emissivity: float = 0.75
    cell_absorptivity: float = 0.92
    cell_efficiency: float = 0.28
    panel_emissivity: float = 0.85
    panel_body_w_per_k: float = 0.1
    avionics_body_w_per_k: float = 1.5
    battery_body_w_per_k: float = 0.8

    def panel_m2(self, array_w: float) -> float:
        """Cell area that gives `array_w` in full sun at 1 au."""
        return array_w / (SOLAR_W_M2 * self.cell_efficiency)

    def network(self, array_w: float) -> Network:
        """The four nodes.  Raises: ThermalError where a value is no use."""
        if array_w < 0.0 or abs(sum(self.capacity_shares) - 1.0) > 1e-9:
            raise ThermalError(f"bus {self.name}: give an array of 0 W or more, and capacity shares that add up to 1")
        return Network(
            capacity_j_per_k=tuple(share * self.capacity_j_per_k for share in self.capacity_shares),
            # the wing radiates from both faces
            radiating_m2=(
                2.0 * self.panel_emissivity * self.panel_m2(array_w),
                self.body_emissivity * self.area_m2,
                0.0,
                0.0,
            ),
            links=(
                (PANEL, BODY, self.panel_body_w_per_k),
                (AVIONICS, BODY, self.avionics_body_w_per_k),
                (BATTERY, BODY, self.battery_body_w_per_k),
            ),
        )

    def sun_absorbing_m2(self, array_w: float) -> tuple[float, float]:
        """Absorptivity times area that faces the sun, of panel (less what becomes electricity) and body (a quarter: convex)."""
        return (
            (self.cell_absorptivity - self.cell_efficiency) * self.panel_m2(array_w),
            self.body_absorptivity * self.area_m2 / 4.0,
        )

    def earth_absorbing_m2(self, array_w: float) -> tuple[float, float]:
        """Absorptivity times the whole area, of panel (both faces) and body, for sunlight from the Earth."""
        return 2.0 * self.cell_absorptivity * self.panel_m2(array_w), self.body_absorptivity * self.area_m2


BUSES: dict[str, Bus] = {
    bus.name: bus
    for bus in (
        Bus("3U", mass_kg=4.0, area_m2=0.156, capacity_j_per_k=2900.0),
        Bus("6U", mass_kg=10.0, area_m2=0.284, capacity_j_per_k=7200.0),
        Bus("12U", mass_kg=20.0, area_m2=0.434, capacity_j_per_k=14400.0),
    )
}
