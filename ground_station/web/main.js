// Puts the page together: store, stream, panels, keys, theme. Leaves out everything else.

import { get } from "./api.js";
import { Alarms } from "./alarms.js";
import { Choice } from "./choice.js";
import { Commands } from "./commands.js";
import { $, setText } from "./dom.js";
import { Events } from "./events.js";
import { ExpertMap } from "./experts.js";
import { Feed } from "./feed.js";
import { FleetTable } from "./fleet.js";
import { moment, plain } from "./format.js";
import { NodeDialog } from "./node.js";
import { Replay } from "./replay.js";
import { Store } from "./store.js";
import { Timeline } from "./timeline.js";
import { Tokens } from "./tokens.js";
import { Trends } from "./trends.js";

const THEMES = ["system", "light", "dark"];
const PANELS = ["fleet", "alarms", "trends", "timeline", "experts", "tokens", "commands", "events"];

const choice = new Choice();
const store = new Store();
const feed = new Feed(store);
const replay = new Replay(store);
let person = { name: "", role: "viewer" };
const may = () => person.role === "operator";

const trends = new Trends(store, choice);
const dialog = new NodeDialog(store, (node, signal) => trends.follow(node, signal));
new FleetTable(store, choice, (id) => dialog.open(id));
new Timeline(store);
new ExpertMap(store);
new Tokens(store);
const alarms = new Alarms(store, may);
new Events(store);
const commands = new Commands(store, may);

function theme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  store.tell("theme");
  setText($("theme"), { system: "Theme: auto", light: "Theme: light", dark: "Theme: dark" }[name]);
  try {
    localStorage.setItem("theme", name);
  } catch {
    // a browser that keeps nothing shows the theme all the same
  }
}

function nextTheme() {
  const now = document.documentElement.dataset.theme || "system";
  theme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
}

async function mode(name) {
  if (name === store.mode) return;
  $("mode-live").setAttribute("aria-pressed", String(name === "live"));
  $("mode-replay").setAttribute("aria-pressed", String(name === "replay"));
  $("replay").hidden = name === "live";
  document.body.classList.toggle("replaying", name === "replay");
  if (name === "live") {
    replay.close();
    store.mode = "live";
    feed.start();
  } else {
    feed.stop();
    await replay.open();
  }
  commands.allow();
  link();
}

function link() {
  const element = $("link");
  const text = store.mode === "replay" ? "replay" : store.connected ? "live" : "no connection";
  setText(element, text);
  element.className = `pill ${store.mode === "replay" ? "replay-pill" : store.connected ? "good" : "bad"}`;
  document.body.classList.toggle("cut", store.mode === "live" && !store.connected);
}

function jump(id) {
  $(id).scrollIntoView({ block: "start" });
  $(id).focus({ preventScroll: true });
}

document.addEventListener("keydown", (event) => {
  const target = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || target.closest("input, select, textarea, dialog[open]")) return;
  const digit = "12345678".indexOf(event.key);
  if (digit >= 0 && event.key.length === 1) jump(PANELS[digit]);
  else if (event.key === "?") $("help").showModal();
  else if (event.key === "/") $("fleet-filter").focus();
  else if (event.key === "a") alarms.first();
  else if (event.key === "r") mode(store.mode === "live" ? "replay" : "live");
  else if (event.key === "t") nextTheme();
  else if (event.key === " " && store.mode === "replay" && !target.closest("button, summary, a")) replay.toggle();
  else return;
  event.preventDefault();
});

for (const link_ of document.querySelectorAll("nav.jump a, #alarm-count")) {
  link_.addEventListener("click", (event) => {
    event.preventDefault(); // the address keeps what was chosen
    jump(link_.getAttribute("href").slice(1));
  });
}
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
$("mode-live").addEventListener("click", () => mode("live"));
$("mode-replay").addEventListener("click", () => mode("replay"));
$("theme").addEventListener("click", nextTheme);
$("help-open").addEventListener("click", () => $("help").showModal());
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.menu[open]")) if (!menu.contains(event.target)) menu.open = false;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") for (const menu of document.querySelectorAll("details.menu[open]")) menu.open = false;
});
store.addEventListener("link", link);
store.addEventListener("pick", async (event) => {
  if (!event.detail || store.tokens.has(event.detail)) return;
  try {
    const found = await get(`requests/${encodeURIComponent(event.detail)}`);
    for (const token of found.ledger) store.addToken(token);
    store.tell("tokens");
  } catch (error) {
    setText($("token-note"), error.message);
  }
});

setInterval(() => {
  const known = store.mode === "live" || store.playhead_s !== null;
  setText($("clock"), known ? `${moment(store.now())} UTC` : "");
  const lags = store.lags_s.map(([, lag]) => lag).sort((a, b) => a - b);
  if (lags.length) {
    const p95 = lags[Math.min(lags.length - 1, Math.floor(lags.length * 0.95))];
    document.body.dataset.lagP95Ms = String(Math.round(1000 * p95));
    $("link").title = `95 % of the values are on the page ${Math.round(1000 * p95)} ms after they reached the ground station`;
  }
}, 500);

window.missionControl = { store, trends, replay }; // for whoever looks into it by hand

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => store.tell("theme"));

let kept = "system";
try {
  kept = localStorage.getItem("theme") || "system";
} catch {
  // see above
}
theme(THEMES.includes(kept) ? kept : "system");
link();
feed.start();
try {
  person = await get("me");
  $("logout").hidden = !person.session;
  $("role").title = plain(person.name, 40);
  await commands.load();
} catch (error) {
  setText($("role"), error.message);
}
commands.allow();
