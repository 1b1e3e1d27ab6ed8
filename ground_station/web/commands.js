// Commands to nodes: what would be sent, a second question for hazardous ones, and what became of each. Leaves out who may (the ground station's).

import { $, coalesced, el, setText } from "./dom.js";
import { get, post } from "./api.js";
import { clock, moment, plain } from "./format.js";

const ROWS = 100;

export class Commands {
  constructor(store, may) {
    Object.assign(this, { store, may });
    this.catalogue = [];
    this.body = $("command-table").tBodies[0];
    this.draw = coalesced(() => this.render());
    for (const kind of ["reset", "command"]) store.addEventListener(kind, this.draw);
    for (const kind of ["reset", "rows", "birth"]) store.addEventListener(kind, () => this.nodes());
    $("command-name").addEventListener("change", () => this.choose());
    $("command-dry").addEventListener("click", () => this.send(true));
    $("command-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(false);
    });
  }

  async load() {
    this.catalogue = (await get("catalogue")).commands;
    $("command-name").replaceChildren(...this.catalogue.map((command) => el("option", { value: command.name }, `${command.name}${command.hazard ? " ⚠" : ""}`)));
    this.choose();
  }

  nodes() {
    const names = [...this.store.nodes.keys()].sort();
    if (names.join() === this.names) return;
    this.names = names.join();
    const before = $("command-node").value;
    $("command-node").replaceChildren(...names.map((name) => el("option", { value: name, selected: name === before }, plain(name, 40))));
  }

  allow() {
    const off = !this.may() || this.store.mode !== "live";
    for (const element of $("command-form").elements) element.disabled = off;
    setText($("role"), this.store.mode !== "live" ? "not in a replay" : off ? "you are a viewer" : "");
  }

  choose() {
    this.command = this.catalogue.find((command) => command.name === $("command-name").value);
    if (!this.command) return;
    $("command-arguments").replaceChildren(...this.command.arguments.map((argument) => el("label", {}, `${argument.name} `, el("input", { name: argument.name, value: argument.default, placeholder: argument.about, title: argument.about, maxlength: 4000, size: 14 }))));
    setText($("command-about"), `${this.command.about}${this.command.hazard ? `. Hazardous: ${this.command.hazard}` : ""}`);
    this.allow();
  }

  async send(dry) {
    if (!this.command || !$("command-node").value) return;
    const body = { node: $("command-node").value, name: this.command.name, arguments: {}, dry_run: true };
    for (const input of $("command-arguments").querySelectorAll("input")) if (input.value !== "") body.arguments[input.name] = input.value;
    const out = $("command-out");
    out.className = "out";
    try {
      const would = await post("commands", body);
      const text = `${would.topic}\n${JSON.stringify(would.arguments)} valid ${would.valid_s} s`;
      if (dry) {
        setText(out, `Would be sent, and was not:\n${text}`);
        return;
      }
      if (this.command.hazard && !(await this.confirm(body, text))) {
        setText(out, "Not sent.");
        return;
      }
      setText(out, "Sent, waiting for the answer …");
      const done = await post("commands", { ...body, dry_run: false, yes: Boolean(this.command.hazard) });
      setText(out, `${done.state}: ${plain(done.text, 400)}`);
      out.className = done.state === "ok" ? "out good" : "out bad";
    } catch (error) {
      setText(out, error.message);
      out.className = "out bad";
    }
  }

  confirm(body, text) {
    setText($("confirm-title"), `${body.name} ${body.node}?`);
    setText($("confirm-text"), `This is hazardous: ${this.command.hazard}.`);
    setText($("confirm-more"), text);
    const dialog = $("confirm");
    dialog.returnValue = "no";
    dialog.showModal();
    return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
  }

  render() {
    const shown = this.store.commands.slice(-ROWS).reverse();
    this.body.replaceChildren(...(shown.length ? shown.map((record) => el("tr", { class: `outcome-${record.state.replace(" ", "-")}` }, el("td", { class: "when", title: moment(record.at_utc_s) }, clock(record.at_utc_s)), el("td", {}, plain(record.who, 40)), el("td", {}, plain(record.node, 40)), el("td", {}, `${plain(record.name, 40)} ${plain(Object.entries(record.arguments).map(([name, value]) => `${name}=${value}`).join(" "), 80)}`), el("td", { class: "wide" }, el("b", {}, plain(record.state, 20)), ` ${plain(record.text, 200)}`))) : [el("tr", { class: "empty" }, el("td", { colSpan: 5 }, "No command has been sent."))]));
  }
}
