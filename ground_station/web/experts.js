// The expert map: layers by experts, who holds each in which precision, and how much it is used. Leaves out placement itself.

import { $, coalesced, css, el, setText } from "./dom.js";
import { plain } from "./format.js";
import { PALETTE } from "./chart.js";

const LABEL = 34;
const LEAST = 9;
const MOST = 54;

export class ExpertMap {
  constructor(store) {
    this.store = store;
    this.canvas = $("experts-canvas");
    this.at = [0, 0];
    this.draw = coalesced(() => this.render(), 500);
    for (const kind of ["reset", "experts"]) {
      store.addEventListener(kind, () => {
        this.model();
        this.draw();
      });
    }
    for (const kind of ["heat", "theme"]) store.addEventListener(kind, this.draw);
    new ResizeObserver(this.draw).observe(this.canvas.parentElement);
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("focus", () => this.say());
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.model();
  }

  model() {
    const { holds, nodes } = this.store.experts;
    this.layers = [...new Set(holds.map(([layer]) => layer))].sort((a, b) => a - b);
    this.experts = holds.reduce((most, [, expert]) => Math.max(most, expert + 1), 0);
    this.experts = Math.min(this.experts, 4096);
    this.cells = new Map();
    for (const [layer, expert, node, precision] of holds) {
      const key = `${layer},${expert}`;
      if (!this.cells.has(key)) this.cells.set(key, []);
      this.cells.get(key).push([node, precision]);
    }
    const many = nodes.length > PALETTE.length;
    $("experts-legend").replaceChildren(
      ...nodes.slice(0, 24).map((node, i) => {
        const swatch = el("i", { class: "swatch" });
        swatch.style.background = PALETTE[i % PALETTE.length];
        return el("span", {}, swatch, ` ${plain(node, 24)}`);
      }), nodes.length > 24 ? el("span", {}, `and ${nodes.length - 24} more`) : "", many ? el("span", {}, "colours repeat: point at a cell for names") : "");
    const replicas = holds.length - this.cells.size;
    setText($("experts-note"), this.cells.size ? `${this.layers.length} layers × ${this.experts} experts, ${holds.length} shards, ${replicas} of them replicas` : "");
  }

  runs(layer, expert) {
    const row = Object.hasOwn(this.store.experts.runs, layer) ? this.store.experts.runs[layer] : [];
    return row[expert] || 0;
  }

  render() {
    const { canvas, layers, experts } = this;
    const host = canvas.parentElement;
    if (!this.cells.size) {
      canvas.hidden = true;
      setText($("experts-at"), "No node has said that it holds an expert.");
      return;
    }
    canvas.hidden = false;
    const size = Math.max(LEAST, Math.min(MOST, Math.floor((host.clientWidth - LABEL - 2) / experts)));
    this.size = size;
    const [width, height] = [LABEL + experts * size + 1, 16 + layers.length * size + 1];
    const ratio = window.devicePixelRatio || 1;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.min(16000, width * ratio);
    canvas.height = Math.min(16000, height * ratio);
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    ctx.font = "10px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    const most = Math.max(1, ...layers.map((layer) => Math.max(0, ...(Object.hasOwn(this.store.experts.runs, layer) ? this.store.experts.runs[layer] : []))));
    const [empty, heat, text, muted] = ["--panel-2", "--heat", "--text", "--muted"].map(css);
    ctx.fillStyle = muted;
    ctx.textAlign = "center";
    const step = Math.max(1, Math.ceil(26 / size));
    for (let expert = 0; expert < experts; expert += step) ctx.fillText(String(expert), LABEL + (expert + 0.5) * size, 8);
    layers.forEach((layer, row) => {
      const y = 16 + row * size;
      ctx.textAlign = "right";
      ctx.fillStyle = muted;
      if (size >= 9 && (size >= 11 || row % 2 === 0)) ctx.fillText(`L${layer}`, LABEL - 6, y + size / 2);
      for (let expert = 0; expert < experts; expert++) {
        const x = LABEL + expert * size;
        ctx.fillStyle = empty;
        ctx.fillRect(x, y, size - 1, size - 1);
        const runs = this.runs(layer, expert);
        if (runs) {
          ctx.globalAlpha = 0.12 + 0.78 * (runs / most);
          ctx.fillStyle = heat;
          ctx.fillRect(x, y, size - 1, size - 1);
          ctx.globalAlpha = 1;
        }
        const holders = this.cells.get(`${layer},${expert}`) || [];
        const bar = Math.max(2, Math.floor((size - 1) / 4));
        const each = (size - 1) / Math.max(1, holders.length);
        holders.forEach(([node], i) => {
          ctx.fillStyle = PALETTE[node % PALETTE.length];
          ctx.fillRect(x + i * each, y + size - 1 - bar, Math.max(1, each - (holders.length > 1 ? 1 : 0)), bar);
        });
        if (size >= 18 && holders.length) {
          ctx.fillStyle = text;
          ctx.textAlign = "center";
          ctx.font = "9px system-ui, sans-serif";
          const kinds = [...new Set(holders.map(([, precision]) => short(this.store.experts.precisions[precision])))];
          ctx.fillText(kinds.join("/").slice(0, Math.floor(size / 6)), x + (size - 1) / 2, y + (size - bar) / 2);
          ctx.font = "10px system-ui, sans-serif";
        }
      }
    });
    const [column, row] = this.at;
    if (document.activeElement === canvas) {
      ctx.strokeStyle = css("--accent");
      ctx.lineWidth = 2;
      ctx.strokeRect(LABEL + column * size, 16 + row * size, size - 1, size - 1);
    }
    this.say();
  }

  say() {
    const [column, row] = this.at;
    const layer = this.layers[row];
    if (layer === undefined) return;
    const { nodes, precisions } = this.store.experts;
    const holders = (this.cells.get(`${layer},${column}`) || []).map(([node, precision]) => `${plain(nodes[node], 32)} ${plain(precisions[precision], 12)}`);
    const more = holders.length > 8 ? ` and ${holders.length - 8} more` : "";
    setText($("experts-at"), `layer ${layer}, expert ${column}: ${holders.slice(0, 8).join(", ") || "nobody"}${more} · run ${this.runs(layer, column)} times`);
  }

  point(event) {
    const place = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - place.left - LABEL) / this.size);
    const row = Math.floor((event.clientY - place.top - 16) / this.size);
    if (column < 0 || row < 0 || column >= this.experts || row >= this.layers.length) return;
    this.at = [column, row];
    this.say();
  }

  key(event) {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    this.at = [Math.min(Math.max(this.at[0] + move[0], 0), this.experts - 1), Math.min(Math.max(this.at[1] + move[1], 0), this.layers.length - 1)];
    this.draw();
  }
}

function short(precision) {
  const found = /^(int|fp|bf)?(\d+)/.exec(precision || "");
  return found ? `${(found[1] || "").slice(0, 1)}${found[2]}` : String(precision || "?").slice(0, 3);
}
