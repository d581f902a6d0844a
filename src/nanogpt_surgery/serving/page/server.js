// All that goes to the server and comes from it: requests, streams, and the state that every tab
// shows. A key, if the server asks for one, stays in this tab.

let key = sessionStorage.getItem("key");
let keyWanted = () => {};
const QUIET = 45_000; // milliseconds without a byte after which a line counts as dead

export class ConnectionLost extends Error {}

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(given) {
  key = given;
  sessionStorage.setItem("key", given);
}

/** Calls `ask` whenever the server wants a key that this tab has not. */
export function onKeyWanted(ask) {
  keyWanted = ask;
}

async function send(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      headers, signal, cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost("The server does not answer.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  if (response.status === 401) keyWanted(key !== null);
  const said = answer?.error?.message ?? `The server answered ${response.status}.`;
  throw new Refused(response.status, said);
}

export const get = async (path) => (await send(path)).json();
export const post = async (path, body = {}, signal) => (await send(path, body, signal)).json();

/** Yields [name, data] of each event of a stream; `alive` is called at each sign of life. */
async function* events(response, alive = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ConnectionLost("The connection was lost.");
    }
    alive();
    if (part.done) return;
    const blocks = (rest + part.value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/);
      const of = (name) =>
        lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length).trimStart());
      const data = of("data:").join("\n");
      if (data && data !== "[DONE]") yield [of("event:")[0] ?? "message", JSON.parse(data)];
    }
  }
}

/** Yields what a POST streams. */
export async function* stream(path, body, signal) {
  for await (const [, data] of events(await send(path, body, signal))) yield data;
}

const listeners = { state: new Set(), training: new Set(), connection: new Set() };
const newest = {};

/** Calls `listener` with the newest of a kind, at once if there is one, and with each that follows. */
export function listen(kind, listener) {
  listeners[kind].add(listener);
  if (kind in newest) listener(newest[kind]);
}

function tell(kind, data) {
  if (kind === "state" && data.revision < newest.state?.revision) return; // a newer one has overtaken it
  newest[kind] = data;
  for (const listener of listeners[kind] ?? []) listener(data);
}

export const state = () => newest.state;

/** Returns the hashes of the base and of the adapters that take part with a weight. */
export function hashesOf(weights) {
  const { model, adapters } = state();
  const hashes = Object.fromEntries(adapters.map(({ name, hash }) => [name, hash]));
  return [model.hash, ...Object.keys(weights).filter((name) => weights[name]).map((name) => hashes[name])];
}

/** Asks for the state and tells it, where an answer alone does not bring it. */
export async function refresh() {
  tell("state", await get("/api/state"));
}

async function follow() {
  const dead = new AbortController();
  let timer;
  const alive = () => {
    clearTimeout(timer);
    timer = setTimeout(() => dead.abort(), QUIET);
  };
  try {
    alive();
    const response = await send("/api/events", undefined, dead.signal);
    if (newest.state) newest.state = { ...newest.state, revision: -1 }; // the server may be another one
    await refresh();
    tell("connection", { on: true });
    for await (const [kind, data] of events(response, alive)) tell(kind, data);
  } finally {
    clearTimeout(timer);
  }
}

let tryNow = () => {};
export const reconnect = () => tryNow();

/** Follows the server's events, and begins again whenever the line is lost. Never returns. */
export async function watch() {
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      await follow();
    } catch (error) {
      if (error.status === 401) await new Promise((resolve) => (tryNow = resolve));
    }
    if (newest.connection?.on) wait = 500;
    tell("connection", { on: false });
    await new Promise((resolve) => {
      tryNow = resolve;
      setTimeout(resolve, wait);
    });
  }
}

addEventListener("online", reconnect);
document.addEventListener("visibilitychange", () => document.hidden || reconnect());
