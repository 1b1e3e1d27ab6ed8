// The alarms that stand, what an operator does about them, and a voice for whoever cannot see them. Leaves out the rules (the ground station's).

import { $, coalesced, el, setText } from "./dom.js";
import { ApiError, post } from "./api.js";
import { SEVERITIES, SEVERITY_SIGN, age, clock, plain, quantity } from "./format.js";

const TITLES = { ack: "Acknowledge", shelve: "Shelve", clear: "Clear" };

export class Alarms {
  constructor(store, may) {
    Object.assign(this, { store, may });
    this.cards = new Map();
    this.draw = coalesced(() => this.render());
    store.addEventListener("alarm", (event) => {
      this.announce(event.detail);
      this.draw();
    });
    store.addEventListener("reset", this.draw);
    store.addEventListener("limits", this.draw);
    setInterval(this.draw, 1000);
    $("alarm-form").addEventListener("submit", (event) => {
      if (event.submitter && event.submitter.value === "yes") {
        event.preventDefault();
        this.send();
      }
    });
  }

  announce({ alarm, before }) {
    if (alarm.gone || (before && before.state === alarm.state && before.level === alarm.level)) return;
    $("alarm-say").textContent = `${alarm.severity} alarm, ${plain(alarm.node, 40)} ${plain(alarm.signal, 60)}: ${plain(alarm.state, 40)}`;
  }

  sorted() {
    const rank = (alarm) => (alarm.shelved ? 2 : alarm.acknowledged ? 1 : 0);
    return [...this.store.alarms.values()].sort((a, b) => rank(a) - rank(b) || SEVERITIES.indexOf(b.severity) - SEVERITIES.indexOf(a.severity) || b.at_utc_s - a.at_utc_s);
  }

  render() {
    const alarms = this.sorted();
    const waiting = alarms.filter((alarm) => !alarm.acknowledged && !alarm.shelved);
    const gravest = waiting.length ? waiting.reduce((most, alarm) => (SEVERITIES.indexOf(alarm.severity) > SEVERITIES.indexOf(most) ? alarm.severity : most), "info") : "";
    setText($("alarm-count"), !alarms.length ? "no alarms" : `${waiting.length} of ${alarms.length} ${alarms.length === 1 ? "alarm waits" : "alarms wait"}`);
    $("alarm-count").className = waiting.length ? `pill level-${gravest}` : "pill";
    setText($("limit-set"), this.store.limits.set ? `limits: ${plain(this.store.limits.set, 40)}` : "no limits are set");
    const list = $("alarm-list");
    if (!alarms.length) {
      if (!list.firstElementChild || !list.firstElementChild.classList.contains("empty")) list.replaceChildren(el("li", { class: "empty" }, "Nothing is wrong that the limits know of."));
      this.cards.clear();
      return;
    }
    if (!this.cards.size) list.replaceChildren();
    let place = list.firstElementChild;
    const kept = new Set();
    for (const alarm of alarms) {
      let card = this.cards.get(alarm.id);
      if (!card) this.cards.set(alarm.id, (card = this.make(alarm.id)));
      kept.add(alarm.id);
      this.fill(card, alarm);
      if (card.element === place) place = place.nextElementSibling;
      else list.insertBefore(card.element, place);
    }
    for (const [id, card] of this.cards) {
      if (kept.has(id)) continue;
      card.element.remove();
      this.cards.delete(id);
    }
  }

  make(id) {
    const parts = { sign: el("b", { class: "level" }), title: el("b"), state: el("span", { class: "tag" }), text: el("p"), note: el("p", { class: "note" }) };
    const buttons = Object.entries(TITLES).map(([action, title]) => el("button", { type: "button", onclick: () => this.ask(id, action) }, title));
    const element = el("li", { class: "card" }, el("div", { class: "line" }, parts.sign, parts.title, parts.state), parts.text, parts.note, el("div", { class: "buttons" }, ...buttons));
    return { element, buttons, ...parts };
  }

  fill(card, alarm) {
    card.element.className = `card sev-${alarm.severity} ${alarm.acknowledged || alarm.shelved ? "quiet" : ""}`;
    setText(card.sign, SEVERITY_SIGN[alarm.severity] || "▲");
    card.sign.className = `level ${alarm.severity}`;
    const [value, unit] = quantity(alarm.value, alarm.unit || "");
    setText(card.title, ` ${plain(alarm.node, 40)} · ${plain(alarm.signal, 60)}`);
    setText(card.state, plain(alarm.state, 40));
    setText(card.text, `${alarm.severity} · ${plain(alarm.text || alarm.level, 200)}`);
    const last = alarm.value === null || alarm.value === undefined ? "" : `last ${value} ${plain(unit, 12)} · `;
    setText(card.note, `${last}since ${clock(alarm.since_utc_s)} (${age(this.store.now() - alarm.since_utc_s)})${alarm.who ? ` · ${plain(alarm.who, 40)}` : ""}${alarm.comment ? `: ${plain(alarm.comment, 120)}` : ""}`);
    const live = this.store.mode === "live" && this.may();
    card.buttons[0].disabled = !live || alarm.acknowledged;
    card.buttons[1].disabled = !live || alarm.shelved;
    const holds = alarm.active && alarm.kind !== "event";
    card.buttons[2].disabled = !live || holds;
    card.buttons[2].title = holds ? "it cannot be cleared while the limit is crossed" : "";
  }

  // The first that waits, for the keyboard.
  first() {
    const alarm = this.sorted().find((each) => !each.acknowledged && !each.shelved);
    if (alarm && this.store.mode === "live" && this.may()) this.ask(alarm.id, "ack");
  }

  ask(id, action) {
    const alarm = this.store.alarms.get(id);
    if (!alarm) return;
    this.asked = { id, action };
    setText($("alarm-title"), `${TITLES[action]}: ${plain(alarm.node, 40)} ${plain(alarm.signal, 60)}`);
    setText($("alarm-text"), { ack: "You have seen it. It stays until it is over, then it goes.", shelve: "It is silent for a while, and comes back if it is not over by then.", clear: "It is over and goes from the list." }[action]);
    setText($("alarm-error"), "");
    setText($("alarm-go"), TITLES[action]);
    $("alarm-for-label").hidden = action !== "shelve";
    $("alarm-comment").value = "";
    $("alarm-dialog").showModal();
    $("alarm-comment").focus();
  }

  async send() {
    const { id, action } = this.asked;
    const body = { comment: $("alarm-comment").value };
    if (action === "shelve") body.for_s = Number($("alarm-for").value);
    try {
      await post(`alarms/${encodeURIComponent(id)}/${action}`, body);
      $("alarm-dialog").close();
    } catch (error) {
      setText($("alarm-error"), error instanceof ApiError ? error.message : String(error));
    }
  }
}
