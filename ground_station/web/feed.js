// The live stream: server-sent events into the store, begun anew when it breaks or when frames were lost. Leaves out replay (replay.js).

import { get } from "./api.js";

const AGAIN_MS = 1000;
const SILENT_MS = 12000; // the ground station says something every five seconds

export class Feed {
  constructor(store) {
    this.store = store;
    this.source = null;
    this.timer = null;
  }

  start() {
    this.stop();
    const source = (this.source = new EventSource("/api/v1/stream"));
    const store = this.store;
    const on = (kind, take) =>
      source.addEventListener(kind, (message) => {
        if (source !== this.source) return;
        this.heard();
        take(JSON.parse(message.data));
      });
    on("snapshot", (snapshot) => {
      this.link(true);
      store.reset(snapshot);
    });
    on("fleet", (frame) => {
      store.fleet(frame);
    });
    on("beat", (beat) => store.synchronise(beat.at));
    on("lost", () => this.start());
    on("end", () => this.broken());
    on("birth", (birth) => {
      store.birth(birth);
      this.askExperts();
    });
    for (const kind of ["event", "alarm", "command", "request", "token", "heat", "satellite"]) on(kind, (content) => store[kind](content));
    on("limits", (limits) => store.takeLimits(limits));
    source.onerror = () => {
      if (source === this.source) this.broken();
    };
    this.heard();
  }

  stop() {
    clearTimeout(this.timer);
    clearTimeout(this.silence);
    if (this.source) this.source.close();
    this.source = null;
  }

  heard() {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => this.broken(), SILENT_MS);
  }

  // EventSource does not come back after a refusal, and does not say which: it is asked in our own time.
  broken() {
    this.stop();
    this.link(false);
    this.timer = setTimeout(async () => {
      try {
        await get("me");
        this.start();
      } catch {
        this.broken();
      }
    }, AGAIN_MS);
  }

  link(connected) {
    this.store.connected = connected;
    this.store.tell("link", connected);
  }

  askExperts() {
    clearTimeout(this.expertsTimer); // many births come together
    this.expertsTimer = setTimeout(async () => {
      try {
        this.store.takeExperts(await get("experts"));
      } catch {
        // the next birth asks again
      }
    }, 300);
  }
}
