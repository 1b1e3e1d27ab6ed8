// Questions to the ground station's HTTP API; an error says what it said and what to do. Leaves out the live stream (feed.js).

export class ApiError extends Error {
  constructor(status, message, fix) {
    super(fix ? `${message}: ${fix}` : message);
    this.status = status;
  }
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new ApiError(0, "the ground station does not answer", "see whether it runs");
  }
  const tree = await answer.json().catch(() => null);
  if (answer.ok && tree !== null) return tree;
  if (answer.status === 401) location.reload(); // the server shows its sign-in form
  const error = tree && tree.error ? tree.error : { message: `the ground station answered ${answer.status}`, fix: "" };
  throw new ApiError(answer.status, error.message, error.fix);
}

export function get(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== null);
  const text = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return ask(`/api/v1/${path}${text ? `?${text}` : ""}`);
}

export function post(path, body) {
  return ask(`/api/v1/${path}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}
