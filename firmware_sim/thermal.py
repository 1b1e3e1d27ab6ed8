"""Temperatures of a satellite: a network of nodes that absorb, radiate and conduct. Vectorised over satellites.

    C_i dT_i/dt = Q_i - eps_i A_i sigma T_i^4 + sum_j G_ij (T_j - T_i)

Q_i is all the heat that comes in (sun, albedo, the Earth's infrared, electric power); environment.py and bus.py give its parts.
Temperatures are kelvin here and have the node first, (k, n), so that a node's row is contiguous. Leaves out temperature-
dependent properties and radiation between nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIGMA_W_M2_K4 = 5.670374419e-8  # CODATA 2018, exact
KELVIN = 273.15
MAX_STEP_S = 10.0
# ROS2's coefficient for which a very fast node lands on its equilibrium in one step (L-stable).
_GAMMA = 1.0 + 1.0 / np.sqrt(2.0)


class ThermalError(ValueError):
    """A thermal network or a step of it cannot be; the text says which value and what to give."""


@dataclass(frozen=True)
class Network:
    """k nodes: heat capacities (J/K), emissivity times area (m2), and links (node, node, W/K)."""

    capacity_j_per_k: tuple[float, ...]
    radiating_m2: tuple[float, ...]
    links: tuple[tuple[int, int, float], ...] = ()

    def __post_init__(self) -> None:
        nodes = len(self.capacity_j_per_k)
        if not nodes or len(self.radiating_m2) != nodes:
            raise ThermalError(
                f"{nodes} capacities and {len(self.radiating_m2)} radiating areas; give one of each per node"
            )
        if not all(0.0 < value < np.inf for value in self.capacity_j_per_k):
            raise ThermalError("a heat capacity is not above 0 J/K; use a small one for a light node")
        if not all(0.0 <= value < np.inf for value in self.radiating_m2):
            raise ThermalError("a radiating area is below 0 m2; give emissivity times area")
        for a, b, conductance in self.links:
            if not (0 <= a < nodes and 0 <= b < nodes and a != b and 0.0 <= conductance < np.inf):
                raise ThermalError(f"link {(a, b, conductance)}: give two of the nodes 0 to {nodes - 1} and W/K >= 0")


def net_heat_w(network: Network, temp_k: np.ndarray, heat_w: np.ndarray) -> np.ndarray:
    """Heat that stays in each node, (k, ...) W, at temperatures (k, ...) K with `heat_w` (k, ...) coming in."""
    net = np.array(heat_w, float)
    for node, radiating_m2 in enumerate(network.radiating_m2):
        if radiating_m2:
            squared = temp_k[node] * temp_k[node]
            squared *= squared
            squared *= SIGMA_W_M2_K4 * radiating_m2
            net[node] -= squared
    for a, b, conductance in network.links:
        flow = temp_k[b] - temp_k[a]
        flow *= conductance
        net[a] += flow
        net[b] -= flow
    return net


def rk4_step(network: Network, temp_k: np.ndarray, heat_w: np.ndarray, dt_s: np.ndarray | float) -> np.ndarray:
    """Temperatures `dt_s` later with constant heat, by the classical Runge-Kutta method.

    Shapes: temp_k, heat_w (k, ...); dt_s a number or one per satellite. Only stable while dt_s is below some 2.5 times the
    fastest node's time constant: see `fastest_s` and `implicit_step`.
    """
    share = np.asarray(dt_s, float) / _column(network.capacity_j_per_k, temp_k)
    k1 = net_heat_w(network, temp_k, heat_w)
    k2 = net_heat_w(network, temp_k + 0.5 * share * k1, heat_w)
    k3 = net_heat_w(network, temp_k + 0.5 * share * k2, heat_w)
    k4 = net_heat_w(network, temp_k + share * k3, heat_w)
    k2 += k3
    k2 *= 2.0
    k1 += k2
    k1 += k4
    k1 *= share / 6.0
    return temp_k + k1


def implicit_step(network: Network, temp_k: np.ndarray, heat_w: np.ndarray, dt_s: float) -> np.ndarray:
    """The same by a linearised implicit method (ROS2, second order, L-stable), for dies and other fast nodes.

    Stable whatever the step. Shapes: temp_k, heat_w (k,) or (k, n).  Source: Verwer et al., SIAM J. Sci. Comput. 20 (1999).
    """
    flat = temp_k.reshape(temp_k.shape[0], -1)
    heat = np.broadcast_to(heat_w, temp_k.shape).reshape(flat.shape)
    capacity = np.asarray(network.capacity_j_per_k)[:, None]
    nodes = np.arange(flat.shape[0])
    jacobian = np.zeros((flat.shape[1], nodes.size, nodes.size))
    jacobian[:, nodes, nodes] = (-4.0 * SIGMA_W_M2_K4 * np.asarray(network.radiating_m2)[:, None] * flat**3).T
    for a, b, conductance in network.links:
        jacobian[:, a, a] -= conductance
        jacobian[:, b, b] -= conductance
        jacobian[:, a, b] += conductance
        jacobian[:, b, a] += conductance
    matrix = np.eye(nodes.size) - _GAMMA * dt_s * jacobian / capacity[None]
    k1 = np.linalg.solve(matrix, (net_heat_w(network, flat, heat) / capacity).T[..., None])[..., 0].T
    later = net_heat_w(network, flat + dt_s * k1, heat) / capacity - 2.0 * k1
    k2 = np.linalg.solve(matrix, later.T[..., None])[..., 0].T
    return (flat + dt_s * (1.5 * k1 + 0.5 * k2)).reshape(temp_k.shape)


def fastest_s(network: Network, temp_k: np.ndarray) -> float:
    """The shortest time constant of any node at these temperatures, s (infinite for isolated nodes)."""
    conductance = np.zeros(len(network.capacity_j_per_k))
    for a, b, value in network.links:
        conductance[a] += value
        conductance[b] += value
    hottest = np.max(temp_k.reshape(temp_k.shape[0], -1), axis=1)
    rate = (
        4.0 * SIGMA_W_M2_K4 * np.asarray(network.radiating_m2) * hottest**3 + conductance
    ) / network.capacity_j_per_k
    return float(1.0 / rate.max()) if rate.max() > 0.0 else float("inf")


def advance(network: Network, temp_k: np.ndarray, heat_w: np.ndarray, dt_s: float) -> np.ndarray:
    """Temperatures `dt_s` later with constant heat: equal steps of at most 10 s, implicit where a node is too fast for RK4.

    Call it once per stretch of constant sunlight: the edge of an eclipse is where a step has to end.  Raises: ThermalError.
    """
    temp_k, heat_w = np.asarray(temp_k, float), np.asarray(heat_w, float)
    if not 0.0 <= dt_s < 1e9:
        raise ThermalError(f"a step of {dt_s} s; give 0 s or more")
    if temp_k.shape[:1] != (len(network.capacity_j_per_k),) or heat_w.shape[:1] != temp_k.shape[:1]:
        raise ThermalError(f"shapes {temp_k.shape} and {heat_w.shape}; give one row per node")
    if not (np.isfinite(temp_k).all() and np.isfinite(heat_w).all() and (temp_k > 0.0).all()):
        raise ThermalError("a temperature is not above 0 K or a heat is no number; temperatures here are kelvin")
    steps = max(1, int(np.ceil(dt_s / MAX_STEP_S)))
    for _ in range(steps):
        slow = fastest_s(network, temp_k) > dt_s / steps
        temp_k = (rk4_step if slow else implicit_step)(network, temp_k, heat_w, dt_s / steps)
    return temp_k


def equilibrium_k(heat_w: np.ndarray | float, radiating_m2: np.ndarray | float) -> np.ndarray:
    """Temperature at which emissivity times area radiates `heat_w` to deep space."""
    return (np.asarray(heat_w, float) / (SIGMA_W_M2_K4 * np.asarray(radiating_m2, float))) ** 0.25


def _column(values: tuple[float, ...], like: np.ndarray) -> np.ndarray:
    return np.asarray(values, float).reshape((-1,) + (1,) * (like.ndim - 1))
