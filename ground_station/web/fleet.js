// The fleet table: a row per node, cells changed in place. Leaves out trends and a node's own page (node.js).

import { $, coalesced, el, setClass, setText } from "./dom.js";
import { LEVELS, PROVENANCE, VALIDITY, age, plain, quantity } from "./format.js";

const PREFERRED = ["temp_c", "power_w", "energy_j", "duty", "duty_cap", "machine_cpu_percent", "memory_available_bytes", "tokens_served"];
const MOST_COLUMNS = 12;
const STATE_SIGN = { online: "●", stale: "◐", offline: "○" };
const TITLES = { temp_c: "temperature", power_w: "power", energy_j: "energy", duty: "duty", duty_cap: "duty cap", machine_cpu_percent: "CPU", memory_available_bytes: "free memory", tokens_served: "tokens" };

export class FleetTable {
  constructor(store, choice, open) {
    Object.assign(this, { store, choice, open });
    this.rows = new Map();
    this.picked = choice.get("columns", null);
    this.columns = this.picked || PREFERRED;
    this.sort = choice.get("sort", ["node", 1]);
    this.body = $("fleet-table").tBodies[0];
    this.draw = coalesced(() => this.render(), 200);
    this.scroller = $("fleet-table").parentElement;
    this.scroller.addEventListener("scroll", this.draw, { passive: true });
    for (const kind of ["rows", "birth", "link"]) store.addEventListener(kind, this.draw);
    store.addEventListener("reset", () => {
      this.rows.clear();
      this.body.replaceChildren();
      this.known = "";
      this.draw();
    });
    for (const id of ["fleet-filter", "fleet-state"]) $(id).addEventListener("input", this.draw);
    setInterval(this.draw, 500); // ages go on
    $("fleet-legend").append(
      ...Object.entries(PROVENANCE).map(([kind, [letter, about]]) => el("span", { title: about }, el("b", { class: `badge ${kind}` }, letter), ` ${kind}`)),
      ...["watch", "warning", "distress", "critical", "severe"].map((level) => el("span", {}, el("b", { class: `level ${level}` }, Object.values(LEVELS).find((l) => l[0] === level)[1]), ` ${level}`)),
    );
    this.head();
  }

  head() {
    const columns = [["node", "node"], ["state", "state"], ["age", "age"], ...this.columns.map((name) => [name, TITLES[name] || plain(name, 40)])];
    const row = el("tr");
    for (const [key, title] of columns) {
      const direction = this.sort[0] === key ? (this.sort[1] > 0 ? "ascending" : "descending") : "none";
      const signal = !["node", "state"].includes(key);
      row.append(
        el("th", { scope: "col", "aria-sort": direction, class: signal ? "num" : "" },
          el("button", { type: "button", class: "sort", title: plain(key), onclick: () => this.sortBy(key) }, title, direction === "none" ? "" : direction === "ascending" ? " ▲" : " ▼")),
      );
    }
    $("fleet-table").tHead.replaceChildren(row);
  }

  sortBy(key) {
    this.sort = this.sort[0] === key ? [key, -this.sort[1]] : [key, 1];
    this.choice.set("sort", this.sort);
    this.head();
    this.draw();
  }

  // The menu of signals, made anew only when there are new ones.
  menu() {
    const names = this.store.signalNames();
    const key = [...names.keys()].sort().join("\n");
    if (key === this.known) return;
    this.known = key;
    if (this.picked === null && names.size) {
      // of the usual ones those that somebody sends, or else the first there are
      const there = PREFERRED.filter((name) => names.has(name));
      const columns = there.length ? there : [...names.keys()].slice(0, 6);
      if (columns.join("\n") !== this.columns.join("\n")) this.show(columns);
    }
    $("fleet-columns").replaceChildren(
      ...[...new Set([...this.columns, ...[...names.keys()].sort()])].map((name) =>
        el("label", {}, el("input", { type: "checkbox", checked: this.columns.includes(name), onchange: (e) => this.choose(name, e.target) }), ` ${plain(name, 60)}`)),
    );
  }

  choose(name, box) {
    if (box.checked && this.columns.length >= MOST_COLUMNS) box.checked = false;
    else this.picked = box.checked ? [...this.columns, name] : this.columns.filter((known) => known !== name);
    if (this.picked === null) return;
    this.choice.set("columns", this.picked);
    this.show(this.picked);
  }

  show(columns) {
    this.columns = columns;
    for (const row of this.rows.values()) row.element.remove();
    this.rows.clear();
    this.head();
    this.draw();
  }

  make(id) {
    const cells = this.columns.map((name) => {
      const parts = { value: el("span", { class: "v" }), unit: el("span", { class: "u" }), level: el("b"), badge: el("b") };
      const element = el("td", { class: "num" }, parts.level, parts.value, parts.unit, parts.badge);
      return { name, element, ...parts };
    });
    const name = el("button", { type: "button", class: "link", onclick: () => this.open(id) }, plain(id, 40));
    const board = el("span", { class: "board" });
    const state = el("td", { class: "state" });
    const old = el("td", { class: "num age" });
    const element = el("tr", {}, el("th", { scope: "row" }, name, board), state, old, ...cells.map((cell) => cell.element));
    return { id, element, board, state, old, cells };
  }

  render() {
    this.menu();
    const { store } = this;
    const filter = $("fleet-filter").value.trim().toLowerCase();
    const wanted = $("fleet-state").value;
    const now = store.now();
    const shown = [];
    const counts = { online: 0, stale: 0, offline: 0 };
    for (const node of store.nodes.values()) {
      const state = store.state(node);
      counts[state] += 1;
      const board = node.birth ? node.birth.board : "";
      if ((wanted && state !== wanted) || !`${node.id} ${state} ${board}`.toLowerCase().includes(filter)) continue;
      shown.push([node, state, this.key(node, state, now)]);
    }
    const direction = this.sort[1];
    shown.sort((a, b) => direction * compare(a[2], b[2]) || compare(a[0].id, b[0].id));
    let place = this.body.firstElementChild;
    const kept = new Set();
    const [first, last] = this.visible();
    for (const [i, [node, state]] of shown.entries()) {
      let row = this.rows.get(node.id);
      if (!row) this.rows.set(node.id, (row = this.make(node.id)));
      kept.add(node.id);
      if (!row.filled || (i >= first && i <= last)) this.fill(row, node, state, now);
      if (row.element === place) place = place.nextElementSibling;
      else this.body.insertBefore(row.element, place);
    }
    for (const [id, row] of this.rows) if (!kept.has(id)) row.element.remove();
    const text = `${counts.online} online · ${counts.stale} stale · ${counts.offline} offline`;
    setText($("counts"), text);
    this.store.drawn();
  }

  // Rows that can be seen, and some more: the others are filled once and again when they come into sight.
  visible() {
    const height = this.body.firstElementChild ? this.body.firstElementChild.getBoundingClientRect().height || 20 : 20;
    const first = Math.floor(this.scroller.scrollTop / height) - 4;
    return [first, first + Math.ceil(this.scroller.clientHeight / height) + 8];
  }

  key(node, state, now) {
    if (this.sort[0] === "node") return node.id;
    if (this.sort[0] === "state") return ["offline", "stale", "online"].indexOf(state);
    if (this.sort[0] === "age") return node.at === null ? Infinity : now - node.at;
    const signal = this.store.signal(node, this.sort[0]);
    return signal && signal.value !== null ? signal.value : -Infinity;
  }

  fill(row, node, state, now) {
    row.filled = true;
    setClass(row.element, state);
    setText(row.board, node.birth ? plain(node.birth.board, 60) : "");
    setText(row.state, `${STATE_SIGN[state]} ${state}`);
    setText(row.old, age(node.at === null ? null : now - node.at));
    for (const cell of row.cells) {
      const signal = this.store.signal(node, cell.name);
      if (!signal) {
        setText(cell.value, "");
        setText(cell.unit, "");
        setText(cell.level, "");
        setText(cell.badge, "");
        setClass(cell.element, "num");
        continue;
      }
      const [text, unit] = quantity(signal.value, signal.unit);
      const [level, sign] = LEVELS[signal.level] || LEVELS["."];
      const [letter, about] = PROVENANCE[signal.provenance] || ["?", "of unknown source"];
      const validity = VALIDITY[signal.validity] || "invalid";
      setText(cell.value, validity === "ok" || signal.value !== null ? text : validity);
      setText(cell.unit, plain(unit, 12));
      setText(cell.level, sign);
      setClass(cell.level, sign ? `level ${level}` : "level");
      setText(cell.badge, letter);
      setClass(cell.badge, `badge ${signal.provenance}`);
      setClass(cell.element, `num ${level} ${validity}`);
      const title = `${about}${validity === "ok" ? "" : `; ${validity}`}`;
      if (cell.element.title !== title) cell.element.title = title;
    }
  }
}

function compare(a, b) {
  return a < b ? -1 : a > b ? 1 : 0;
}
