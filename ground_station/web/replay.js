// A stretch of the archive played through the same store as the present: frames come by /api/v1/frames. Leaves out drawing.

import { get } from "./api.js";
import { $, setText } from "./dom.js";
import { moment } from "./format.js";

const CHUNK_S = 60;
const TICK_MS = 250;

export class Replay {
  constructor(store) {
    this.store = store;
    this.playing = false;
    $("replay-load").addEventListener("click", () => this.load());
    $("replay-play").addEventListener("click", () => this.toggle());
    $("replay-at").addEventListener("change", (event) => this.seek(this.from + (Number(event.target.value) / 1000) * (this.to - this.from)));
    $("replay-speed").addEventListener("change", () => this.mark());
  }

  // Proposes the last ten minutes of what there is.
  async open() {
    const store = this.store;
    store.mode = "replay";
    store.playhead_s = null;
    setText($("replay-text"), "looking into the archive …");
    try {
      const there = await get("archive");
      if (there.until === null) throw new Error("the archive is empty");
      const until = Math.ceil(there.until);
      $("replay-from").value = local(Math.max(Math.floor(there.since), until - 600));
      $("replay-to").value = local(until);
      setText($("replay-text"), `the archive has ${moment(there.since)} to ${moment(there.until)} UTC`);
    } catch (error) {
      setText($("replay-text"), error.message);
      return;
    }
    await this.load();
  }

  close() {
    this.stop();
    clearInterval(this.timer);
    this.timer = null;
  }

  async load() {
    const [from, to] = [utc($("replay-from").value), utc($("replay-to").value)];
    if (!(from < to)) {
      setText($("replay-text"), "give from before to");
      return;
    }
    Object.assign(this, { from, to });
    $("replay-play").disabled = $("replay-at").disabled = false;
    await this.seek(from);
    this.play();
  }

  async seek(at) {
    const epoch = (this.asked = (this.asked || 0) + 1);
    const store = this.store;
    const was = this.playing;
    this.playing = false;
    try {
      // What stood a moment before begins the picture.
      const [before, alarms, commands, requests, limits, experts, contacts] = await Promise.all([
        get("frames", { since: Math.max(0, at - 10), until: at + 0.001 }), get("alarms", { since: at - 86400, until: this.to, lines: 5000 }),
        get("commands", { since: at - 86400, until: this.to }), get("requests", { since: at - 86400, until: this.to }), get("limits"), get("experts"), get("contacts", { since: at - 3600, until: this.to }),
      ]);
      if (epoch !== this.asked) return;
      store.clear();
      store.mode = "replay";
      store.playhead_s = at;
      store.limits = limits;
      store.experts = experts;
      store.takeContacts(contacts);
      for (const request of requests.requests.filter((one) => one.at_utc_s <= this.to)) store.requests.set(request.request, request);
      this.changes = alarms.changes;
      this.commands = commands.commands;
      this.steps = [];
      this.asking = null;
      this.fetched = at;
      store.tell("reset");
      for (const step of before.steps) this.apply(step, before.sets);
      this.advance();
      this.mark();
      this.playing = was;
      if (!this.timer) this.timer = setInterval(() => this.tick(), TICK_MS);
    } catch (error) {
      setText($("replay-text"), error.message);
    }
  }

  apply(step, sets) {
    this.store.takeRows({ sets, rows: step.rows });
    this.store.tell("rows", step);
    for (const birth of step.births) this.store.birth(birth);
    for (const event of step.events) this.store.event(event);
  }

  mark() {
    this.started = { at: this.store.playhead_s, ms: performance.now() };
  }

  tick() {
    if (!this.playing) return;
    const speed = Number($("replay-speed").value);
    const at = Math.min(this.to, this.started.at + ((performance.now() - this.started.ms) / 1000) * speed);
    if (at > this.fetched && this.fetched < this.to) {
      this.mark(); // the picture waits for the archive
      this.fetch();
      return;
    }
    this.store.playhead_s = at;
    if (at > this.fetched - CHUNK_S * 0.5) this.fetch();
    while (this.steps.length && this.steps[0][0].at <= at) this.apply(...this.steps.shift());
    this.advance();
    if (at >= this.to) this.stop();
  }

  async fetch() {
    if (this.asking || this.fetched >= this.to) return;
    const epoch = this.asked;
    const until = Math.min(this.to, this.fetched + CHUNK_S * Math.max(1, Number($("replay-speed").value) / 5));
    this.asking = get("frames", { since: this.fetched, until });
    try {
      const found = await this.asking;
      if (epoch !== this.asked) return;
      for (const step of found.steps) this.steps.push([step, found.sets]);
      this.fetched = Math.max(found.until, this.fetched + 0.001);
    } catch (error) {
      setText($("replay-text"), error.message);
      this.stop();
    } finally {
      if (epoch === this.asked) this.asking = null;
    }
  }

  // Alarms and commands up to the playhead.
  advance() {
    const { store } = this;
    const at = store.playhead_s;
    while (this.changes.length && this.changes[0].at_utc_s <= at) {
      const change = this.changes.shift();
      const known = store.alarms.get(change.id);
      store.alarm({ ...change, since_utc_s: known ? known.since_utc_s : change.at_utc_s });
    }
    while (this.commands.length && this.commands[0].at_utc_s <= at) store.command(this.commands.shift());
    $("replay-at").value = String(Math.round((1000 * (at - this.from)) / (this.to - this.from)));
    setText($("replay-text"), `${moment(at)} UTC`);
  }

  play() {
    if (this.store.playhead_s >= this.to) return;
    this.mark();
    this.playing = true;
    setText($("replay-play"), "Pause");
  }

  stop() {
    this.playing = false;
    setText($("replay-play"), "Play");
  }

  toggle() {
    if (this.from === undefined) return;
    if (this.playing) this.stop();
    else if (this.store.playhead_s >= this.to) this.seek(this.from).then(() => this.play());
    else this.play();
  }
}

function local(utc_s) {
  return new Date(utc_s * 1000).toISOString().slice(0, 19);
}

function utc(text) {
  return Date.parse(`${text}Z`) / 1000; // the fields are UTC, as everything here
}
