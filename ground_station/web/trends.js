// Trends of chosen nodes and signals with their limit bands; history comes from the archive. Leaves out drawing itself (chart.js).

import { $, el, setText } from "./dom.js";
import { PALETTE, Chart, bandsFor } from "./chart.js";
import { plain, quantity } from "./format.js";
import { SeriesCache } from "./series.js";

const MOST_NODES = PALETTE.length;
const MOST_SIGNALS = 6;
const DRAW_MS = 1000;
const HEIGHT = 170;

export class Trends {
  constructor(store, choice) {
    Object.assign(this, { store, choice });
    this.nodes = choice.get("nodes", null);
    this.signals = choice.get("signals", ["temp_c", "power_w"]);
    this.span_s = choice.get("span", 900);
    this.charts = new Map();
    this.dirty = true;
    this.cache = new SeriesCache(store, () => (this.dirty = true));
    $("trend-span").value = String(this.span_s);
    $("trend-span").addEventListener("change", (event) => {
      this.span_s = Number(event.target.value);
      choice.set("span", this.span_s);
      this.ask();
    });
    store.addEventListener("reset", () => {
      this.cache.forget();
      this.rebuild();
    });
    store.addEventListener("rows", () => this.look());
    store.addEventListener("limits", () => (this.dirty = true));
    setInterval(() => this.draw(), DRAW_MS);
  }

  // The nodes shown: those that were picked, or the first there are.
  picked() {
    const all = [...this.store.nodes.keys()].sort();
    return this.nodes === null ? all.slice(0, MOST_NODES) : this.nodes.filter((id) => this.store.nodes.has(id)).slice(0, MOST_NODES);
  }

  look() {
    const key = `${this.picked().join()}|${[...this.store.signalNames().keys()].length}`;
    if (key !== this.key) {
      this.key = key;
      this.rebuild();
    }
  }

  follow(node, signal) {
    if (!this.picked().includes(node)) this.nodes = [...this.picked().slice(0, MOST_NODES - 1), node];
    if (!this.signals.includes(signal)) this.signals = [...this.signals.slice(-(MOST_SIGNALS - 1)), signal];
    this.save();
    this.rebuild();
    location.hash = "";
    $("trends").focus();
    $("trends").scrollIntoView();
  }

  save() {
    this.choice.set("nodes", this.nodes);
    this.choice.set("signals", this.signals);
  }

  menus() {
    const picked = new Set(this.picked());
    $("trend-nodes").replaceChildren(
      ...[...this.store.nodes.keys()].sort().map((id) => this.option(plain(id, 40), picked.has(id), (on) => {
        const now = this.picked();
        if (on && now.length >= MOST_NODES) return false;
        this.nodes = on ? [...now, id].sort() : now.filter((known) => known !== id);
        return true;
      })));
    const names = this.store.signalNames();
    $("trend-signals").replaceChildren(
      ...[...new Set([...this.signals, ...[...names.keys()].sort()])].map((name) => this.option(plain(name, 60), this.signals.includes(name), (on) => {
        if (on && this.signals.length >= MOST_SIGNALS) return false;
        this.signals = on ? [...this.signals, name] : this.signals.filter((known) => known !== name);
        return true;
      })));
    setText($("trend-nodes-summary"), `Nodes (${picked.size} of ${this.store.nodes.size})`);
    setText($("trend-signals-summary"), `Signals (${this.signals.length})`);
  }

  option(text, checked, change) {
    const box = el("input", { type: "checkbox", checked, onchange: () => {
      if (!change(box.checked)) box.checked = !box.checked;
      else {
        this.save();
        this.rebuild(false);
      }
    } });
    return el("label", {}, box, ` ${text}`);
  }

  rebuild(menus = true) {
    if (menus) this.menus();
    const nodes = this.picked();
    $("trend-legend").replaceChildren(...nodes.map((id, i) => {
      const swatch = el("i", { class: "swatch" });
      swatch.style.background = PALETTE[i];
      return el("span", {}, swatch, ` ${plain(id, 40)}`);
    }));
    for (const chart of this.charts.values()) chart.chart.destroy();
    this.charts.clear();
    const names = this.store.signalNames();
    $("trend-charts").replaceChildren(...this.signals.map((signal) => {
      const unit = names.get(signal) || "";
      const text = el("span", { class: "num note" });
      const host = el("div", { class: "chart" });
      const figure = el("figure", { role: "group", "aria-label": `Trend of ${plain(signal, 60)}` }, el("figcaption", {}, el("b", {}, plain(signal, 60)), text), host);
      this.charts.set(signal, { host, text, unit, chart: null });
      return figure;
    }));
    for (const entry of this.charts.values()) entry.chart = new Chart(entry.host, { height: HEIGHT, unit: entry.unit, series: nodes.map((id, i) => ({ label: id, color: PALETTE[i] })) });
    this.ask();
  }

  ask() {
    this.cache.want(this.picked().flatMap((node) => this.signals.map((signal) => [node, signal])), this.span_s);
    this.dirty = true;
    this.draw();
  }

  draw() {
    if (document.hidden) return;
    const to = this.store.now();
    const nodes = this.picked();
    const first = Math.min(...nodes.flatMap((node) => this.signals.map((signal) => this.cache.get(node, signal).at[0] ?? Infinity)));
    const from = Math.max(to - this.span_s, Math.min(first, to - 60)); // a fleet that is young fills the picture
    for (const [signal, { chart, text, unit }] of this.charts) {
      const tables = nodes.map((node) => {
        const series = this.cache.get(node, signal);
        return [series.at, series.value];
      });
      const bands = bandsFor(this.store.limits, signal, nodes);
      chart.show(tables, bands, from, to);
      const known = tables.flatMap(([, values]) => (values.length && values[values.length - 1] !== null ? [values[values.length - 1]] : []));
      setText(text, known.length ? ` ${quantity(Math.min(...known), unit).join(" ")} – ${quantity(Math.max(...known), unit).join(" ")} now` : " no values");
      chart.host.dataset.first = String(Math.min(...tables.map(([at]) => at[0] ?? Infinity)));
      chart.host.dataset.points = String(tables.reduce((sum, [at]) => sum + at.length, 0));
    }
    this.dirty = false;
  }
}
