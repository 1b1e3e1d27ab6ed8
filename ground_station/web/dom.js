// Elements whose text is only ever text: nothing from the network becomes markup. Leaves out what is shown.

export const $ = (id) => document.getElementById(id);

// el("td", {class: "num", title: "..."}, "text", child): strings become text nodes, properties by name, attributes else.
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
  return made;
}

// Changes the text only where it is another one: what stands still is not drawn again.
export function setText(element, text) {
  if (element.shownText === text) return;
  element.shownText = text; // reading it from the document again would cost more than all the rest
  element.textContent = text;
}

export function setClass(element, name) {
  if (element.shownClass === name) return;
  element.shownClass = name;
  element.className = name;
}

// Calls `draw` before the next picture, once however often it was asked for, and not more often than every `least_ms`.
export function coalesced(draw, least_ms = 0) {
  let asked = false;
  let last_ms = -Infinity;
  const run = () => {
    asked = false;
    last_ms = performance.now();
    draw();
  };
  return () => {
    if (asked) return;
    asked = true;
    const wait_ms = last_ms + least_ms - performance.now();
    if (wait_ms > 0) setTimeout(() => requestAnimationFrame(run), wait_ms);
    else requestAnimationFrame(run);
  };
}

export function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
