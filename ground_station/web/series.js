// Values over time for charts: the archive's, then what comes live after them, without a seam. Leaves out drawing (trends.js, timeline.js).

import { get } from "./api.js";

const MOST_POINTS = 6000;
const POINTS = 700;
const TRIES = 5;
const AGAIN_MS = 1500;
const GAP_S = 5; // no line is drawn across a silence

export class SeriesCache {
  constructor(store, changed) {
    Object.assign(this, { store, changed });
    this.series = new Map();
    this.span_s = 900;
    store.addEventListener("rows", (event) => this.rows(event.detail));
  }

  key(node, signal) {
    return `${node}\n${signal}`;
  }

  // Which series are wanted, and how far back; what is new among them is asked for.
  want(pairs, span_s) {
    const wider = span_s > this.span_s;
    this.span_s = span_s;
    const wanted = new Map(pairs.map(([node, signal]) => [this.key(node, signal), [node, signal]]));
    for (const key of this.series.keys()) if (!wanted.has(key)) this.series.delete(key);
    for (const [key, [node, signal]] of wanted) {
      if (!this.series.has(key)) this.series.set(key, { node, signal, at: [], value: [], loaded: false });
      else if (!wider) continue;
      this.load(this.series.get(key));
    }
  }

  forget() {
    this.series.clear();
  }

  get(node, signal) {
    return this.series.get(this.key(node, signal)) || { at: [], value: [] };
  }

  async load(series) {
    const there = this.store.nodes.get(series.node);
    if (there && there.set && !there.set.index.has(series.signal)) return;
    const until = this.store.now();
    const epoch = this.store.epoch;
    let found;
    try {
      found = await get("trend", { node: series.node, signal: series.signal, since: until - this.span_s, until: until + 1, points: POINTS });
    } catch (error) {
      series.tries = (series.tries || 0) + 1; // what is new is in the archive a second later
      if (series.tries <= TRIES) setTimeout(() => this.series.get(this.key(series.node, series.signal)) === series && this.load(series), AGAIN_MS);
      return;
    }
    if (epoch !== this.store.epoch) return; // what was asked of another time
    const values = found.bucket_s > 0 ? found.mean : found.last;
    const last = found.at_utc_s.length ? found.at_utc_s[found.at_utc_s.length - 1] : -Infinity;
    const from = series.at.findIndex((at) => at > last);
    const newer = from < 0 ? [[], []] : [series.at.slice(from), series.value.slice(from)];
    series.at = found.at_utc_s.concat(newer[0]);
    series.value = values.concat(newer[1]);
    series.bucket_s = found.bucket_s;
    series.loaded = true;
    this.changed();
  }

  rows(frame) {
    const ids = new Set(frame.rows.filter((row) => row[2] !== null).map((row) => row[0]));
    let any = false;
    for (const series of this.series.values()) {
      if (!ids.has(series.node)) continue;
      const node = this.store.nodes.get(series.node);
      const signal = this.store.signal(node, series.signal);
      if (!signal) continue;
      const last = series.at.length ? series.at[series.at.length - 1] : -Infinity;
      if (node.at <= last) continue;
      if (node.at - last > Math.max(GAP_S, 2 * (series.bucket_s || 0)) && Number.isFinite(last)) {
        series.at.push(last + 0.001);
        series.value.push(null);
      }
      series.at.push(node.at);
      series.value.push(signal.validity === "o" ? signal.value : null);
      if (series.at.length > MOST_POINTS) {
        series.at.splice(0, MOST_POINTS / 4);
        series.value.splice(0, MOST_POINTS / 4);
      }
      any = true;
    }
    if (any) this.changed();
  }
}
