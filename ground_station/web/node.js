// Everything one node says, in a dialog that goes on while it is open. Leaves out history (trends.js).

import { $, coalesced, el, setClass, setText } from "./dom.js";
import { LEVELS, PROVENANCE, VALIDITY, age, duration, plain, quantity } from "./format.js";

export class NodeDialog {
  constructor(store, follow) {
    Object.assign(this, { store, follow });
    this.dialog = $("node-dialog");
    this.body = $("node-table").tBodies[0];
    this.draw = coalesced(() => this.render());
    store.addEventListener("rows", () => this.dialog.open && this.draw());
  }

  open(id) {
    this.id = id;
    this.set = null;
    setText($("node-title"), plain(id, 60));
    this.render();
    this.dialog.showModal();
  }

  render() {
    const node = this.store.nodes.get(this.id);
    if (!node) return;
    const birth = node.birth || {};
    const parts = [this.store.state(node), `last message ${age(node.at === null ? null : this.store.now() - node.at)} ago`, plain(birth.board || ""), birth.agent_version ? `agent ${plain(birth.agent_version, 40)}` : "", birth.bundle ? `bundle ${plain(birth.bundle, 60)}` : "", birth.shards !== undefined ? `${birth.shards} shards` : ""];
    setText($("node-about"), parts.filter(Boolean).join(" · "));
    if (!node.set) {
      this.body.replaceChildren(el("tr", {}, el("td", { colSpan: 6 }, "It has sent no telemetry yet.")));
      return;
    }
    if (node.set !== this.set) {
      this.set = node.set;
      this.body.replaceChildren(
        ...node.set.signals.map(([name]) =>
          el("tr", {}, el("th", { scope: "row" }, el("button", { type: "button", class: "link", title: "show its trend", onclick: () => this.trend(name) }, plain(name, 80))), el("td", { class: "num" }), el("td"), el("td"), el("td"), el("td"))),
      );
    }
    node.set.signals.forEach(([name, unit, scope, provenance], i) => {
      const cells = this.body.rows[i].cells;
      const [text, short] = quantity(node.values[i], unit);
      const [level, sign, about] = LEVELS[node.levels[i]] || LEVELS["."];
      setText(cells[1], unit === "s" && Math.abs(node.values[i]) >= 120 ? duration(node.values[i]) : `${text} ${plain(short, 24)}`);
      setClass(cells[1], `num ${level}`);
      setText(cells[2], sign ? `${sign} ${about}` : level ? "within" : "–");
      setText(cells[3], provenance in PROVENANCE ? provenance : "unknown");
      setText(cells[4], plain(scope, 40));
      setText(cells[5], VALIDITY[node.validities[i]] || "invalid");
    });
  }

  trend(name) {
    this.dialog.close();
    this.follow(this.id, name);
  }
}
