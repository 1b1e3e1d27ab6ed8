// One uPlot chart of several nodes' values over a moving span of time, with limit bands behind. Leaves out where values come from.

import { css } from "./dom.js";
import { quantity } from "./format.js";

export const PALETTE = ["#2f7ed8", "#e8833a", "#2ca58d", "#b45bcf", "#d6504c", "#8f7a2e", "#4fa3d1", "#7f8c9a"];
const AXIS_WIDTH = 62; // the same in all charts, so that one moment is above the other

export class Chart {
  constructor(host, { height, unit, series, sync = "time", points = false }) {
    Object.assign(this, { host, height, unit, bands: [], from: 0, to: 1 });
    const axis = { stroke: () => css("--muted"), grid: { stroke: () => css("--grid"), width: 1 }, ticks: { stroke: () => css("--grid"), width: 1, size: 4 }, font: "11px system-ui, sans-serif" };
    this.plot = new uPlot(
      {
        width: Math.max(160, host.clientWidth),
        height,
        legend: { show: false },
        cursor: { sync: { key: sync }, drag: { x: false, y: false }, points: { size: 5 } },
        tzDate: (at) => uPlot.tzDate(new Date(at * 1000), "Etc/UTC"),
        padding: [8, 10, 0, 0],
        scales: { x: { time: true, range: () => [this.from, this.to] }, y: { range: (_plot, low, high) => this.yRange(low, high) } },
        axes: [
          { ...axis, size: 26, space: 70, values: (_plot, ticks, _i, _space, step) => ticks.map((at) => new Date(at * 1000).toISOString().slice(11, step < 60 ? 19 : 16)) },
          { ...axis, size: AXIS_WIDTH, values: (_plot, ticks) => ticks.map((value) => quantity(value, unit).filter(Boolean).join(" ")) },
        ],
        series: [{}, ...series.map((one) => ({ label: one.label, stroke: one.color, width: 1.6, dash: one.dash, spanGaps: false, points: { show: points } }))],
        hooks: { drawClear: [(plot) => this.drawBands(plot)] },
      },
      [[], ...series.map(() => [])],
      host,
    );
    this.resize = new ResizeObserver(() => this.plot.setSize({ width: Math.max(160, host.clientWidth), height }));
    this.resize.observe(host);
  }

  yRange(low, high) {
    if (low === null || high === null || !Number.isFinite(low)) return [0, 1];
    const size = Math.max(high - low, Math.abs(high) * 0.02, 1e-9);
    let [bottom, top] = [low - size * 0.12, high + size * 0.12];
    for (const [from, to] of this.bands) {
      for (const edge of [from, to]) {
        if (edge === null) continue; // a limit that is near is worth seeing
        if (edge > top && edge - high < size * 0.6) top = edge + size * 0.1;
        if (edge < bottom && low - edge < size * 0.6) bottom = edge - size * 0.1;
      }
    }
    return [bottom, top];
  }

  drawBands(plot) {
    const { ctx } = plot;
    const { left, top, width, height } = plot.bbox;
    const [low, high] = [plot.scales.y.min, plot.scales.y.max];
    if (low === undefined || low === null) return;
    ctx.save();
    ctx.beginPath();
    ctx.rect(left, top, width, height);
    ctx.clip();
    for (const [from, to, level] of this.bands) {
      const y0 = plot.valToPos(to === null ? high : Math.min(to, high), "y", true);
      const y1 = plot.valToPos(from === null ? low : Math.max(from, low), "y", true);
      if (y1 <= y0) continue;
      const color = css(`--level-${level}`) || css("--muted");
      ctx.globalAlpha = 0.13;
      ctx.fillStyle = color;
      ctx.fillRect(left, y0, width, y1 - y0);
      ctx.globalAlpha = 0.7;
      ctx.strokeStyle = color;
      ctx.setLineDash([4, 4]);
      for (const [edge, y] of [[from, y1], [to, y0]]) {
        if (edge === null || edge < low || edge > high) continue;
        ctx.beginPath();
        ctx.moveTo(left, y);
        ctx.lineTo(left + width, y);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  // tables: [at, values] per series, on times of their own.
  show(tables, bands, from, to) {
    Object.assign(this, { bands, from, to });
    const filled = tables.map(([at, values]) => (at.length ? [at, values] : [[from], [null]]));
    this.plot.setData(filled.length ? uPlot.join(filled) : [[]]);
  }

  destroy() {
    this.resize.disconnect();
    this.plot.destroy();
  }
}

const LEVEL_OF_BAND = { green: "watch", yellow: "warning", red: "critical" };

// [from, to, level] beyond each limit of a signal, as they hold for these nodes: {"yellow_high": 80} is [80, null, "warning"].
export function bandsFor(limits, signal, nodes) {
  const common = Object.hasOwn(limits.signals, signal) ? limits.signals[signal] : {};
  const found = new Map();
  for (const node of nodes.length ? nodes : [""]) {
    const own = Object.hasOwn(limits.nodes, node) && Object.hasOwn(limits.nodes[node], signal) ? limits.nodes[node][signal] : common;
    for (const side of ["low", "high"]) {
      const edges = ["green", "yellow", "red"].filter((band) => Object.hasOwn(own, `${band}_${side}`)).map((band) => [own[`${band}_${side}`], LEVEL_OF_BAND[band]]);
      edges.forEach(([edge, level], i) => {
        const next = i + 1 < edges.length ? edges[i + 1][0] : null;
        found.set(`${side} ${edge} ${next}`, side === "high" ? [edge, next, level] : [next, edge, level]);
      });
    }
  }
  return [...found.values()].filter(([from, to]) => from === null || to === null || from < to);
}
