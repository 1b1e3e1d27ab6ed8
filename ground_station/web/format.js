// Numbers, times and letters as they are read: pure functions. Leaves out the document.

const SI = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
const SCALED = new Set(["bytes", "B", "J", "W", "Hz", "bit/s", "B/s", "rows", "requests"]);
const SHORT = { degC: "°C", bytes: "B", "1": "", rows: "", requests: "", errors: "" };

// Three or four digits: [text, unit].
export function quantity(value, unit) {
  const short = Object.hasOwn(SHORT, unit) ? SHORT[unit] : unit;
  if (value === null || value === undefined || !Number.isFinite(value)) return ["–", short];
  if (unit === "s" && Math.abs(value) >= 120) return [duration(value), ""];
  const size = Math.abs(value);
  if (SCALED.has(unit) && size >= 10000 && size < 1e15) {
    const [factor, prefix] = SI.find(([limit]) => size >= limit);
    return [digits(value / factor), prefix + short];
  }
  return [digits(value), short];
}

export function digits(value) {
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2);
  if (Number.isInteger(value)) return String(value);
  return value.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 0.1 ? 2 : 4);
}

export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 120) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function age(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "never";
  return seconds < 10 ? `${Math.max(0, seconds).toFixed(1)} s` : duration(seconds);
}

export function clock(utc) {
  return Number.isFinite(utc) ? new Date(utc * 1000).toISOString().slice(11, 19) : "–";
}

export function moment(utc) {
  return Number.isFinite(utc) ? new Date(utc * 1000).toISOString().slice(0, 19).replace("T", " ") : "–";
}

// What a person wrote or a board sent, in one line that cannot turn the text around it (bidirectional controls) or break it.
export function plain(text, limit = 200) {
  const line = String(text).replace(/[\u0000-\u001f\u007f-\u009f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`)
    .replace(/[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (c) => `\\u${c.charCodeAt(0).toString(16)}`);
  return line.length > limit ? `${line.slice(0, limit)}…` : line;
}

export const PROVENANCE = {
  measured: ["M", "measured"],
  derived: ["D", "derived from measured values"],
  estimated: ["E", "estimated by a model"],
  simulated: ["S", "simulated: not of a real board"],
  virtual: ["V", "of the virtual satellite"],
};

// As limits.py has them: letters of the levels of severity.
export const LEVELS = {
  ".": ["", "", "no limits"],
  "?": ["", "?", "not known"],
  g: ["nominal", "", "within limits"],
  w: ["watch", "▲w", "watch"],
  y: ["warning", "▲W", "warning"],
  d: ["distress", "▲D", "distress"],
  r: ["critical", "▲C", "critical"],
  s: ["severe", "▲S", "severe"],
};

export const VALIDITY = { o: "ok", s: "stale", m: "missing", i: "invalid" };
export const SEVERITIES = ["info", "watch", "warning", "distress", "critical", "severe"];
export const SEVERITY_SIGN = { info: "i", watch: "▲w", warning: "▲W", distress: "▲D", critical: "▲C", severe: "▲S" };
