// What the page knows of the fleet, from a snapshot and the frames after it. One for live and replay. Leaves out where frames come from.

const MAX_EVENTS = 500;
const MAX_COMMANDS = 300;
const MAX_TOKENS = 2000;
const STALE_S = 5;

export class Store extends EventTarget {
  constructor() {
    super();
    this.offset_s = -Infinity; // ground station's clock less this browser's
    this.offset_at = 0;
    this.mode = "live";
    this.playhead_s = null;
    this.connected = false;
    this.lags_s = []; // of the last minute: [when, seconds from a message's arrival at the ground station to the picture]
    this.waiting = [];
    this.epoch = 0; // counts what is begun anew: answers to earlier questions are not taken
    this.clear();
  }

  clear() {
    this.epoch += 1;
    this.waiting.length = 0;
    this.nodes = new Map();
    this.sets = new Map();
    this.events = [];
    this.alarms = new Map();
    this.commands = [];
    this.requests = new Map();
    this.tokens = new Map();
    this.satellites = new Map();
    this.experts = { nodes: [], precisions: [], holds: [], runs: {} };
    this.limits = { set: "", sets: {}, signals: {}, nodes: {} };
    this.planned = [];
  }

  // UTC seconds of what is shown.
  now() {
    if (this.mode === "replay" && this.playhead_s !== null) return this.playhead_s;
    return Date.now() / 1000 + (Number.isFinite(this.offset_s) ? this.offset_s : 0);
  }

  tell(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  // A frame that waited says too little: the quickest of the last minute is nearest to the truth.
  synchronise(at_s) {
    if (this.mode !== "live") return;
    const now = Date.now() / 1000;
    const offset_s = at_s - now;
    if (offset_s >= this.offset_s || now - this.offset_at > 60) Object.assign(this, { offset_s, offset_at: now });
  }

  reset(snapshot) {
    this.clear();
    this.synchronise(snapshot.fleet.at);
    this.limits = snapshot.limits;
    this.experts = snapshot.experts;
    this.events = snapshot.events.slice(-MAX_EVENTS);
    for (const alarm of snapshot.alarms) this.alarms.set(alarm.id, flagged(alarm));
    this.commands = snapshot.commands.slice(-MAX_COMMANDS);
    for (const request of [...snapshot.requests].reverse()) this.requests.set(request.request, request);
    for (const token of snapshot.tokens) this.addToken(token);
    this.takeContacts(snapshot.contacts);
    for (const birth of snapshot.fleet.births) this.node(birth.node).birth = birth;
    this.takeRows(snapshot.fleet);
    this.tell("reset");
    this.tell("rows", { rows: snapshot.fleet.rows, first: true });
  }

  takeContacts(contacts) {
    for (const satellite of contacts.satellites) this.satellites.set(satellite.node, satellite);
    this.planned = contacts.planned;
  }

  node(id) {
    let node = this.nodes.get(id);
    if (!node) {
      node = { id, state: "offline", at: null, set: null, values: [], levels: "", validities: "", birth: null };
      this.nodes.set(id, node);
    }
    return node;
  }

  takeRows(frame) {
    for (const [id, signals] of Object.entries(frame.sets || {})) {
      this.sets.set(id, { signals, index: new Map(signals.map((signal, i) => [signal[0], i])) });
    }
    for (const [id, set, at, state, values, levels, validities] of frame.rows) {
      const node = this.node(id);
      node.state = state;
      if (at !== null) Object.assign(node, { at, set: this.sets.get(set) || null, values, levels, validities });
    }
  }

  fleet(frame) {
    this.synchronise(frame.at);
    this.takeRows(frame);
    for (const row of frame.rows) if (row[2] !== null && frame.at - row[2] < 2) this.waiting.push(row[2]);
    this.tell("rows", frame);
  }

  // What has come since the last picture is in this one: from the message's arrival at the ground station until now.
  drawn() {
    if (!this.waiting.length) return;
    const came = this.waiting.splice(0);
    setTimeout(() => {
      const now = this.now();
      for (const at of came) this.lags_s.push([now, Math.max(0, now - at)]);
      const from = this.lags_s.findIndex(([when]) => when > now - 60);
      if (from > 0) this.lags_s.splice(0, from);
    });
  }

  // {value, unit, scope, provenance, level, validity} or null.
  signal(node, name) {
    const i = node.set ? node.set.index.get(name) : undefined;
    if (i === undefined) return null;
    const [, unit, scope, provenance] = node.set.signals[i];
    return { value: node.values[i], unit, scope, provenance, level: node.levels[i], validity: node.validities[i] };
  }

  // A page without its ground station, and a replay, judge by age.
  state(node) {
    const silent = node.at !== null && this.now() - node.at > STALE_S;
    return node.state === "online" && silent ? "stale" : node.state;
  }

  signalNames() {
    const names = new Map();
    for (const node of this.nodes.values()) {
      for (const [name, unit] of node.set ? node.set.signals : []) if (!names.has(name)) names.set(name, unit);
    }
    return names;
  }

  birth(birth) {
    this.node(birth.node).birth = birth;
    this.tell("birth", birth);
  }

  event(event) {
    this.events.push(event);
    if (this.events.length > MAX_EVENTS) this.events.splice(0, this.events.length - MAX_EVENTS);
    this.tell("event", event);
  }

  alarm(told) {
    const alarm = flagged(told);
    const before = this.alarms.get(alarm.id);
    if (alarm.gone) this.alarms.delete(alarm.id);
    else this.alarms.set(alarm.id, alarm);
    this.tell("alarm", { alarm, before });
  }

  command(record) {
    const i = this.commands.findIndex((known) => known.id === record.id);
    if (i >= 0) this.commands[i] = record;
    else this.commands.push(record);
    if (this.commands.length > MAX_COMMANDS) this.commands.shift();
    this.tell("command", record);
  }

  request(record) {
    this.requests.set(record.request, record);
    while (this.requests.size > 50) {
      const oldest = this.requests.keys().next().value;
      this.requests.delete(oldest);
      this.tokens.delete(oldest);
    }
    this.tell("request", record);
  }

  addToken(token) {
    if (!this.tokens.has(token.request)) this.tokens.set(token.request, []);
    const list = this.tokens.get(token.request);
    if (list.length < MAX_TOKENS && (list.length === 0 || list[list.length - 1].index < token.index)) list.push(token);
  }

  token(token) {
    this.addToken(token);
    this.tell("token", token);
  }

  heat(runs) {
    this.experts.runs = runs;
    this.tell("heat", runs);
  }

  takeExperts(experts) {
    this.experts = experts;
    this.tell("experts", experts);
  }

  takeLimits(limits) {
    this.limits = limits;
    this.tell("limits", limits);
  }

  satellite(satellite) {
    const known = this.satellites.get(satellite.node) || { contact: [], eclipse: [] };
    const before_s = known.at_utc_s;
    const grow = (intervals, holds, held) => {
      if (!holds) return;
      if (held && intervals.length && satellite.at_utc_s - before_s <= STALE_S) intervals[intervals.length - 1][1] = satellite.at_utc_s;
      else intervals.push([satellite.at_utc_s, satellite.at_utc_s]);
    };
    const was = known.values || {};
    const dark = (values) => values.lit_share !== undefined && values.lit_share !== null && values.lit_share < 0.5;
    grow(known.contact, satellite.values.link_up === 1, was.link_up === 1);
    grow(known.eclipse, dark(satellite.values), dark(was));
    this.satellites.set(satellite.node, { ...known, ...satellite });
    this.tell("satellite", satellite);
  }
}

// What a state means to the list. An archive's record does not say `now`: then the state must do.
function flagged(alarm) {
  const { state, now } = alarm;
  return { ...alarm, gone: state === "cleared", acknowledged: state === "acknowledged", shelved: state === "shelved", active: now === undefined ? !["returned", "cleared"].includes(state) : now !== "nominal" };
}
