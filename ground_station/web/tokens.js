// Generated text as it comes, and what each token cost. Leaves out who generates.

import { $, coalesced, el, setText } from "./dom.js";
import { clock, digits, plain, quantity } from "./format.js";

const PARTS = ["trunk", "select", "codec", "wire", "expert"];
const ROWS = 40;
const TEXT = 6000;

export class Tokens {
  constructor(store) {
    this.store = store;
    this.follow = true; // the latest request, until another is picked
    this.current = null;
    this.body = $("token-table").tBodies[0];
    $("token-table").tHead.append(el("tr", {}, ...["#", "token", "ms", "where they went", "out", "in", "ladder"].map((title, i) => el("th", { class: i === 1 || i === 3 ? "" : "num" }, title))));
    $("token-legend").append(...PARTS.map((part) => el("span", {}, el("i", { class: `swatch part-${part}` }), ` ${part}`)));
    this.draw = coalesced(() => this.render(), 200);
    for (const kind of ["token", "request", "tokens"]) store.addEventListener(kind, this.draw);
    store.addEventListener("rows", () => store.mode === "replay" && this.draw());
    store.addEventListener("reset", () => {
      this.key = this.asked = null;
      this.draw();
    });
    $("token-request").addEventListener("change", (event) => {
      this.follow = event.target.selectedIndex === 0;
      this.current = event.target.value;
      this.draw();
      this.store.tell("pick", this.current);
    });
  }

  render() {
    const replay = this.store.mode === "replay";
    const now = this.store.now();
    const requests = [...this.store.requests.values()].filter((request) => !replay || request.at_utc_s <= now).sort((a, b) => b.at_utc_s - a.at_utc_s);
    const key = requests.map((request) => request.request).join();
    if (key !== this.key) {
      this.key = key;
      if (this.follow && requests.length) this.current = requests[0].request;
      $("token-request").replaceChildren(...requests.map((request) => el("option", { value: request.request, selected: request.request === this.current }, `${clock(request.at_utc_s)} ${request.kind} ${plain(request.request, 12)}`)));
      $("token-request").hidden = !requests.length;
    }
    const request = this.store.requests.get(this.current);
    if (!request) {
      setText($("token-text"), "");
      setText($("token-note"), "no request yet: spacemoe generate, or POST /v1/completions");
      this.body.replaceChildren();
      return;
    }
    if (replay && this.asked !== this.current) {
      this.asked = this.current;
      this.store.tell("pick", this.current); // its tokens are in the archive
    }
    const tokens = (this.store.tokens.get(this.current) || []).filter((token) => !replay || token.at_utc_s <= now);
    setText($("token-text"), tokens.map((token) => token.piece).join("").slice(-TEXT).replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "·"));
    $("token-text").scrollTop = $("token-text").scrollHeight;
    const last = tokens.slice(-20);
    const mean = last.length > 1 ? (last[last.length - 1].at_utc_s - last[0].at_utc_s) / (last.length - 1) : 0;
    const energy = request.energy_j === null ? "joules unknown" : `${quantity(request.energy_j, "J").join(" ")} (${plain(request.energy_scope || "scope not stated", 60)})`;
    setText($("token-note"), `${plain(request.state, 12)} · ${request.prompt_tokens} + ${Math.max(request.tokens, tokens.length)} tokens${mean > 0 ? ` · ${digits(1 / mean)} tokens/s` : ""} · ${energy}`);
    this.ledger(tokens.slice(-ROWS).reverse());
  }

  ledger(tokens) {
    const most = Math.max(1e-9, ...tokens.map((token) => token.total_ms || 0));
    while (this.body.rows.length > tokens.length) this.body.lastElementChild.remove();
    while (this.body.rows.length < tokens.length) {
      const bar = el("div", { class: "stack" }, ...PARTS.map((part) => el("i", { class: `part-${part}` })));
      this.body.append(el("tr", {}, el("td", { class: "num" }), el("td", { class: "piece" }), el("td", { class: "num" }), el("td", {}, bar), el("td", { class: "num" }), el("td", { class: "num" }), el("td", { class: "num" })));
    }
    tokens.forEach((token, i) => {
      const cells = this.body.rows[i].cells;
      setText(cells[0], String(token.index));
      setText(cells[1], plain(JSON.stringify(token.piece).slice(1, -1), 24));
      setText(cells[2], token.total_ms === null ? "–" : digits(token.total_ms));
      const bar = cells[3].firstElementChild;
      PARTS.forEach((part, n) => {
        const ms = token[`${part}_ms`] || 0;
        bar.children[n].style.width = `${Math.max(0, Math.min(100, (100 * ms) / most))}%`;
      });
      const title = PARTS.map((part) => `${part} ${token[`${part}_ms`] === null ? "–" : digits(token[`${part}_ms`])} ms`).join(", ");
      if (bar.title !== title) bar.title = title;
      setText(cells[4], quantity(token.sent_bytes, "bytes").join(" "));
      setText(cells[5], quantity(token.received_bytes, "bytes").join(" "));
      setText(cells[6], String(token.rungs));
    });
  }
}
