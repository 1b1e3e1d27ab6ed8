// Satellites on a line of time: contact and shadow above temperature and power, one moment above the other. Leaves out the orbit itself.

import { $, coalesced, css, el, setText } from "./dom.js";
import { PALETTE, Chart, bandsFor } from "./chart.js";
import { digits, moment, plain } from "./format.js";
import { SeriesCache } from "./series.js";

const AXIS_WIDTH = 62;
const ROW = 18;
const SPAN_S = 300;
const AHEAD_S = 60;
const MOST = PALETTE.length;

export class Timeline {
  constructor(store) {
    this.store = store;
    this.body = $("timeline-body");
    this.cache = new SeriesCache(store, () => {});
    this.charts = [];
    this.draw = coalesced(() => this.render(), 900);
    store.addEventListener("reset", () => {
      this.names = null;
      this.cache.forget();
      this.draw();
    });
    store.addEventListener("satellite", this.draw);
    setInterval(this.draw, 1000);
    new ResizeObserver(this.draw).observe(this.body);
  }

  build(names) {
    this.names = names.join();
    for (const chart of this.charts) chart.destroy();
    this.charts = [];
    if (!names.length) {
      this.body.replaceChildren(el("p", { class: "empty" }, "No scenario is running: nothing orbits, so there are no contacts to show. Boards on a bench are in the trends; spacemoe demo --scenario hot-eclipse puts four of them in orbit."));
      setText($("timeline-note"), "");
      return;
    }
    this.canvas = el("canvas", { role: "img", "aria-label": "Contacts and shadow of each satellite over the last minutes" });
    this.table = el("table", {}, el("thead", {}, el("tr", {}, ...["satellite", "link", "light", "virtual °C", "battery", "duty cap"].map((title, i) => el("th", { class: i ? "num" : "" }, title)))), el("tbody"));
    const hosts = [el("div", { class: "chart" }), el("div", { class: "chart" })];
    this.body.replaceChildren(
      el("p", { class: "legend" }, ...[["contact", "contact"], ["planned", "planned"], ["eclipse", "in the Earth's shadow"]].map(([kind, text]) => el("span", {}, el("i", { class: `swatch ${kind}` }), ` ${text}`))),
      this.canvas, el("p", { class: "axis-title" }, "board temperature"), hosts[0], el("p", { class: "axis-title" }, "board power"), hosts[1],
      el("div", { class: "scroll", tabIndex: 0 }, this.table));
    const series = names.slice(0, MOST).map((label, i) => ({ label, color: PALETTE[i] }));
    this.charts = [["degC", hosts[0]], ["W", hosts[1]]].map(([unit, host]) => new Chart(host, { height: 110, unit, series }));
    this.cache.want(names.slice(0, MOST).flatMap((name) => [[name, "temp_c"], [name, "power_w"]]), SPAN_S);
    this.table.tBodies[0].replaceChildren(...names.map((name) => el("tr", {}, el("th", { scope: "row" }, plain(name, 40)), ...Array.from({ length: 5 }, () => el("td", { class: "num" })))));
  }

  render() {
    const names = [...this.store.satellites.keys()].sort();
    if (names.join() !== this.names || this.names === undefined) this.build(names);
    if (!names.length || document.hidden) return;
    const now = this.store.now();
    const [from, to] = [now - SPAN_S, now + AHEAD_S];
    this.bars(names, from, to, now);
    ["temp_c", "power_w"].forEach((signal, i) => {
      const tables = names.slice(0, MOST).map((name) => {
        const series = this.cache.get(name, signal);
        return [series.at, series.value];
      });
      const bands = bandsFor(this.store.limits, signal, names.slice(0, MOST));
      this.charts[i].show(tables, bands, from, to);
    });
    names.forEach((name, i) => {
      const { values } = this.store.satellites.get(name);
      const cells = this.table.tBodies[0].rows[i].cells;
      const number = (value, times = 1) => (value === null || value === undefined ? "–" : digits(value * times));
      const way = [["link_delay_s", 1000, "ms"], ["link_hops", 1, "hops"]].filter(([key]) => typeof values[key] === "number").map(([key, times, unit]) => `${number(values[key], times)} ${unit}`);
      setText(cells[1], values.link_up === 1 ? ["up", ...way].join(", ") : values.link_up === 0 ? "no contact" : "–");
      setText(cells[2], values.lit_share < 0.5 ? "shadow" : "sunlight");
      setText(cells[3], number(values.temp_c));
      setText(cells[4], `${number(values.soc, 100)} %`);
      setText(cells[5], number(values.duty_cap));
    });
    const first = this.store.satellites.get(names[0]);
    setText($("timeline-note"), `mission ${moment(first.mission_at_utc_s)} · ${first.scale} × · virtual${first.invalid ? ` · INVALID: ${plain(first.invalid, 80)}` : ""}`);
  }

  bars(names, from, to, now) {
    const ratio = window.devicePixelRatio || 1;
    const width = this.body.clientWidth;
    if (width < 2 * AXIS_WIDTH) return; // not laid out yet: the observer calls again
    const height = names.length * ROW + 4;
    const { canvas } = this;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    ctx.font = "11px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    const x = (at) => AXIS_WIDTH + ((Math.min(Math.max(at, from), to) - from) / (to - from)) * (width - AXIS_WIDTH - 10);
    names.forEach((name, i) => {
      const top = i * ROW + 2;
      ctx.fillStyle = css("--text");
      ctx.textAlign = "right";
      ctx.fillText(plain(name, 10), AXIS_WIDTH - 6, top + ROW / 2);
      ctx.fillStyle = css("--grid");
      ctx.fillRect(AXIS_WIDTH, top + 1, width - AXIS_WIDTH - 10, ROW - 3);
      const satellite = this.store.satellites.get(name);
      const draw = (intervals, color, y, h) => {
        ctx.fillStyle = color;
        for (const [begin, end] of intervals) if (end >= from && begin <= to) ctx.fillRect(x(begin), y, Math.max(1.5, x(end) - x(begin)), h);
      };
      draw(satellite.eclipse, css("--eclipse"), top + 1, ROW - 3);
      draw(this.store.planned.filter(([source, target]) => source === name || target === name).map((each) => [each[2], each[3]]), css("--planned"), top + 5, 7);
      draw(satellite.contact, css("--contact"), top + 5, 7);
    });
    ctx.strokeStyle = css("--accent");
    ctx.beginPath();
    ctx.moveTo(x(now), 0);
    ctx.lineTo(x(now), height);
    ctx.stroke();
  }
}
