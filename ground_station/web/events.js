// What has happened, the latest first. Leaves out alarms (alarms.js).

import { $, coalesced, el } from "./dom.js";
import { SEVERITIES, SEVERITY_SIGN, clock, moment, plain } from "./format.js";

const ROWS = 200;

export class Events {
  constructor(store) {
    this.store = store;
    this.body = $("event-table").tBodies[0];
    this.all = coalesced(() => this.render());
    store.addEventListener("reset", this.all);
    store.addEventListener("event", (event) => this.add(event.detail));
    for (const id of ["event-severity", "event-filter"]) $(id).addEventListener("input", this.all);
  }

  wanted(event) {
    const text = $("event-filter").value.trim().toLowerCase();
    return SEVERITIES.indexOf(event.severity) >= Number($("event-severity").value) && `${event.node} ${event.kind} ${event.text}`.toLowerCase().includes(text);
  }

  row(event) {
    return el("tr", {}, el("td", { class: "when", title: moment(event.at_utc_s) }, clock(event.at_utc_s)), el("td", {}, el("b", { class: `level ${event.severity}` }, SEVERITY_SIGN[event.severity] || "?"), ` ${plain(event.severity, 12)}`), el("td", {}, plain(event.node, 40)), el("td", { class: "wide" }, el("b", {}, plain(event.kind, 60)), ` ${plain(event.text, 400)}${event.source === "ground" ? " (found on the ground)" : ""}`));
  }

  add(event) {
    if (!this.wanted(event)) return;
    if (this.body.firstElementChild && this.body.firstElementChild.classList.contains("empty")) this.body.replaceChildren();
    this.body.prepend(this.row(event));
    while (this.body.rows.length > ROWS) this.body.lastElementChild.remove();
  }

  render() {
    const shown = this.store.events.filter((event) => this.wanted(event)).slice(-ROWS).reverse();
    this.body.replaceChildren(...(shown.length ? shown.map((event) => this.row(event)) : [el("tr", { class: "empty" }, el("td", { colSpan: 4 }, "No events."))]));
  }
}
